import pytest
import torch
from tiny import tiny_transformer
from toy_networks import network_inputs, randn

from diffusers_tbcm.backbones.sana_attention import deal_out, keep_text, make_ready
from diffusers_tbcm.text import Text
from diffusers_tbcm.trajectory import record_trajectory, sample_timesteps
from diffusers_tbcm.trigflow import TrigFlowTransformer


def key_inputs(transformer):
    """The shapes of what the first block's key projection sees, call by call."""
    shapes = []
    transformer.transformer_blocks[0].attn2.to_k.register_forward_pre_hook(
        lambda module, arguments: shapes.append(tuple(arguments[0].shape))
    )
    return shapes


def test_a_prompt_a_row_is_what_diffusers_computes():
    sample, t, embeds, mask = network_inputs()
    transformer = tiny_transformer()
    stock = transformer(sample, embeds, t, encoder_attention_mask=mask, return_dict=False)[0]
    unmasked = transformer(sample, embeds, t, return_dict=False)[0]
    make_ready(transformer)
    torch.testing.assert_close(
        transformer(sample, embeds, t, encoder_attention_mask=mask, return_dict=False)[0], stock
    )
    torch.testing.assert_close(transformer(sample, embeds, t, return_dict=False)[0], unmasked)
    assert not torch.allclose(stock, unmasked)


@pytest.mark.parametrize("rows_per_prompt", [2, 3, 4, 5])  # the six tokens of a prompt divide by some
def test_rows_that_share_a_prompt_are_rows_with_a_prompt_each(rows_per_prompt):
    _, _, embeds, mask = network_inputs(2, torch.float64)
    mask[1, 3:] = 0
    rows = 2 * rows_per_prompt
    sample, t = randn(rows, 4, 8, 8), torch.linspace(0.1, 1.5, rows, dtype=torch.float64)
    transformer = tiny_transformer().double()
    network = TrigFlowTransformer(transformer)
    weights = list(transformer.parameters())
    shapes = key_inputs(transformer)
    outputs, gradients = [], []
    for repeats in (1, rows_per_prompt):
        text = (value.repeat_interleave(repeats, dim=0) for value in (embeds, mask))
        outputs.append(network(sample, t, *text))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), weights))
    tokens = 6 + -6 % rows_per_prompt
    assert shapes == [(2 * tokens, 16), (rows * 6, 16)]
    torch.testing.assert_close(*outputs)
    for shared, repeated in zip(*gradients, strict=True):  # the linear attention upcasts to float32, inside
        assert (shared - repeated).norm() <= 1e-5 * repeated.norm()


def test_rows_that_do_not_divide_among_the_prompts_are_refused():
    with pytest.raises(ValueError, match="2 prompts for 5 rows"):
        deal_out(torch.zeros(2, 3, 4), torch.ones(2, 3), 5)


def test_a_teachers_text_is_computed_once_for_its_trajectory():
    _, _, embeds, mask = network_inputs()
    transformer = tiny_transformer()
    shapes, projected = key_inputs(transformer), []
    transformer.caption_projection.register_forward_pre_hook(
        lambda _, arguments: projected.append(arguments[0].shape[1])
    )
    teacher = TrigFlowTransformer(transformer)
    timesteps = sample_timesteps("reference", 3, 5, generator=torch.Generator().manual_seed(0))
    text, negative = Text(embeds, mask), Text.unmasked(embeds[:1, :2])
    noise = randn(3, 4, 8, 8, dtype=torch.float32)
    trajectory = record_trajectory(teacher, noise, timesteps, text, negative, torch.full((3,), 4.5))
    assert shapes == [(6 * 6, 16)] and projected == [6, 1, 1, 1, 1]
    t = trajectory.timesteps[:, -1]
    both = teacher(
        (trajectory.latents[:, -1] / 0.5).repeat(2, 1, 1, 1), t.repeat(2),
        torch.cat([torch.nn.functional.pad(embeds[:1, :2], (0, 0, 0, 4)).expand(3, -1, -1), embeds]),
        torch.cat([torch.tensor([[1, 1, 0, 0, 0, 0]]).expand(3, -1), mask]),
    )  # fmt: skip
    unconditional, conditional = both.chunk(2)
    expected = 0.5 * (unconditional + 4.5 * (conditional - unconditional))
    torch.testing.assert_close(trajectory.velocity[:, -1], expected)
    assert len(shapes) == 2  # nothing was kept for the call after


def test_what_is_kept_goes_when_a_call_fails():
    transformer = tiny_transformer()
    with pytest.raises(RuntimeError), keep_text(transformer):
        TrigFlowTransformer(transformer)(*network_inputs())
        raise RuntimeError
    assert all(processor.key_value is None and not processor.keeps_text for processor in make_ready(transformer))
