"""What Z-Image alone has: places for so many tokens, and prompts that are as long as they are."""

import pytest
import torch
from families import FAMILIES

from diffusers_tbcm.text import Text


if "z_image" not in FAMILIES:
    pytest.skip("Z-Image is taken from diffusers 0.38 on", allow_module_level=True)

from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from families import tiny_z_image

from diffusers_tbcm.backbones import z_image


@pytest.fixture(scope="module")
def transformer():
    return tiny_z_image().transformer.requires_grad_(False)


def velocity(transformer, text, size=8):
    sample = torch.randn(len(text), 16, size, size, generator=torch.Generator().manual_seed(0))
    return z_image.velocity(transformer, sample, torch.full((len(text),), 0.3), text, None)


def embeds(length, seed=0):
    return Text.unmasked(torch.randn(1, length, 16, generator=torch.Generator().manual_seed(seed)))


def test_prompts_of_several_lengths_are_in_a_batch_what_they_are_alone(transformer):
    texts = [embeds(5), embeds(40, seed=1)]
    sample = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.3, 0.8])
    together = z_image.velocity(transformer, sample, time, Text.cat(texts), None)
    for row, text in enumerate(texts):
        alone = z_image.velocity(transformer, sample[row : row + 1], time[row : row + 1], text, None)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_as_many_tokens_are_read_as_the_network_has_places_for(transformer, tmp_path):
    transformer.save_pretrained(tmp_path / "transformer")
    assert z_image.prompt_tokens(tmp_path, 96) == 96
    assert velocity(transformer, embeds(96)).isfinite().all()
    for asked, found in ((97, 97), (None, 512)):
        with pytest.raises(ValueError, match=f"`max_sequence_length` is {found}: this teacher reads 96 tokens"):
            z_image.prompt_tokens(tmp_path, asked)
    with pytest.raises(IndexError):
        velocity(transformer, embeds(97))
    tiny_z_image(axes_lens=[1024, 16, 16]).transformer.save_pretrained(tmp_path / "transformer")  # as published
    assert z_image.prompt_tokens(tmp_path, None) == 512


def test_a_picture_has_as_many_tokens_as_the_network_has_places_for(transformer, tmp_path):
    tiny_z_image().vae.save_pretrained(tmp_path / "vae")
    assert z_image.latent_shape(tmp_path, transformer, 256) == (16, 32, 32)
    assert velocity(transformer, embeds(5), size=32).isfinite().all()
    with pytest.raises(ValueError, match=r"`resolution` is 272: .* 256 at most"):
        z_image.latent_shape(tmp_path, transformer, 272)
    with pytest.raises(IndexError):
        velocity(transformer, embeds(5), size=34)


def test_the_sinusoids_are_the_networks_own(transformer):
    time = 1000 * torch.rand(50, generator=torch.Generator().manual_seed(0))
    expected = TimestepEmbedder.timestep_embedding(time, transformer.t_embedder.frequency_embedding_size)
    torch.testing.assert_close(z_image.sinusoids(transformer)(time), expected, rtol=0, atol=1e-4)  # 1000 is rounded
