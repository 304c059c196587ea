"""The sampler of flow students: even steps before the shift, and a stock config that says what it is."""

import logging

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tiny import tiny_sana_pipeline, write_tiny_flow_student

from diffusers_tbcm import TBCMScheduler
from diffusers_tbcm.flow import shift_sigmas
from diffusers_tbcm.scheduling_flow import FlowStudentScheduler, even_sigmas, is_flow_student, student_sigmas
from diffusers_tbcm.trigflow import SIGMA_DATA, flow_to_trig_output, trig_to_flow_sample, trig_to_flow_timestep


TRAINED = {"height": 32, "width": 64, "max_sequence_length": 8, "complex_human_instruction": None}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_n_steps_are_even_before_the_shift_and_those_of_the_stock_scheduler_that_is_given_them(steps):
    ours, stock = FlowStudentScheduler(3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours.set_timesteps(steps)
    stock.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    assert torch.equal(ours.sigmas, stock.sigmas) and torch.equal(ours.timesteps, stock.timesteps)
    expected = shift_sigmas(torch.arange(steps, -1, -1, dtype=torch.float64) / steps, 3.0)
    torch.testing.assert_close(ours.sigmas.double(), expected, rtol=0, atol=1e-7)  # float32
    assert ours.num_inference_steps == steps
    if steps > 1:  # or this scheduler would be needless
        stock.set_timesteps(steps)
        assert not torch.allclose(ours.sigmas, stock.sigmas, atol=1e-2)


def test_times_that_are_given_are_taken():
    ours = FlowStudentScheduler(2.0)
    ours.set_timesteps(sigmas=[1.0, 0.3])
    torch.testing.assert_close(ours.sigmas, torch.tensor([1.0, 0.6 / 1.3, 0.0]))


def velocity(sample, s):
    """A network whose output depends on sample and time."""
    return torch.tanh(3 * sample.flip(-1) + 5 * s) - 0.3 * sample


def drawn_by_angles(steps, noise):
    """What `TBCMScheduler` makes of the network in TrigFlow form, on unit scale."""
    scheduler, sample = TBCMScheduler(), SIGMA_DATA * noise
    scheduler.set_timesteps(steps)
    scheduler.timesteps = scheduler.timesteps.double()  # the same times, and no other rounding to float32
    for t in scheduler.timesteps[:-1]:
        s = trig_to_flow_timestep(t).expand(len(sample))
        flow_sample = trig_to_flow_sample(sample, t.expand(len(sample)))
        output = flow_to_trig_output(flow_sample, velocity(flow_sample, s[0]), s)
        sample = scheduler.step(SIGMA_DATA * output, t, sample, return_dict=False)[0]
    return sample / SIGMA_DATA


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_student_of_tbcm_is_drawn_in_flow_time_as_by_its_angles(steps, monkeypatch):
    """By our scheduler and the stock one, from the same noises; the first one's scale is another."""
    shape, noises = (2, 3, 4, 4), iter(())

    def restart():
        nonlocal noises
        generator = torch.Generator().manual_seed(0)
        noises = iter([torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(steps + 1)])
        return next(noises)

    def next_noise(*_, dtype=torch.float64, **__):
        return next(noises).to(dtype)

    for module in ("scheduling_scm", "scheduling_flow_match_euler_discrete"):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", next_noise, raising=False)
    monkeypatch.setattr("diffusers_tbcm.scheduling_flow.randn_tensor", next_noise)
    monkeypatch.setattr(torch, "randn_like", next_noise)  # of the stock scheduler before diffusers 0.37
    expected = drawn_by_angles(steps, restart())
    ours = FlowStudentScheduler(stochastic_sampling=True)
    for scheduler in (ours, ours.to_stock()):
        sample = restart()
        scheduler.set_timesteps(sigmas=student_sigmas(steps, stochastic_sampling=True))
        for time, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            assert time == 1000 * s
            sample = scheduler.step(velocity(sample, s.double()), time, sample, return_dict=False)[0]
        assert sample.dtype == torch.float64
        # Times are float32, an error of 6e-8 in each, and the stock scheduler's samples, too
        assert (sample - expected).norm() < 1e-6 * expected.norm()
        print(f"{type(scheduler).__name__} {steps}: {(sample - expected).norm() / expected.norm():.1e}")


def test_a_student_of_tbcm_is_told_apart_and_takes_noise_of_its_generator():
    stock = FlowStudentScheduler(1.0, TRAINED, stochastic_sampling=True).to_stock()
    assert stock.config["stochastic_sampling"] and is_flow_student(
        {**stock.config, "_class_name": type(stock).__name__}
    )
    ours = FlowStudentScheduler.from_config(stock.config)
    assert ours.config["stochastic_sampling"] and ours.default_call_options == {"guidance_scale": 1.0, **TRAINED}
    assert not FlowStudentScheduler.from_config(FlowStudentScheduler().to_stock().config).config["stochastic_sampling"]
    assert student_sigmas(2) == [1.0, 0.5]
    torch.testing.assert_close(torch.tensor(student_sigmas(4, stochastic_sampling=True)[2]), torch.tensor(0.5))

    sample, found = torch.ones(2, 1, 2, 2), []
    for seeds in ((1, 2), (1, 3)):
        ours.set_timesteps(2)
        ours.generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        found.append(ours.step(0.5 * sample, ours.timesteps[0], sample).prev_sample)
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], found[1][1])


def test_a_stock_config_carries_all_of_it_through_plain_diffusers_without_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    folder = write_tiny_flow_student(tmp_path / "student", **TRAINED)
    plain = DiffusionPipeline.from_pretrained(folder)
    assert type(plain.scheduler) is FlowMatchEulerDiscreteScheduler and not caplog.records
    plain.save_pretrained(tmp_path / "again")
    for place in (folder, tmp_path / "again"):
        scheduler = FlowStudentScheduler.from_pretrained(place / "scheduler")
        assert scheduler.config["shift"] == 3.0
        assert scheduler.default_call_options == {"guidance_scale": 1.0, **TRAINED}
        assert is_flow_student(FlowStudentScheduler.load_config(place, subfolder="scheduler"))
    assert scheduler.to_stock().config["_call_options"] == TRAINED


def test_teachers_and_consistency_students_are_no_flow_students():
    assert not is_flow_student(
        tiny_sana_pipeline().scheduler.config | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    )
    consistency = TBCMScheduler(call_options=TRAINED).to_stock().config
    assert "_call_options" in consistency and not is_flow_student(consistency | {"_class_name": "SCMScheduler"})
    assert is_flow_student(
        {**FlowStudentScheduler().to_stock().config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: even_sigmas(0), "`num_inference_steps` is 0"),
        (lambda: FlowStudentScheduler().set_timesteps(), "`num_inference_steps` is None"),
        (lambda: FlowStudentScheduler().set_timesteps(2.0), "`num_inference_steps` is 2.0"),
        (lambda: FlowStudentScheduler(0), "`shift` is 0, but has to be positive"),
        (lambda: FlowStudentScheduler(float("nan")), "`shift` is nan"),
        (lambda: FlowStudentScheduler(1.0, {"sigmas": [1.0]}), "`call_options` is "),
        (lambda: FlowStudentScheduler(1.0, {"height": "64"}), r"`call_options\['height'\]` is '64'"),
        (
            lambda: FlowStudentScheduler(1.0, {"guidance_scale": 4.5}),
            r"`call_options\['guidance_scale'\]` is 4.5, but a flow student has learned its guidance",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
