import math

import pytest
import torch
from gaussian_data import exact_gaussian_function, gaussian_teacher
from tiny import tiny_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy_networks import SIGMA_DATA, four_axes, network_inputs, no_text, randn, trig_student

from diffusers_tbcm.dual import Dual
from diffusers_tbcm.tangent import consistency_tangent, normalized_tangent, tangent_ratio
from diffusers_tbcm.text import Text
from diffusers_tbcm.trigflow import TrigFlowTransformer, consistency_output


def nonlinear_function(sample, t):
    return torch.sin(2 * sample + four_axes(t)) * four_axes(t) + sample.mean(dim=(1, 2, 3), keepdim=True) ** 2


def rows(count=6):
    """latents, velocity, timesteps, text and no guidance: analytic training rows."""
    t = torch.linspace(0.05, 1.5, count, dtype=torch.float64)
    latents, velocity = SIGMA_DATA * randn(2, count, 2, 3, 3)
    return latents, velocity, t, no_text(count), None


def unnormalized(output):
    return output.tangent * four_axes(output.norm + 0.1)


@pytest.mark.parametrize(
    ("step", "ratio"), [(0, 0), (1, 0.25), (4, 1), (10, 1), (12, 0.9375), (14, 0.875), (18, 0.75), (99, 0.75)]
)
def test_ratio_warms_up_and_cools_down(step, ratio):
    assert tangent_ratio(step, 4, 10, 8, 0.75) == ratio


def test_ratio_without_its_parts():
    assert [tangent_ratio(step, 4, None, 0, 1.0) for step in (0, 2, 4, 99)] == [0, 0.5, 1, 1]
    assert [tangent_ratio(step, 4, None, 0, 0.5) for step in (0, 2, 4, 99)] == [0, 0.25, 0.5, 0.5]
    assert [tangent_ratio(step, 0, 2, 0, 0.5) for step in (0, 1, 2, 3)] == [1, 1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 4, 10, 8, 0.75), "`step` is -1"),
        ((0, -4, 10, 8, 0.75), "`warmup_steps` is -4"),
        ((0, 4, 10, -8, 0.75), "`cooldown_steps` is -8"),
        ((0, 4, 10, 8, 1.5), r"`final_ratio` is 1\.5"),
        ((0, 4, 10, 8, -0.5), r"`final_ratio` is -0\.5"),
        ((0, 4, 3, 8, 0.75), "`cooldown_start_step` is 3"),
    ],
)
def test_wrong_ratio_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tangent_ratio(*arguments)


def test_jvp_of_a_sana_transformer_agrees_with_finite_differences():
    student = TrigFlowTransformer(tiny_transformer(guidance_embeds=True).double())
    sample, t, embeds, mask = network_inputs(dtype=torch.float64)
    direction, guidance = randn(*sample.shape, seed=7), torch.full((3,), 4.5)

    def evaluate(sample, t):
        return student(sample, t, embeds, mask, guidance)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(evaluate, (sample, t), (direction, torch.ones_like(t)))
        at = [evaluate(sample + h * direction, t + h) for h in (-2e-3, -1e-3, 1e-3, 2e-3)]
    # Five-point stencil, so that its own error stays below that of the float32 upcasts inside the model (1e-7 / 1e-3).
    difference = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / 12e-3
    assert (derivative - difference).norm() < 5e-4 * derivative.norm()


