"""The fit of an embedding in dense time, the trajectories it is aligned on, and what is measured of it."""

import math

import pytest
import torch
from diffusers import SanaPipeline
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from tiny import LATENT_CHANNELS, SAMPLE_SIZE, TEXT_HIDDEN_SIZE, tiny_transformer, write_plain_pipeline

from diffusers_tbcm import dense_time
from diffusers_tbcm.backbones.sana import TIME_EMBEDDER, embed_time, modulation, timestep_scale
from diffusers_tbcm.dense_time import (
    FIT_POINTS,
    FITTED_UNITS,
    LARGEST_SLOPES,
    NEARLY,
    alignment_loss,
    branch_inputs,
    branch_velocities,
    compare_embeddings,
    fit_embedder,
    record_branches,
    relative_error,
    ridge_regression,
    time_response,
    to_dense_time,
    without_biases,
)
from diffusers_tbcm.flow import FlowTransformer
from diffusers_tbcm.text import Text


TIMES = torch.linspace(0, 1, FIT_POINTS, dtype=torch.float64)
FEATURES = get_timestep_embedding(TIMES, 256, flip_sin_to_cos=True, downscale_freq_shift=0).double()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return SanaPipeline.from_pretrained(write_plain_pipeline(tmp_path_factory.mktemp("plain")))


@pytest.fixture
def teacher(pipeline):
    return FlowTransformer(pipeline.transformer.requires_grad_(False), 1000.0)


def smooth(s):
    """Three components of different widths, as an embedding of time may have."""
    return torch.stack([torch.exp(-8 * s), torch.tanh(12 * (s - 0.4)), torch.sin(7 * s)], dim=1)


def texts(generator, count=2):
    embeds = torch.randn(count + 1, 3, TEXT_HIDDEN_SIZE, generator=generator)
    text = Text.unmasked(embeds)
    return text[:count], text[count:]


def recorded(teacher, steps=4, count=2):
    generator = torch.Generator().manual_seed(0)
    text, negative = texts(generator, count)
    noise = torch.randn(count, LATENT_CHANNELS, SAMPLE_SIZE, SAMPLE_SIZE, generator=generator)
    sigmas = torch.linspace(1, 0, steps + 1)[:-1].repeat(count, 1)
    return record_branches(teacher, noise, sigmas, text, negative, torch.tensor([4.5, 2.0])[:count]), negative


def test_ridge_regression_is_the_minimum_of_its_objective():
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    weight, offset = (part.requires_grad_() for part in ridge_regression(inputs, outputs))
    strength = dense_time.RIDGE * (inputs - inputs.mean(0)).square().sum(0).mean()
    loss = (inputs @ weight + offset - outputs).square().sum() + strength * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, offset)):
        assert gradient.abs().max() < 1e-10


def test_no_weight_of_the_outputs_changes_the_least_squares(monkeypatch):
    """So that of the modulation layer changes nothing, but for the ridge."""
    monkeypatch.setattr(dense_time, "RIDGE", 0.0)
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    modulating = torch.randn(3, 18, generator=generator, dtype=torch.float64)
    weight, offset = ridge_regression(inputs, outputs)
    weight.requires_grad_()
    loss = ((inputs @ weight + offset - outputs) @ modulating).square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-9


@pytest.mark.parametrize("units", [64, 256])
def test_an_embedder_of_s_is_fitted_to_a_smooth_function(units):
    weights = fit_embedder(smooth(TIMES), FEATURES, TIMES, units)
    embedder = TimestepEmbedding(256, units, out_dim=3).double().requires_grad_(False)
    embedder.load_state_dict(weights)
    assert relative_error(embedder(FEATURES), smooth(TIMES)) < 2e-3
    between = (TIMES[1:] + TIMES[:-1]) / 2  # times that the fit has not seen
    features = get_timestep_embedding(between, 256, flip_sin_to_cos=True, downscale_freq_shift=0).double()
    assert relative_error(embedder(features), smooth(between)) < 2e-3

    before = embedder.linear_1(FEATURES)  # a_k (s - c_k)
    assert not before[:, FITTED_UNITS:].any() and not embedder.linear_2.weight[:, FITTED_UNITS:].any()
    before = before[:, :FITTED_UNITS]
    slopes = (before[-1] - before[0]).abs()
    assert slopes.min() == pytest.approx(1, abs=1e-3)
    assert any(slopes.max() == pytest.approx(slope, rel=1e-3) for slope in LARGEST_SLOPES[1:])  # it is no gentle one
    straight = before[0] + (before[-1] - before[0]) * TIMES[:, None]
    assert (before - straight).abs().max() < 1e-3


def test_an_embedder_without_biases_is_the_same_function():
    weights = fit_embedder(smooth(TIMES), FEATURES, TIMES, 64)
    biased, plain = (
        TimestepEmbedding(256, units, out_dim=3, sample_proj_bias=bias).double().requires_grad_(False)
        for units, bias in ((64, True), (65, False))
    )
    biased.load_state_dict(weights)
    plain.load_state_dict(without_biases(weights, FEATURES))
    assert biased.linear_1.bias.abs().min() > 1e-3 and biased.linear_2.bias.any()
    assert relative_error(plain(FEATURES), biased(FEATURES)) < 1e-4  # by the ridge


