import math

import pytest
import torch
from gaussian_data import DATA_STD, gaussian_std, gaussian_teacher
from tiny import tiny_transformer
from toy_networks import SIGMA_DATA, cfg_arguments, four_axes, generators, no_text, randn

from diffusers_tbcm.diffusion import diffuse, diffusion_rows, sample_diffusion_timesteps
from diffusers_tbcm.guidance import guidance_branches, guided_output
from diffusers_tbcm.trigflow import TrigFlowTransformer


COUNT = 4000


def exponents(t, sigma_data=SIGMA_DATA):
    """The n of t = atan(exp(n) / sigma_data)."""
    return torch.log(sigma_data * torch.tan(t.double()))


@pytest.mark.parametrize(("mean", "std", "sigma_data"), [(0.2, 1.6, 0.5), (-0.6, 1.0, 1.0)])
def test_times_are_logit_normal(mean, std, sigma_data):
    generator = torch.Generator().manual_seed(0)
    t = sample_diffusion_timesteps(COUNT, logit_mean=mean, logit_std=std, sigma_data=sigma_data, generator=generator)
    assert t.shape == (COUNT,) and t.dtype == torch.float32 and (t > 0).all() and (t < math.pi / 2).all()
    n = exponents(t, sigma_data)
    # Four standard errors; the deviation's is std / sqrt(2 count).
    assert n.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(COUNT))
    assert n.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(2 * COUNT))


def test_the_largest_time_comes_with_its_probability():
    generator = torch.Generator().manual_seed(0)
    t = sample_diffusion_timesteps(COUNT, largest_probability=0.25, generator=generator)
    largest = t == torch.tensor(math.pi / 2)
    assert largest.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / COUNT))
    rest = exponents(t[~largest])
    assert rest.mean().item() == pytest.approx(0.2, abs=4 * 1.6 / math.sqrt(len(rest)))
    always = sample_diffusion_timesteps(5, largest_probability=1.0)
    assert torch.equal(always, torch.full((5,), math.pi / 2))
    with pytest.raises(ValueError, match=r"`largest_probability` is 1.5"):
        sample_diffusion_timesteps(5, largest_probability=1.5)


@pytest.mark.parametrize("largest_probability", [0.0, 0.5])
def test_a_rows_time_depends_on_its_own_generator_only(largest_probability):
    def sample(*seeds):
        return sample_diffusion_timesteps(
            len(seeds), largest_probability=largest_probability, generator=generators(*seeds)
        )

    together = sample(*range(20))
    assert torch.equal(together, torch.cat([sample(seed) for seed in range(20)]))
    assert len(together.unique()) > 5


def test_noising_keeps_the_variance_and_ends_at_noise():
    original, noise = SIGMA_DATA * randn(3, 1, 64, 64), randn(3, 1, 64, 64, seed=1)
    t = torch.tensor([0.0, 0.7, math.pi / 2], dtype=torch.float64)
    noised = diffuse(original, noise, t, SIGMA_DATA)
    torch.testing.assert_close(noised[0], original[0])
    torch.testing.assert_close(noised[1], math.cos(0.7) * original[1] + math.sin(0.7) * SIGMA_DATA * noise[1])
    torch.testing.assert_close(noised[2], SIGMA_DATA * noise[2])
    # Four standard errors of a standard deviation over 4096 elements.
    assert noised.std(dim=(1, 2, 3)).tolist() == pytest.approx([SIGMA_DATA] * 3, rel=4 / math.sqrt(2 * 4096))


def test_rows_of_gaussian_data_have_the_velocity_of_their_closed_form_ode():
    image_latents, noise = randn(2, 5, 3, 2, 2)
    t = torch.linspace(0.1, 1.5, 5, dtype=torch.float64)
    text, weight = no_text(5), torch.full((5,), 4.5)
    recording = diffusion_rows(gaussian_teacher(), image_latents, noise, t, text, text[:1], weight)
    assert recording.timesteps.shape == (5, 1)  # one place a row
    rows = recording.rows()
    original = SIGMA_DATA * image_latents
    torch.testing.assert_close(rows.pred_original_sample, original)
    torch.testing.assert_close(rows.latents, four_axes(t.cos()) * original + four_axes(t.sin()) * SIGMA_DATA * noise)
    # x_t is std(t) times a constant along the ODE: dx_t/dt = x_t d ln std / dt.
    slope = t.sin() * t.cos() * (SIGMA_DATA**2 - DATA_STD**2) / gaussian_std(t) ** 2
    torch.testing.assert_close(rows.velocity, four_axes(slope) * rows.latents)
    assert torch.equal(rows.timesteps, t) and torch.equal(rows.guidance_scale, weight)
    assert rows.text.mask.shape == (5, 1) and rows.text.mask.all()


def test_rows_have_the_guided_velocity_and_carry_their_prompts():
    noise, timesteps, text, negative, weight = cfg_arguments()
    image_latents, t = randn(*noise.shape, seed=7, dtype=torch.float32), timesteps[:, 1]
    for guidance_embeds in (False, True):
        teacher = TrigFlowTransformer(tiny_transformer(guidance_embeds=guidance_embeds))
        given = None if guidance_embeds else negative
        rows = diffusion_rows(teacher, image_latents, noise, t, text, given, weight).rows()
        branches = guidance_branches(teacher, text, given)
        with torch.no_grad():
            output = guided_output(teacher, rows.latents / SIGMA_DATA, t, branches, weight)
        assert torch.equal(rows.velocity, SIGMA_DATA * output) and not rows.velocity.requires_grad
        assert rows.text is text


def test_a_row_does_not_depend_on_the_rows_beside_it():
    noise, timesteps, text, negative, weight = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer())
    image_latents, t = randn(*noise.shape, seed=7, dtype=torch.float32), timesteps[:, 1]

    def make(chosen):
        return diffusion_rows(
            teacher, image_latents[chosen], noise[chosen], t[chosen], text[chosen], negative, weight[chosen]
        ).rows()

    both, last = make(slice(0, 2)), make(slice(1, 2))
    assert torch.equal(both.latents[1:], last.latents)
    torch.testing.assert_close(both.velocity[1:], last.velocity, rtol=1e-4, atol=1e-5)  # sums in another order


def test_rows_are_wide():
    noise, timesteps, text, negative, weight = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer().bfloat16())
    rows = diffusion_rows(teacher, noise.bfloat16(), noise.bfloat16(), timesteps[:, 1], text, negative, weight).rows()
    for value in (rows.latents, rows.velocity, rows.timesteps, rows.pred_original_sample):
        assert value.dtype == torch.float32


def test_wrong_arguments_are_named():
    noise, timesteps, text, negative, weight = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer())
    with pytest.raises(ValueError, match=r"`timesteps` has shape \(2, 4\), but it must be \(2,\)"):
        diffusion_rows(teacher, noise, noise, timesteps, text, negative, weight)
    with pytest.raises(ValueError, match=r"`guidance_scale` has shape \(1,\), but it must be \(2,\)"):
        diffusion_rows(teacher, noise, noise, timesteps[:, 1], text, negative, weight[:1])
