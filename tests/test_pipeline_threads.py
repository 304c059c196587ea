"""Several calls at a time, on one pipeline or on several of the same networks: each draws what it draws alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import SanaSprintPipeline
from tiny import generate, tiny_tbcm_pipeline

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler


IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
JOBS = {
    "4 steps": {"num_inference_steps": 4},
    "2 steps": {"num_inference_steps": 2, "guidance_scale": 1.0},
    "image": {"num_inference_steps": 2, "image": IMAGE, "strength": 0.5},
    "long prompt": {"prompt": "three little birds " * 4, "max_sequence_length": 64},
}


@pytest.fixture
def pipeline():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("one_each", [False, True])
def test_calls_that_take_turns_at_every_step_draw_what_each_draws_alone(pipeline, one_each):
    expected = {name: generate(pipeline, **job) for name, job in JOBS.items()}
    turns = threading.Barrier(len(JOBS), timeout=60)  # no call goes on before all have come so far

    def wait(pipe, step, timestep, tensors):
        if step < 2:
            turns.wait()

    def draw(name):
        own = SanaTBCMPipeline.from_pipe(pipeline) if one_each else pipeline
        own.set_progress_bar_config(disable=True)
        return generate(own, **JOBS[name], callback_on_step_end=wait)

    with ThreadPoolExecutor(len(JOBS)) as threads:
        for name, picture in zip(JOBS, threads.map(draw, JOBS), strict=True):
            assert torch.equal(picture, expected[name]), name


def test_a_call_within_a_call_leaves_it_alone(pipeline):
    expected = {name: generate(pipeline, **job) for name, job in JOBS.items()}
    within = []

    def draw_another(pipe, step, timestep, tensors):
        within.append(generate(pipeline, **JOBS["image"]))

    assert torch.equal(generate(pipeline, **JOBS["4 steps"], callback_on_step_end=draw_another), expected["4 steps"])
    assert all(torch.equal(picture, expected["image"]) for picture in within) and len(within) == 4


def test_an_offloaded_network_draws_one_call_at_a_time(pipeline):
    add_hook_to_module(pipeline.transformer, ModelHook())
    expected = generate(pipeline)

    def draw_another(pipe, step, timestep, tensors):
        with pytest.raises(ValueError, match=r"`transformer` has hooks .* another call is under way"):
            generate(pipeline)

    assert torch.equal(generate(pipeline, callback_on_step_end=draw_another), expected)
    assert torch.equal(generate(pipeline), expected)


def test_a_callback_stops_its_own_call_only(pipeline):
    whole, first = generate(pipeline, **JOBS["4 steps"]), []

    def stop(pipe, step, timestep, tensors):
        first.append(tensors["denoised"])
        pipe._interrupt = True
        assert torch.equal(generate(pipeline, **JOBS["4 steps"]), whole)

    tensors = {"callback_on_step_end_tensor_inputs": ["denoised"]}
    stopped = generate(pipeline, **JOBS["4 steps"], callback_on_step_end=stop, **tensors)
    assert len(first) == 1 and torch.equal(stopped, pipeline.decode_latents(first[0], "pt"))
    assert torch.equal(generate(pipeline, **JOBS["4 steps"]), whole)


def test_the_pipeline_stops_the_call_that_is_under_way(pipeline):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = True

    generate(pipeline, **JOBS["4 steps"], callback_on_step_end=stop)
    assert steps == [0]
    generate(pipeline, **JOBS["4 steps"], callback_on_step_end=lambda pipe, step, *_: steps.append(step))
    assert steps == [0, 0, 1, 2, 3]


def test_a_pipeline_shows_the_state_of_its_last_call(pipeline):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((pipe.num_timesteps, pipeline.num_timesteps, len(pipeline.scheduler.timesteps)))

    generate(pipeline, num_inference_steps=3, guidance_scale=4.0, callback_on_step_end=look)
    assert seen == [(3, 3, 4)] * 3
    assert pipeline.guidance_scale == 4.0 and pipeline.scheduler.timesteps.tolist()[-1] == 0
    assert not pipeline.interrupt


def test_a_sampler_that_is_set_during_a_call_stays(pipeline):
    other = TBCMScheduler(sigma_data=0.4)

    def replace(pipe, step, timestep, tensors):
        pipeline.scheduler = other

    generate(pipeline, callback_on_step_end=replace)
    assert pipeline.scheduler is other


def test_pipelines_of_one_another_have_samplers_of_their_own(pipeline):
    given = pipeline.scheduler
    stock = SanaSprintPipeline.from_pipe(pipeline)
    ours = SanaTBCMPipeline.from_pipe(stock)
    assert ours.scheduler is not stock.scheduler and ours.scheduler.config == stock.scheduler.config
    generate(pipeline, num_inference_steps=4)
    assert (
        stock.scheduler is given and given.num_inference_steps is None
    )  # a call changes no sampler that it was given
    assert SanaTBCMPipeline.from_pipe(pipeline, scheduler=given).scheduler is given