def test_tangent_is_cos_t_times_the_total_derivative_of_the_consistency_function():
    latents, velocity, t, text, guidance = rows()
    student = trig_student(nonlinear_function)
    output = consistency_tangent(student, latents, velocity, t, text, guidance, ratio=1.0)

    def consistency(h):
        moved = latents + h * velocity
        return consistency_output(moved, nonlinear_function(moved / SIGMA_DATA, t + h), t + h, SIGMA_DATA)

    derivative = (consistency(1e-5) - consistency(-1e-5)) / 2e-5
    torch.testing.assert_close(unnormalized(output), four_axes(t).cos() * derivative, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(output.trig_output, nonlinear_function(latents / SIGMA_DATA, t))


def test_ratio_scales_the_second_term_only():
    latents, velocity, t, text, guidance = rows()
    student = trig_student(nonlinear_function)
    none, some, full = (
        unnormalized(consistency_tangent(student, latents, velocity, t, text, guidance, ratio=ratio))
        for ratio in (0.0, 0.75, 1.0)
    )
    first = -(four_axes(t).cos() ** 2) * (SIGMA_DATA * nonlinear_function(latents / SIGMA_DATA, t) - velocity)
    torch.testing.assert_close(none, first)
    torch.testing.assert_close(some, first + 0.75 * (full - first))


def test_tangent_is_normalized_per_sample():
    latents, velocity, t, text, guidance = rows()
    student = trig_student(nonlinear_function)
    arguments = (student, latents, velocity, t, text, guidance)
    plain = consistency_tangent(*arguments, ratio=1.0)
    invariant = consistency_tangent(*arguments, ratio=1.0, resolution_invariant=True)
    torch.testing.assert_close(plain.tangent.flatten(1).norm(dim=1), plain.norm / (plain.norm + 0.1))
    torch.testing.assert_close(plain.norm, unnormalized(plain).flatten(1).norm(dim=1))
    torch.testing.assert_close(invariant.norm, plain.norm / math.sqrt(2 * 3 * 3))
    torch.testing.assert_close(unnormalized(invariant), unnormalized(plain))


@pytest.mark.parametrize("shape", [(4,), (3, 2), (2, 3, 2, 2)])
def test_rows_of_any_number_of_axes_are_normalized_alike(shape):
    """A row is its elements, however they are arranged: points of the plane, pictures, videos."""
    output, derivative, latents, velocity = randn(4, 5, math.prod(shape))
    t = torch.linspace(0.05, 1.5, 5, dtype=torch.float64)
    for invariant in (False, True):
        found, expected = (
            normalized_tangent(
                Dual(*(value.view(5, *axes) for value in (output, derivative))),
                *(value.view(5, *axes) for value in (latents, velocity)),
                t,
                ratio=0.9,
                resolution_invariant=invariant,
            )
            for axes in (shape, (math.prod(shape), 1, 1))
        )
        torch.testing.assert_close(found.norm, expected.norm)
        torch.testing.assert_close(found.tangent.flatten(1), expected.tangent.flatten(1))


def test_the_norm_of_pictures_is_over_their_three_axes_bit_for_bit():
    latents, velocity, derivative = randn(3, 6, 4, 8, 8, dtype=torch.float32)
    t = torch.linspace(0.05, 1.5, 6)
    found = normalized_tangent(Dual(latents, derivative), latents, velocity, t, ratio=0.0)
    tangent = -(four_axes(t.cos()) ** 2) * (SIGMA_DATA * latents - velocity)
    assert torch.equal(found.norm, torch.linalg.vector_norm(tangent, dim=(1, 2, 3)))


def test_exact_student_has_zero_tangent():
    latents, _, t, text, guidance = rows()
    velocity = SIGMA_DATA * gaussian_teacher()(latents / SIGMA_DATA, t, text.embeds)
    exact = consistency_tangent(trig_student(exact_gaussian_function), latents, velocity, t, text, guidance, ratio=1.0)
    assert exact.norm.max() < 1e-12
    # The teacher itself is not its own consistency function.
    assert consistency_tangent(gaussian_teacher(), latents, velocity, t, text, guidance, ratio=1.0).norm.min() > 1e-3


def sana_rows():
    sample, t, embeds, mask = network_inputs()
    velocity = SIGMA_DATA * randn(*sample.shape, seed=3, dtype=torch.float32)
    return SIGMA_DATA * sample, velocity, t, Text(embeds, mask)


def test_guidance_reaches_the_student():
    arguments = sana_rows()
    student = TrigFlowTransformer(tiny_transformer(guidance_embeds=True))
    one, five = (
        consistency_tangent(student, *arguments, torch.full((3,), scale), ratio=1.0).tangent for scale in (1.0, 5.0)
    )
    assert not torch.allclose(one, five, rtol=1e-3)


def test_masked_tokens_do_not_reach_the_tangent():
    latents, velocity, t, text = sana_rows()
    student = TrigFlowTransformer(tiny_transformer())
    clean, noised = (
        consistency_tangent(student, latents, velocity, t, Text(embeds, text.mask), None, ratio=1.0).tangent
        for embeds in (text.embeds, torch.where(text.mask[:, :, None] == 1, text.embeds, 7.0))
    )
    assert torch.equal(clean, noised)


def test_tangent_under_autocast_stays_close_and_wide():
    arguments = sana_rows()
    student = TrigFlowTransformer(tiny_transformer(guidance_embeds=True))

    def tangent():
        return consistency_tangent(student, *arguments, torch.full((3,), 4.5), ratio=1.0)

    full = tangent()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tangent()
    assert mixed.tangent.dtype == mixed.trig_output.dtype == mixed.norm.dtype == torch.float32
    difference = (mixed.tangent - full.tangent).flatten(1).norm(dim=1)
    # bfloat16 keeps 8 bits: 4e-3 a rounding, a few of them in a row. Zero would mean that autocast did nothing.
    assert (difference > 1e-5).all() and (difference < 3e-2 * full.tangent.flatten(1).norm(dim=1)).all()


def test_tangent_leaves_no_graph_and_works_with_gradient_checkpointing():
    arguments = sana_rows()
    transformer = tiny_transformer()
    plain = consistency_tangent(TrigFlowTransformer(transformer), *arguments, None, ratio=1.0)
    transformer.enable_gradient_checkpointing()
    checkpointed = consistency_tangent(TrigFlowTransformer(transformer.train()), *arguments, None, ratio=1.0)
    assert torch.equal(plain.tangent, checkpointed.tangent)
    assert not plain.tangent.requires_grad and not plain.trig_output.requires_grad
