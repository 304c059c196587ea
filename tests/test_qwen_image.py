"""What is Qwen-Image's own beside what every family has: places, padding of prompts, guidance that keeps norms."""

import pytest
import torch
from families import FAMILIES

from diffusers_tbcm.flow import FlowTransformer
from diffusers_tbcm.text import Text
from diffusers_tbcm.training.memory import activation_bytes


if "qwen_image" not in FAMILIES:
    pytest.skip("this diffusers has no Qwen-Image that knows padding", allow_module_level=True)

from diffusers_tbcm.backbones.qwen_image import Places, load_transformer, rescale_guided


@pytest.fixture(scope="module")
def transformer():
    return FAMILIES["qwen_image"].make_pipeline().transformer


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (6, 1)])
def test_places_are_embedded_as_diffusers_does(size):
    embed = FAMILIES["qwen_image"].make_pipeline().transformer.pos_embed
    shapes, options = [[(1, *size)]] * 2, {"max_txt_seq_len": 7, "device": torch.device("cpu")}
    for found, expected in zip(Places(embed)(shapes, **options), embed(shapes, **options), strict=True):
        assert torch.equal(found, expected)


def test_places_of_tensors_without_data_are_not_kept(transformer):
    """diffusers' own module keeps them for the next call, whose tensors have data."""
    network, text = FlowTransformer(transformer), Text.unmasked(torch.randn(1, 5, 16))
    inputs = torch.randn(1, 16, 6, 10), torch.rand(1)
    assert activation_bytes(network, *inputs, **text.arguments()) > 0
    assert network(*inputs, **text.arguments()).isfinite().all()


def test_padding_is_not_seen(transformer):
    network, generator = FlowTransformer(transformer), torch.Generator().manual_seed(0)
    short, long = (Text.unmasked(torch.randn(1, length, 16, generator=generator)) for length in (5, 9))
    sample, s = torch.randn(1, 16, 8, 8, generator=generator), torch.tensor([0.6])
    padded = short.pad(9)
    padded.embeds[:, 5:] = long.embeds[:, 5:]  # whatever stands there
    with torch.no_grad():
        alone, beside = (network(sample, s, **text.arguments()) for text in (short, padded))
        seen = network(sample, s, padded.embeds)
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)  # sums of another length
    assert (seen - alone).norm() > 1e-3 * alone.norm()


def test_guidance_keeps_the_norm_of_every_token():
    """Of the 2 x 2 latent pixels that one is."""
    guided, conditional = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    found = rescale_guided(guided, conditional)

    def norms(latents):
        return latents.square().sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((-1, -2))

    torch.testing.assert_close(norms(found), norms(conditional))
    ratio = (found / guided).mean(1)
    torch.testing.assert_close(found / guided, ratio[:, None].expand_as(found))
    torch.testing.assert_close(ratio, ratio[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_a_network_of_layers_is_refused(transformer, tmp_path):
    transformer.save_pretrained(tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"use_layer3d_rope": false', '"use_layer3d_rope": true'))
    with pytest.raises(ValueError, match=r"draws pictures in layers \(`use_layer3d_rope`\)"):
        load_transformer(tmp_path)
