"""The sampler of flow students: even steps before the shift, and a stock config that says what it is."""

import logging

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tiny import tiny_sana_pipeline, write_tiny_flow_student

from diffusers_tbcm import TBCMScheduler
from diffusers_tbcm.flow import shift_sigmas
from diffusers_tbcm.scheduling_flow import FlowStudentScheduler, even_sigmas, is_flow_student


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
