import logging
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler

from diffusers_tbcm import TBCMScheduler
from diffusers_tbcm.scheduling_flow import student_sigmas
from diffusers_tbcm.scheduling_tbcm import TIMESTEPS_BY_STEPS


HALF_PI = math.pi / 2


def model(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Some output that depends on both inputs, times sigma_data as the pipeline hands it over."""
    return 0.5 * torch.sin(3 * sample + timestep)


def sample_with(scheduler, seed: int = 0, generator=None) -> list[torch.Tensor]:
    """Every sample and prediction of a run from fixed noise."""
    sample = 0.5 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    trajectory = []
    for timestep in scheduler.timesteps[:-1]:
        sample, denoised = scheduler.step(
            model(sample, timestep), timestep, sample, generator=generator, return_dict=False
        )
        trajectory += [sample, denoised]
    return trajectory


# timesteps


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 16, 1000])
def test_the_number_of_steps_is_enough(steps):
    scheduler = TBCMScheduler()
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    assert timesteps.shape == (steps + 1,) and timesteps.dtype == torch.float32
    assert timesteps[0] == torch.tensor(HALF_PI) and timesteps[-1] == 0
    assert (timesteps[:-1] > timesteps[1:]).all()
    assert scheduler.num_inference_steps == steps


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_even_steps_are_those_of_stock_diffusers(steps):
    # so that a user without this package gets the same images from the same number of steps
    ours, stock = TBCMScheduler(), SCMScheduler()
    ours.set_timesteps(steps)
    stock.set_timesteps(steps, max_timesteps=HALF_PI, intermediate_timesteps=None)
    assert torch.equal(ours.timesteps, stock.timesteps)


def test_two_steps_pass_through_the_angle_of_the_paper():
    scheduler = TBCMScheduler()
    scheduler.set_timesteps(2)
    assert torch.equal(scheduler.timesteps, torch.tensor([HALF_PI, 1.0, 0.0]))


def test_a_checkpoint_brings_its_own_timesteps():
    scheduler = TBCMScheduler(timesteps_by_steps={"2": [1.5, 0.7, 0.0], "3": [HALF_PI, 1.2, 0.4, 0.0]})
    scheduler.set_timesteps(2)
    assert torch.equal(scheduler.timesteps, torch.tensor([1.5, 0.7, 0.0]))
    scheduler.set_timesteps(3)
    assert torch.equal(scheduler.timesteps, torch.tensor([HALF_PI, 1.2, 0.4, 0.0]))
    scheduler.set_timesteps(4)
    assert torch.equal(scheduler.timesteps, torch.linspace(HALF_PI, 0, 5))


@pytest.mark.parametrize("convert", [list, tuple, torch.tensor, lambda values: torch.tensor(values).double().numpy()])
def test_custom_timesteps_imply_the_number_of_steps(convert):
    scheduler = TBCMScheduler()
    scheduler.set_timesteps(timesteps=convert([HALF_PI, 1.1, 0.25, 0.0]))
    assert torch.equal(scheduler.timesteps, torch.tensor([HALF_PI, 1.1, 0.25, 0.0]))
    assert scheduler.num_inference_steps == 3


def test_the_arguments_of_the_stock_pipeline_mean_what_they_mean_there():
    ours, stock = TBCMScheduler(), SCMScheduler()
    for steps, max_timesteps, intermediate_timesteps in [(2, 1.5, 1.3), (2, 1.5, None), (5, 1.4, None)]:
        arguments = {"max_timesteps": max_timesteps, "intermediate_timesteps": intermediate_timesteps}
        ours.set_timesteps(steps, **arguments)
        stock.set_timesteps(steps, **arguments)
        assert torch.equal(ours.timesteps, stock.timesteps)

    ours.set_timesteps(2, max_timesteps=1.57080, intermediate_timesteps=1.3)
    assert torch.equal(ours.timesteps, torch.tensor([HALF_PI, 1.3, 0.0]))  # 1.57080 is beyond pure noise
    ours.set_timesteps(2, intermediate_timesteps=1.3)
    assert torch.equal(ours.timesteps, torch.tensor([HALF_PI, 1.3, 0.0]))
    ours.set_timesteps(timesteps=[1.5, 0.9, 0.0], intermediate_timesteps=1.3)  # stock's default beside custom ones
    assert torch.equal(ours.timesteps, torch.tensor([1.5, 0.9, 0.0]))
    ours.set_timesteps(3, max_timesteps=float(ours.timesteps[0]))  # a float32 value comes back as it went
    assert torch.equal(ours.timesteps, torch.linspace(1.5, 0, 4))
    ours.set_timesteps(3, max_timesteps=torch.tensor(HALF_PI).item())
    assert torch.equal(ours.timesteps, torch.linspace(HALF_PI, 0, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`num_inference_steps` is None"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": -3}, "`num_inference_steps` is -3"),
        ({"num_inference_steps": 2.0}, "`num_inference_steps` is 2.0"),
        ({"num_inference_steps": 1001}, "`num_inference_steps`: 1001"),
        ({"num_inference_steps": 3, "timesteps": [1.5, 1.0, 0.0]}, "`num_inference_steps` is 3.* holds 2 steps"),
        ({"timesteps": [1.5, 0.0], "max_timesteps": 1.5}, "`max_timesteps` is 1.5"),
        ({"timesteps": [1.0, 1.2, 0.0]}, r"`timesteps` is \[1.0, 1.2"),
        ({"timesteps": [1.0, 1.0, 0.0]}, r"`timesteps` is \[1.0, 1.0, 0.0\]"),
        ({"timesteps": [0.0, 1.0]}, r"`timesteps` is \[0.0, 1.0\]"),
        ({"timesteps": [1.57080, 0.0]}, r"`timesteps` is \[1.5708.* at most pi/2"),
        ({"timesteps": [999.0, 499.0, 0.0]}, r"`timesteps` is \[999.0"),
        ({"timesteps": [1.5, 0.5]}, r"`timesteps` is \[1.5, 0.5\].* final 0"),
        ({"timesteps": [1.5, 0.5, -0.5]}, r"`timesteps` is \[1.5, 0.5, -0.5\]"),
        ({"timesteps": [1.5, float("nan"), 0.0]}, r"`timesteps` is \[1.5, nan"),
        ({"timesteps": [float("inf"), 1.0, 0.0]}, r"`timesteps` is \[inf"),
        ({"timesteps": [0.0]}, r"`timesteps` is \[0.0\]"),
        ({"timesteps": []}, r"`timesteps` is \[\]"),
        ({"timesteps": torch.tensor([[1.5, 0.0]])}, r"`timesteps` is tensor\(\[\[1.5"),
        ({"num_inference_steps": 3, "max_timesteps": 1.6}, "`max_timesteps` is 1.6"),
        ({"num_inference_steps": 3, "max_timesteps": 0.0}, "`max_timesteps` is 0.0"),
        ({"num_inference_steps": 3, "max_timesteps": float("nan")}, "`max_timesteps` is nan"),
        ({"num_inference_steps": 3, "intermediate_timesteps": 1.3}, "`intermediate_timesteps` is 1.3.* is 3"),
        ({"num_inference_steps": 2, "intermediate_timesteps": 1.6}, "`intermediate_timesteps` is 1.6"),
        ({"num_inference_steps": 2, "intermediate_timesteps": 0.0}, "`intermediate_timesteps` is 0.0"),
    ],
)
def test_bad_timesteps_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TBCMScheduler().set_timesteps(**arguments)


# config


def test_config_survives_saving(tmp_path):
    own = {"1": [1.55, 0.0], "2": [HALF_PI, 1.1, 0.0]}
    TBCMScheduler(sigma_data=0.7, timesteps_by_steps=own).save_pretrained(tmp_path)
    loaded = TBCMScheduler.from_pretrained(tmp_path)
    assert loaded.config.sigma_data == 0.7
    assert loaded.config.timesteps_by_steps == own
    assert TBCMScheduler.from_config(loaded.config).config.timesteps_by_steps == own


def test_default_timesteps_are_saved_with_the_checkpoint(tmp_path):
    TBCMScheduler().save_pretrained(tmp_path)
    assert TBCMScheduler.load_config(tmp_path)["timesteps_by_steps"] == TIMESTEPS_BY_STEPS


def test_stock_config_loads(tmp_path):
    SCMScheduler(sigma_data=0.25).save_pretrained(tmp_path)
    for config in (SCMScheduler.load_config(tmp_path), SCMScheduler(sigma_data=0.25).config):
        scheduler = TBCMScheduler.from_config(config)
        assert scheduler.config.sigma_data == 0.25
        assert scheduler.config.timesteps_by_steps == TIMESTEPS_BY_STEPS
    legacy = TBCMScheduler.from_config({**SCMScheduler().config, "max_timesteps": 1.57080})
    legacy.set_timesteps(1)
    assert torch.equal(legacy.timesteps, torch.tensor([HALF_PI, 0.0]))


def test_stock_scheduler_loads_our_config_and_keeps_its_keys(tmp_path):
    own = {"2": [HALF_PI, 1.1, 0.0]}
    TBCMScheduler(timesteps_by_steps=own).save_pretrained(tmp_path / "ours")
    stock = SCMScheduler.from_pretrained(tmp_path / "ours")
    assert type(stock) is SCMScheduler
    stock.set_timesteps(2, max_timesteps=HALF_PI, intermediate_timesteps=1.1)
    stock.save_pretrained(tmp_path / "stock")
    assert TBCMScheduler.from_pretrained(tmp_path / "stock").config.timesteps_by_steps == own
    assert TBCMScheduler.from_config(stock.config).config.timesteps_by_steps == own


def test_stock_stand_in_hides_our_entries_from_a_stock_scheduler_only(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    own = {
        "timesteps_by_steps": {"2": [HALF_PI, 1.1, 0.0]},
        "stochastic_sampling": False,
        "guidance_scales": [4.0, 4.5, 5.0],
        "call_options": {"max_sequence_length": 16, "complex_human_instruction": None},
    }
    TBCMScheduler(sigma_data=0.7, **own).to_stock().save_pretrained(tmp_path / "stock")
    stock = SCMScheduler.from_pretrained(tmp_path / "stock")
    assert type(stock) is SCMScheduler and stock.config.sigma_data == 0.7
    assert not caplog.records  # it has been told of nothing that it does not know
    stock.save_pretrained(tmp_path / "again")
    for config in (SCMScheduler.load_config(tmp_path / "again"), stock.config):
        ours = TBCMScheduler.from_config(config)
        assert {name: ours.config[name] for name in own} == own and ours.config.sigma_data == 0.7
    changed = TBCMScheduler.from_config(ours.config, guidance_scales=[3.0])
    changed.save_pretrained(tmp_path / "changed")
    assert TBCMScheduler.from_pretrained(tmp_path / "changed").config.guidance_scales == [3.0]


def test_a_teachers_scheduler_does_not_say_how_its_student_is_drawn(tmp_path):
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path)
    teachers = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert not teachers.config.stochastic_sampling
    for config in (FlowMatchEulerDiscreteScheduler.load_config(tmp_path), teachers.config):
        assert TBCMScheduler.from_config(config).config.stochastic_sampling
        assert not TBCMScheduler.from_config(config, stochastic_sampling=False).config.stochastic_sampling


def test_the_defaults_of_a_call_are_what_the_student_was_distilled_with():
    assert TBCMScheduler().default_call_options == {}
    for scales, middle in (([1.5, 2.5, 2.0], 2.0), ([3.0], 3.0), ([1.5, 2.5], 1.5)):  # one that it has learnt
        assert TBCMScheduler(guidance_scales=scales).default_call_options == {"guidance_scale": middle}
    reading = {"max_sequence_length": 16, "complex_human_instruction": None}
    scheduler = TBCMScheduler(guidance_scales=[2.0], call_options=reading)
    assert scheduler.default_call_options == {"guidance_scale": 2.0, **reading}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"call_options": {"prompt": "a dog"}}, "`call_options` is {'prompt': 'a dog'}, but has to be a dict of"),
        ({"call_options": ["height"]}, r"`call_options` is \['height'\]"),
        ({"call_options": 3}, "`call_options` is 3"),
        ({"guidance_scales": []}, r"`guidance_scales` is \[\]"),
        ({"guidance_scales": [4.0, 0.0]}, r"`guidance_scales` is \[4.0, 0.0\]"),
        ({"prediction_type": "epsilon"}, "`prediction_type` is 'epsilon'"),
        ({"stochastic_sampling": "no"}, "`stochastic_sampling` is 'no', but has to be True or False"),
        ({"sigma_data": 0.0}, "`sigma_data` is 0.0"),
        ({"sigma_data": float("nan")}, "`sigma_data` is nan"),
        ({"timesteps_by_steps": {"2": [HALF_PI, 0.0]}}, r"`timesteps_by_steps\['2'\]` has 2 timesteps"),
        ({"timesteps_by_steps": {1: [HALF_PI, 0.0]}}, r"`timesteps_by_steps\[1\]` has 2 .* the string '1'"),
        ({"timesteps_by_steps": {"2": [1.0, 1.5, 0.0]}}, r"`timesteps_by_steps\['2'\]` is \[1.0, 1.5, 0.0\]"),
        ({"timesteps_by_steps": {"1": [1.57080, 0.0]}}, r"`timesteps_by_steps\['1'\]` is \[1.5708"),
    ],
)
def test_bad_config_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TBCMScheduler(**arguments)


# steps


def test_step_is_the_closed_form():
    angle, next_angle = 1.2, 0.7
    scheduler = TBCMScheduler(sigma_data=0.4)
    scheduler.set_timesteps(timesteps=[angle, next_angle, 0.0])
    clean, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sample = math.cos(angle) * clean + math.sin(angle) * noise
    velocity = math.cos(angle) * noise - math.sin(angle) * clean  # dx_t/dt: the output of a model that knows `clean`

    generator = torch.Generator().manual_seed(1)
    fresh = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).double()
    output = scheduler.step(velocity, scheduler.timesteps[0], sample, generator=generator)
    # the angles are float32
    torch.testing.assert_close(output.pred_original_sample, clean, atol=1e-6, rtol=0)
    expected = math.cos(next_angle) * clean + math.sin(next_angle) * 0.4 * fresh
    torch.testing.assert_close(output.prev_sample, expected, atol=1e-6, rtol=0)

    last_sample, last_velocity = output.prev_sample, torch.ones_like(clean)
    output = scheduler.step(last_velocity, scheduler.timesteps[1], last_sample, generator=generator)
    expected = math.cos(next_angle) * last_sample - math.sin(next_angle) * last_velocity
    torch.testing.assert_close(output.prev_sample, expected, atol=1e-6, rtol=0)
    assert torch.equal(output.prev_sample, output.pred_original_sample)


def test_without_fresh_noise_a_step_goes_to_the_next_angle_of_the_same_clean_sample_and_noise():
    angle, next_angle = 1.2, 0.7
    scheduler = TBCMScheduler(stochastic_sampling=False)
    scheduler.set_timesteps(timesteps=[angle, next_angle, 0.0])
    clean, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sample = math.cos(angle) * clean + math.sin(angle) * noise
    velocity = math.cos(angle) * noise - math.sin(angle) * clean  # dx_t/dt: the output of a model that knows both
    generator = torch.Generator().manual_seed(1)
    output = scheduler.step(velocity, scheduler.timesteps[0], sample, generator=generator)
    torch.testing.assert_close(output.pred_original_sample, clean, atol=1e-6, rtol=0)
    expected = math.cos(next_angle) * clean + math.sin(next_angle) * noise
    torch.testing.assert_close(output.prev_sample, expected, atol=1e-6, rtol=0)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())

    velocity = math.cos(next_angle) * noise - math.sin(next_angle) * clean
    prev_sample, denoised = scheduler.step(velocity, scheduler.timesteps[1], expected, return_dict=False)
    torch.testing.assert_close(prev_sample, clean, atol=1e-6, rtol=0)
    assert torch.equal(prev_sample, denoised)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_without_fresh_noise_steps_are_those_of_a_stock_euler_scheduler_at_the_same_times(steps):
    def clean_of(flow_sample: torch.Tensor, s: float) -> torch.Tensor:
        return torch.sin(2 * flow_sample) + s  # any student

    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    euler, ours = FlowMatchEulerDiscreteScheduler(), TBCMScheduler(stochastic_sampling=False, sigma_data=0.5)
    euler.set_timesteps(sigmas=student_sigmas(steps, stochastic_sampling=True))
    flow_sample = noise
    for s, timestep in zip(euler.sigmas.tolist(), euler.timesteps, strict=False):
        velocity = (flow_sample - clean_of(flow_sample, s)) / s
        flow_sample = euler.step(velocity, timestep, flow_sample, return_dict=False)[0]

    ours.set_timesteps(steps)
    sample = 0.5 * noise
    for t in ours.timesteps[:-1]:
        t64 = min(t.item(), HALF_PI)
        s = math.sin(t64) / (math.sin(t64) + math.cos(t64))
        clean = 0.5 * clean_of(sample / 0.5 / (math.sin(t64) + math.cos(t64)), s)
        output = (math.cos(t64) * sample - clean) / math.sin(t64)
        sample = ours.step(output, t, sample).prev_sample
    torch.testing.assert_close(sample / 0.5, flow_sample.to(sample.dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 4])
def test_without_fresh_noise_the_first_noise_decides(steps):
    ends = []
    for stochastic_sampling, seed in ((True, 0), (False, 0), (False, 3)):
        scheduler = TBCMScheduler(stochastic_sampling=stochastic_sampling)
        scheduler.set_timesteps(steps)
        ends.append(sample_with(scheduler, seed=seed)[-1])
    assert torch.equal(ends[0], ends[1]) == (steps == 1) and torch.equal(ends[1], ends[2])


def test_fresh_noise_has_the_deviation_of_the_data():
    scheduler = TBCMScheduler(sigma_data=0.3)
    scheduler.set_timesteps(timesteps=[1.5, 1.4, 0.0])
    zeros = torch.zeros(4, 4, 64, 64)
    noised = scheduler.step(zeros, 1.5, zeros, generator=torch.Generator().manual_seed(0)).prev_sample
    # 65536 draws: the standard error of a standard deviation is 0.3 %
    assert noised.std().item() == pytest.approx(0.3 * math.sin(1.4), rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_samples_are_those_of_the_stock_scheduler(steps):
    ours, stock = TBCMScheduler(), SCMScheduler()
    ours.set_timesteps(steps)
    stock.set_timesteps(steps, timesteps=ours.timesteps, max_timesteps=None, intermediate_timesteps=None)
    for our_tensor, stock_tensor in zip(sample_with(ours), sample_with(stock), strict=True):
        assert torch.equal(our_tensor, stock_tensor)


def test_last_step_draws_no_noise():
    scheduler = TBCMScheduler()
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(5)
    sample_with(scheduler, generator=generator)
    twice = torch.Generator().manual_seed(5)
    for _ in range(2):
        torch.randn(3, 2, 4, 4, generator=twice)
    assert torch.equal(generator.get_state(), twice.get_state())


def test_one_generator_per_sample():
    batch, single = TBCMScheduler(), TBCMScheduler()
    batch.set_timesteps(3)
    together = sample_with(batch, generator=[torch.Generator().manual_seed(seed) for seed in range(3)])[-1]
    for index in range(3):
        single.set_timesteps(3)
        sample = 0.5 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(7))[index : index + 1]
        generator = [torch.Generator().manual_seed(index)]
        for timestep in single.timesteps[:-1]:
            sample = single.step(model(sample, timestep), timestep, sample, generator).prev_sample
        torch.testing.assert_close(sample, together[index : index + 1])


def test_a_batch_may_repeat_the_timestep():
    scheduler = TBCMScheduler()
    scheduler.set_timesteps(2)
    sample = torch.randn(3, 2, 4, 4)
    for timestep in scheduler.timesteps[:-1]:
        sample = scheduler.step(model(sample, timestep), timestep.expand(3), sample).prev_sample
    assert scheduler.step_index == 2
    with pytest.raises(ValueError, match="all 2 steps are done"):
        scheduler.step(sample, scheduler.timesteps[-1], sample)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"`timestep` is tensor\(\[1.5708, 1.0000, 1.5708\]\)"):
        scheduler.step(sample, scheduler.timesteps[[0, 1, 0]], sample)


def test_sampling_may_begin_in_the_middle():
    scheduler = TBCMScheduler()
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for begin_index in (1, None):  # told, and looked up
        scheduler.set_timesteps(3)
        if begin_index is not None:
            scheduler.set_begin_index(begin_index)
        generator = torch.Generator().manual_seed(1)
        sample = scheduler.add_noise(clean, noise, scheduler.timesteps[1:2])
        for timestep in scheduler.timesteps[1:-1]:
            sample = scheduler.step(model(sample, timestep), timestep, sample, generator).prev_sample
        assert scheduler.step_index == 3
        results.append(sample)
    assert torch.equal(*results)


def test_step_refuses_what_the_schedule_lacks():
    scheduler = TBCMScheduler()
    sample = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="call `set_timesteps` before `step`"):
        scheduler.step(sample, HALF_PI, sample)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"`timestep` is 999, but .* \[1\.57.*, 1\.0, 0\.0\]"):
        scheduler.step(sample, 999, sample)
    with pytest.raises(ValueError, match=r"`timestep` is 0\.0, but all 2 steps are done"):
        scheduler.step(sample, 0.0, sample)


# noise


def test_add_noise_is_the_closed_form():
    scheduler = TBCMScheduler(sigma_data=0.4)
    clean, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = [0.0, 0.9, HALF_PI]
    noisy = scheduler.add_noise(clean, noise, torch.tensor(angles, dtype=torch.float64))
    for index, angle in enumerate(angles):
        expected = math.cos(angle) * clean[index] + math.sin(angle) * 0.4 * noise[index]
        torch.testing.assert_close(noisy[index], expected)
    assert torch.equal(
        scheduler.add_noise(clean, noise, torch.tensor([0.9]))[1:2],
        scheduler.add_noise(clean[1:2], noise[1:2], torch.tensor([0.9])),
    )


def test_add_noise_keeps_the_dtype():
    clean = torch.randn(2, 2, 4, 4, dtype=torch.bfloat16)
    assert TBCMScheduler().add_noise(clean, clean, torch.tensor([0.5, 1.0])).dtype == torch.bfloat16


@pytest.mark.parametrize("timesteps", [torch.tensor([999, 10]), torch.tensor([1.58]), torch.tensor([-0.1])])
def test_add_noise_refuses_other_times(timesteps):
    sample = torch.zeros(2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"`timesteps` is .* in radians"):
        TBCMScheduler().add_noise(sample, sample, timesteps)
