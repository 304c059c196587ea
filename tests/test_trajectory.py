import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from gaussian_data import DATA_STD, gaussian_std, gaussian_teacher
from tiny import tiny_transformer
from toy_networks import SIGMA_DATA, cfg_arguments, four_axes, generators, no_text, randn

from diffusers_tbcm.text import Text
from diffusers_tbcm.trajectory import (
    SAMPLING_SCHEMES,
    equivalent_noise,
    record_trajectory,
    reference_route,
    rotate,
    sample_timesteps,
)
from diffusers_tbcm.trigflow import TrigFlowTransformer


def test_rotation_follows_a_straight_prediction_exactly():
    data, noise = randn(2, 3, 2, 2, 2)
    t, delta = torch.tensor([1.5, 0.9, 0.4]).double(), torch.tensor([0.5, 0.9, 0.0]).double()

    def path(angle):
        return four_axes(angle).cos() * data + four_axes(angle).sin() * noise

    velocity = four_axes(t).cos() * noise - four_axes(t).sin() * data
    arrived = rotate(path(t), velocity, delta)
    torch.testing.assert_close(arrived, path(t - delta))
    assert torch.equal(arrived[2], path(t)[2])  # delta = 0
    torch.testing.assert_close(arrived[1], data[1])  # all the way to t = 0
    # Two rotations, the velocity rotated along, are one.
    half_velocity = rotate(velocity, -path(t), delta / 2)
    torch.testing.assert_close(rotate(rotate(path(t), velocity, delta / 2), half_velocity, delta / 2), arrived)


def test_equivalent_noise_is_constant_along_forward_noising():
    data, noise = randn(2, 5, 2, 3, 3)
    t = torch.linspace(0.05, math.pi / 2, 5, dtype=torch.float64)
    sample = four_axes(t).cos() * data + four_axes(t).sin() * noise
    torch.testing.assert_close(equivalent_noise(sample, data, t), noise)


