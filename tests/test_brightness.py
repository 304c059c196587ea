import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LATENT_CHANNELS, tiny_vae, write_tiny_pipeline
from toy_networks import generators, randn

from diffusers_tbcm.backbones import sana
from diffusers_tbcm.brightness import black_latent, cached_black_latent, keep_mask


BLACK = torch.linspace(-1, 1, 12).view(1, 3, 2, 2)


def at_distance(mse, sigma_data=0.5):
    """Latents whose mean squared distance from black, on unit scale, is `mse`, one prompt per value."""
    sign = randn(len(mse), 3, 2, 2, dtype=torch.float32).sign()
    return sigma_data * (BLACK + sign * torch.tensor(mse).sqrt().view(-1, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_black_latent_is_the_scaled_code_of_black(dtype):
    vae = tiny_vae().to(dtype)
    latent = black_latent(vae, 64, 32, backbone=sana)
    assert latent.shape == (1, LATENT_CHANNELS, 8, 4) and latent.dtype == torch.float32 and not latent.requires_grad
    code = vae.encode(-torch.ones(1, 3, 64, 32, dtype=dtype)).latent
    torch.testing.assert_close(latent, vae.config.scaling_factor * code.float())


def test_the_cached_black_latent_is_that_of_this_autoencoder_and_size(tmp_path):
    teacher, cache = write_tiny_pipeline(tmp_path / "teacher"), tmp_path / "black.safetensors"
    first = cached_black_latent(teacher, 64, cache)
    assert torch.equal(first, black_latent(tiny_vae(), 64, 64, backbone=sana))
    written = cache.stat().st_mtime_ns
    assert torch.equal(cached_black_latent(teacher, 64, cache), first) and cache.stat().st_mtime_ns == written
    assert cached_black_latent(teacher, 32, cache).shape == (1, LATENT_CHANNELS, 4, 4)
    config = teacher / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.41407", "0.5"))
    torch.testing.assert_close(cached_black_latent(teacher, 64, cache), first / 0.41407 * 0.5)
    for broken in (b"", b"torn", cache.read_bytes()[:-1]):
        cache.write_bytes(broken)
        torch.testing.assert_close(cached_black_latent(teacher, 64, cache), first / 0.41407 * 0.5)
    save_file({"black_latent": first}, cache)  # as written before it said what it is of
    torch.testing.assert_close(cached_black_latent(teacher, 64, cache), first / 0.41407 * 0.5)
    path = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name in weights:
        if name.startswith("encoder.conv_out"):
            weights[name].fill_(3e38)  # finite, and too large
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the vae gives NaN or infinity for a black picture"):
        cached_black_latent(teacher, 64, cache)


def test_hard_rule_drops_everything_below_the_threshold():
    for sigma_data in (0.5, 1.0):
        latents = at_distance([0.0, 0.69, 0.71, 5.0], sigma_data)
        keep = keep_mask(latents, BLACK, 0.7, sigma_data=sigma_data, hard=True)
        assert keep.dtype == torch.bool and keep.tolist() == [False, False, True, True]


def test_a_prompt_is_kept_with_probability_mse_over_threshold():
    count = 10_000
    latents = at_distance([0.0, 0.5, 1.5, 2.0, 9.0]).repeat(count, 1, 1, 1)
    keep = keep_mask(latents, BLACK, 2.0, generator=torch.Generator().manual_seed(0)).view(count, 5).float().mean(0)
    assert keep[0] == 0 and keep[4] == 1
    # Four standard errors of a proportion; at the threshold itself rounding decides.
    assert keep[1].item() == pytest.approx(0.25, abs=4 * 0.433 / 100)
    assert keep[2].item() == pytest.approx(0.75, abs=4 * 0.433 / 100)
    assert keep[3] > 0.999


@pytest.mark.parametrize("hard", [False, True])
def test_zero_threshold_keeps_all(hard):
    latents = at_distance([0.0, 1e-6, 1.0])
    assert keep_mask(latents, BLACK, 0.0, hard=hard).all()


@pytest.mark.parametrize("hard", [False, True])
def test_a_broken_latent_is_dropped(hard):
    latents = at_distance([9.0, 9.0])
    latents[1, 0, 0, 0] = torch.nan
    assert keep_mask(latents, BLACK, 1.0, hard=hard).tolist() == [True, False]


def test_a_prompts_fate_depends_on_its_own_generator_only():
    latents = at_distance([0.5] * 30)

    together = keep_mask(latents, BLACK, 1.0, generator=generators(*range(30)))
    backwards = keep_mask(latents, BLACK, 1.0, generator=generators(*reversed(range(30))))
    assert 0 < together.sum() < 30
    assert torch.equal(together, backwards.flip(0))
    alone = [keep_mask(latents[:1], BLACK, 1.0, generator=generators(seed)).item() for seed in range(30)]
    assert together.tolist() == alone


def test_wrong_arguments_are_named():
    latents = at_distance([1.0, 1.0])
    with pytest.raises(ValueError, match=r"`threshold` is -1\.0"):
        keep_mask(latents, BLACK, -1.0)
    with pytest.raises(ValueError, match="`generator` is a list of 1 generators for a batch of 2"):
        keep_mask(latents, BLACK, 1.0, generator=[torch.Generator()])