def test_what_jitters_between_neighbouring_times_is_left_out():
    jitter = 0.05 * torch.sin(700 * TIMES + 1)[:, None]
    embedder = TimestepEmbedding(256, 256, out_dim=3).double().requires_grad_(False)
    embedder.load_state_dict(fit_embedder(smooth(TIMES) + jitter, FEATURES, TIMES, 256))
    fitted = embedder(FEATURES)
    left = relative_error(smooth(TIMES), smooth(TIMES) + jitter)
    # The jitter is what is left, and for gentle slopes nearly that much more
    assert relative_error(fitted, smooth(TIMES) + jitter) == pytest.approx(left, rel=NEARLY - 1)
    assert relative_error(fitted, smooth(TIMES)) < math.sqrt(NEARLY**2 - 1) * left


def test_a_prepared_network_is_the_teachers_but_for_the_embedder(teacher):
    before = {name: value.clone() for name, value in teacher.transformer.state_dict().items()}
    prepared = to_dense_time(teacher)
    own = {name for name, part in prepared.transformer.named_parameters() if name.startswith(TIME_EMBEDDER)}
    assert len(own) == 4
    theirs = dict(teacher.transformer.named_parameters())
    assert {name for name, part in prepared.transformer.named_parameters() if part is not theirs[name]} == own
    assert all(torch.equal(before[name], value) for name, value in teacher.transformer.state_dict().items())
    assert timestep_scale(prepared.transformer) == prepared.timestep_scale == 1.0
    assert prepared.transformer.config.timestep_scale == 0.001 != teacher.transformer.config.timestep_scale


def test_the_fit_is_close_and_less_steep_and_says_so(teacher):
    prepared = to_dense_time(teacher)
    fit = compare_embeddings(teacher, prepared)
    assert fit.residual < 0.05 and fit.modulation_residual < 0.05 and fit.slope_after < 0.4 * fit.slope_before

    times = torch.linspace(0, 1, FIT_POINTS)
    old = embed_time(teacher.transformer, 1000 * times, None)
    new = embed_time(prepared.transformer, times, None)
    assert fit.residual == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-4)
    modulated = [modulation(teacher.transformer, value) for value in (new, old)]
    stock = teacher.transformer.time_embed(1000 * times, hidden_dtype=torch.float32)[0]
    torch.testing.assert_close(modulated[1], stock)
    assert fit.modulation_residual == pytest.approx(relative_error(*modulated), rel=1e-4)
    step = times[1] - times[0]
    slope = (new[2:] - new[:-2]).norm(dim=1) / (2 * step) / new[1:-1].norm(dim=1)
    assert fit.slope_after == pytest.approx(slope.median().item(), rel=1e-2)  # central differences in float32


def test_a_trajectory_is_the_stock_pipelines(pipeline, teacher):
    generator = torch.Generator().manual_seed(1)
    text, negative = texts(generator, 1)
    noise = torch.randn(1, LATENT_CHANNELS, SAMPLE_SIZE, SAMPLE_SIZE, generator=generator)
    latents = pipeline(
        prompt_embeds=text.embeds, prompt_attention_mask=text.mask, negative_prompt_embeds=negative.embeds,
        negative_prompt=None, negative_prompt_attention_mask=negative.mask, latents=noise,
        num_inference_steps=5, guidance_scale=4.5, height=64, width=64, use_resolution_binning=False,
        output_type="latent",
    ).images  # fmt: skip
    sigmas = pipeline.scheduler.sigmas[:-1][None]
    recording = record_branches(teacher, noise, sigmas, text, negative, torch.tensor([4.5]))
    torch.testing.assert_close(recording.pred_original_sample, latents, rtol=1e-4, atol=1e-4)
    assert recording.latents.shape == (1, 5, LATENT_CHANNELS, SAMPLE_SIZE, SAMPLE_SIZE)
    assert torch.equal(recording.latents[:, 0], noise)


def test_rows_carry_both_branches_in_the_order_of_what_a_network_sees(teacher):
    recording, negative = recorded(teacher)
    rows = recording.rows()
    sample, s, text = branch_inputs(rows, negative)
    assert len(text) == 4 and len(sample) == len(s) == 16
    torch.testing.assert_close(text.embeds[:2], negative.embeds.expand(2, -1, -1))
    velocity = teacher(sample, s, **text.arguments())
    # The same numbers in batches of another size
    torch.testing.assert_close(velocity, branch_velocities(rows), rtol=1e-4, atol=1e-5)
    assert alignment_loss(velocity, rows) < 1e-8
    swapped = velocity.roll(8, 0)
    assert alignment_loss(swapped, rows) == pytest.approx((swapped - velocity).square().mean().item(), rel=1e-3)
    assert alignment_loss(swapped, rows) > 1e-6


def test_the_answer_to_time_is_the_derivative():
    torch.manual_seed(0)
    network = FlowTransformer(tiny_transformer(timestep_scale=0.001).double().requires_grad_(False))
    recording, negative = recorded(network)
    rows = recording.rows()
    rows.latents, rows.timesteps = rows.latents.double(), rows.timesteps.double()
    sample, s, text = branch_inputs(rows, negative)
    step = 1e-4  # diffusers computes its sinusoids in float32
    ahead, behind, here = (network(sample, s + delta, **text.arguments()) for delta in (step, -step, 0))
    expected = ((ahead - behind) / (2 * step)).flatten(1).norm(dim=1) / here.flatten(1).norm(dim=1)
    torch.testing.assert_close(time_response(network, rows, negative), expected, rtol=1e-2, atol=1e-3)


def test_a_prepared_network_answers_to_time_smoothly(teacher):
    recording, negative = recorded(teacher)
    rows, prepared = recording.rows(), to_dense_time(teacher)
    sample, s, text = branch_inputs(rows, negative)
    assert relative_error(prepared(sample, s, **text.arguments()), branch_velocities(rows)) < 0.1
    before, after = (time_response(network, rows, negative).median() for network in (teacher, prepared))
    assert math.isfinite(after) and after < 0.5 * before