@pytest.mark.parametrize("shift", [1.0, 2.5])
@pytest.mark.parametrize("num_steps", [2, 16])
def test_reference_route_is_the_euler_schedulers(num_steps, shift):
    route = reference_route(num_steps, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas[:-1]
    assert route.shape == (num_steps,) and route.dtype == torch.float32
    assert route[0] == torch.tensor(math.pi / 2)
    torch.testing.assert_close(route.sin() / (route.sin() + route.cos()), sigmas)
    assert (route.diff() < 0).all()


def test_reference_route_has_the_published_numbers():
    route = reference_route(16)
    published = torch.tensor([1.5708, 1.5423, 1.5095, 0.1832, 0.0063])
    torch.testing.assert_close(route[[0, 1, 2, -2, -1]], published, rtol=0, atol=5e-5)


@pytest.mark.parametrize("scheme", SAMPLING_SCHEMES)
def test_sampled_timesteps_descend_from_half_pi(scheme):
    timesteps = sample_timesteps(scheme, 200, 16, generator=torch.Generator().manual_seed(0))
    assert timesteps.shape == (200, 16) and timesteps.dtype == torch.float32
    assert (timesteps[:, 0] == torch.tensor(math.pi / 2)).all()
    assert (timesteps.diff(dim=1) <= 0).all()
    assert (timesteps > 0).all()
    assert (timesteps[:, 1:].tan() > 0).all()  # below pi/2 as float32 sees it
    assert len(timesteps[:, 1:].unique()) > 2900  # a route of its own per prompt


def test_training_angles_stay_inside_the_open_interval(monkeypatch):
    # The extreme draws: 0 would give an infinite weight, and the float32 of pi/2 a negative one.
    for extreme in (0.0, 1.0):
        monkeypatch.setattr(
            torch, "rand", lambda *shape, value=extreme, **kwargs: torch.full(shape, value - 2**-24 * value)
        )
        timesteps = sample_timesteps("random", 1, 4)[:, 1:]
        weight = 1 / timesteps.tan()
        assert (timesteps > 0).all() and (weight > 0).all() and weight.isfinite().all()


def test_reference_scheme_draws_uniformly_once_in_every_partition():
    route = reference_route(8, 3.0)
    timesteps = sample_timesteps("reference", 4000, 8, shift=3.0, generator=torch.Generator().manual_seed(0))
    fraction = (timesteps[:, 1:] - route[1:]) / (route[:-1] - route[1:])
    assert (fraction > -1e-5).all() and (fraction < 1 + 1e-5).all()
    # Mean and deviation of 4000 uniform draws, at five standard errors.
    torch.testing.assert_close(fraction.mean(0), torch.full((7,), 0.5), rtol=0, atol=5 * 0.289 / 4000**0.5)
    torch.testing.assert_close(fraction.std(0), torch.full((7,), 12**-0.5), rtol=0, atol=5 * 0.13 / 4000**0.5)


def test_logit_normal_scheme_has_its_mean_and_deviation():
    for mean, std, sigma_data in ((0.2, 1.6, 0.5), (-0.4, 0.8, 1.0)):
        timesteps = sample_timesteps(
            "logit_normal",
            2000,
            6,
            logit_mean=mean,
            logit_std=std,
            sigma_data=sigma_data,
            generator=torch.Generator().manual_seed(0),
        )
        logits = (timesteps[:, 1:].double().tan() * sigma_data).log()
        # 10000 draws, five standard errors.
        assert logits.mean().item() == pytest.approx(mean, abs=5 * std / 100)
        assert logits.std().item() == pytest.approx(std, abs=5 * std / 141)


def test_random_scheme_is_uniform():
    timesteps = sample_timesteps("random", 2000, 6, generator=torch.Generator().manual_seed(0))[:, 1:]
    assert timesteps.mean().item() == pytest.approx(math.pi / 4, abs=5 * 0.4534 / 100)
    assert timesteps.std().item() == pytest.approx(math.pi / 2 / 12**0.5, abs=5 * 0.21 / 100)


@pytest.mark.parametrize("scheme", SAMPLING_SCHEMES)
def test_a_row_depends_on_its_own_generator_only(scheme):
    together = sample_timesteps(scheme, 3, 16, generator=generators(1, 2, 3))
    apart = torch.cat([sample_timesteps(scheme, 1, 16, generator=generators(seed)) for seed in (3, 1, 2)])
    assert torch.equal(together, apart[[1, 2, 0]])
    assert not torch.equal(together[0], together[1])


def test_wrong_sampling_arguments_are_named():
    with pytest.raises(ValueError, match=r"`scheme` is 'uniform'.*reference, logit_normal, random"):
        sample_timesteps("uniform", 1, 4)
    with pytest.raises(ValueError, match="`num_steps` is 1"):
        sample_timesteps("random", 1, 1)
    with pytest.raises(ValueError, match="`num_steps` is 0"):
        reference_route(0)
    with pytest.raises(ValueError, match=r"`shift` is -1\.0"):
        reference_route(4, shift=-1.0)
    with pytest.raises(ValueError, match="`generator` is a list of 2 generators for a batch of 3"):
        sample_timesteps("random", 3, 4, generator=generators(0, 1))


def record_gaussian(num_steps, noise):
    timesteps = torch.linspace(math.pi / 2, 0, num_steps + 1, dtype=torch.float64)[:-1].repeat(len(noise), 1)
    text = no_text(len(noise))
    return record_trajectory(gaussian_teacher(), noise, timesteps, text, text, torch.ones(len(noise)))


def test_recorded_trajectory_converges_to_the_closed_form_of_a_gaussian():
    noise = randn(2, 1, 3, 3)
    errors = []
    for num_steps in (50, 100, 200):
        recorded = record_gaussian(num_steps, noise)
        assert recorded.latents.shape == recorded.velocity.shape == (2, num_steps - 1, 1, 3, 3)
        assert recorded.timesteps.shape == (2, num_steps - 1)
        scale = gaussian_std(recorded.timesteps)[:, :, None, None, None]
        # x_t of the ODE, noise of standard deviation 1 being x_{pi/2} / SIGMA_DATA.
        exact = scale * noise[:, None]
        # The velocity belongs to the recorded sample: d log std / dt times it, without Eq. 5-7.
        t = recorded.timesteps[:, :, None, None, None]
        slope = t.sin() * t.cos() * (SIGMA_DATA**2 - DATA_STD**2) / scale**2
        torch.testing.assert_close(recorded.velocity, slope * recorded.latents)
        errors.append(
            (recorded.latents - exact).abs().max() + (recorded.pred_original_sample - DATA_STD * noise).abs().max()
        )
    # A first-order integrator: half the step, half the error.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.1)
    assert errors[2] < 0.02 * DATA_STD * noise.abs().max()


def test_first_rows_may_be_the_noise_with_the_velocity_there():
    noise, timesteps, text, negative, weight = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer())
    plain, recorded = (
        record_trajectory(teacher, noise, timesteps, text, negative, weight, noise_rows=rows) for rows in (0, 2)
    )
    for name in ("latents", "velocity", "timesteps"):
        own, points = getattr(recorded, name), getattr(plain, name)
        assert own.shape == points.shape and torch.equal(own[:, 2:], points[:, 2:])
        assert torch.equal(own[:, 0], own[:, 1]) and not torch.equal(own[:, 1], points[:, 1])
    assert torch.equal(recorded.latents[:, 0], SIGMA_DATA * noise)
    assert torch.equal(recorded.timesteps[:, 0], timesteps[:, 0])
    assert torch.equal(recorded.pred_original_sample, plain.pred_original_sample)
    first = rotate(recorded.latents[:, 0], recorded.velocity[:, 0], timesteps[:, 0] - timesteps[:, 1])
    torch.testing.assert_close(first, plain.latents[:, 0])


def test_last_rotation_reaches_the_clean_latent():
    recorded = record_gaussian(5, randn(2, 1, 3, 3))
    t = recorded.timesteps[:, -1]
    expected = rotate(recorded.latents[:, -1], recorded.velocity[:, -1], t)
    torch.testing.assert_close(recorded.pred_original_sample, expected)


def test_guided_trajectory_is_that_of_two_separate_calls():
    noise, timesteps, text, negative, weight = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer())
    calls = []
    hook = teacher.transformer.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    recorded = record_trajectory(teacher, noise, timesteps, text, negative, weight)
    hook.remove()
    assert calls == [4] * 4  # both branches of both prompts at once
    assert not recorded.velocity.requires_grad

    sample = SIGMA_DATA * noise
    latents, velocities = [], []
    with torch.no_grad():
        for i in range(4):
            t = timesteps[:, i]
            conditional = teacher(sample / SIGMA_DATA, t, text.embeds, text.mask)
            unconditional = teacher(
                sample / SIGMA_DATA, t, negative.embeds.expand(2, -1, -1), negative.mask.expand(2, -1)
            )
            velocity = SIGMA_DATA * (four_axes(weight) * conditional + (1 - four_axes(weight)) * unconditional)
            latents.append(sample)
            velocities.append(velocity)
            sample = rotate(sample, velocity, t - (timesteps[:, i + 1] if i < 3 else 0))
    tolerance = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order, amplified by weights up to 5
    torch.testing.assert_close(recorded.latents, torch.stack(latents[1:], 1), **tolerance)
    torch.testing.assert_close(recorded.velocity, torch.stack(velocities[1:], 1), **tolerance)
    torch.testing.assert_close(recorded.pred_original_sample, sample, **tolerance)
    assert torch.equal(recorded.timesteps, timesteps[:, 1:])
    assert recorded.text is text and torch.equal(recorded.guidance_scale, weight)


def test_masked_tokens_do_not_matter_and_others_do():
    noise, timesteps, text, negative, weight = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer())

    def generate(text, negative):
        return record_trajectory(teacher, noise, timesteps, text, negative, weight).pred_original_sample

    def noised(text, value):
        return Text(torch.where(text.mask[:, :, None] == 1, text.embeds, value), text.mask)

    def moved(text):
        return Text(text.embeds + 1, text.mask)

    expected = generate(text, negative)
    assert torch.equal(generate(noised(text, 7.0), noised(negative, -7.0)), expected)
    assert not torch.allclose(generate(moved(text), negative), expected, rtol=1e-3)
    assert not torch.allclose(generate(text, moved(negative)), expected, rtol=1e-3)


def test_teacher_that_embeds_guidance_is_called_once_with_it():
    noise, timesteps, text, _, weight = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer(guidance_embeds=True))
    recorded = record_trajectory(teacher, noise, timesteps, text, None, weight)
    with torch.no_grad():
        sample = recorded.latents[:, 1] / SIGMA_DATA
        expected = SIGMA_DATA * teacher(sample, timesteps[:, 2], text.embeds, text.mask, weight)
    torch.testing.assert_close(recorded.velocity[:, 1], expected)


def test_wrong_recording_arguments_are_named():
    noise, timesteps, text, negative, weight = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer())
    with pytest.raises(ValueError, match=r"`timesteps` has shape \(1, 4\)"):
        record_trajectory(teacher, noise, timesteps[:1], text, negative, weight)
    with pytest.raises(ValueError, match=r"`guidance_scale` has shape \(1,\)"):
        record_trajectory(teacher, noise, timesteps, text, negative, weight[:1])
    with pytest.raises(ValueError, match="`noise_rows` is 4, but it must be 0 to 3"):
        record_trajectory(teacher, noise, timesteps, text, negative, weight, noise_rows=4)
    with pytest.raises(ValueError, match="`negative_text` is None"):
        record_trajectory(teacher, noise, timesteps, text, None, weight)
