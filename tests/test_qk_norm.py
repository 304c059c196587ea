"""Norms of queries and keys that are given to a network without: their least squares, and what is exact."""

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.normalization import RMSNorm
from tiny import LATENT_CHANNELS, SAMPLE_SIZE, TEXT_HIDDEN_SIZE, tiny_transformer

from diffusers_tbcm.dense_time import branch_inputs, relative_error
from diffusers_tbcm.flow import FlowTransformer
from diffusers_tbcm.lora import adapt
from diffusers_tbcm.qk_norm import EPS, QK_NORM, fit_norms, train_norms, with_qk_norm
from diffusers_tbcm.rows import TrainingRows
from diffusers_tbcm.text import Text


LENGTHS = (5, 2)  # tokens of the prompts; 3 of the negative one


@pytest.fixture
def network():
    return FlowTransformer(tiny_transformer(qk_norm=None, timestep_scale=0.001).requires_grad_(False))


def rows_and_negative(places=3):
    """Rows of two prompts, one of them with padding that is no small number."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, max(LENGTHS), TEXT_HIDDEN_SIZE, generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    embeds[~mask] = 100.0
    shape = (2 * places, LATENT_CHANNELS, SAMPLE_SIZE, SAMPLE_SIZE)
    latents = torch.randn(shape, generator=generator)
    rows = TrainingRows(
        latents=latents,
        velocity=torch.zeros(len(latents), 2, *shape[1:]),
        timesteps=torch.rand(len(latents), generator=generator),
        pred_original_sample=latents,
        text=Text(embeds, mask.to(embeds.dtype)),
        guidance_scale=torch.ones(len(latents)),
    )
    return rows, Text.unmasked(torch.randn(1, 3, TEXT_HIDDEN_SIZE, generator=generator))


def projected(network, rows, negative):
    """Queries and keys, (tokens, channels), row by row from texts without padding, by the names of norms' weights."""
    found = {}
    for number in range(len(rows)):
        prompt = number // (len(rows) // 2)
        own = Text.unmasked(rows.text.embeds[prompt : prompt + 1, : LENGTHS[prompt]])
        for text in (negative, own):
            hooks = [
                part.register_forward_hook(
                    lambda _, args, values, name=name: found.setdefault(name, []).append(values.reshape(-1, 16))
                )
                for name, part in network.transformer.named_modules()
                if name.endswith(("to_q", "to_k"))
            ]
            network(rows.latents[number][None], rows.timesteps[number][None], **text.arguments())
            for hook in hooks:
                hook.remove()
    return {f"{name.replace('to_', 'norm_')}.weight": torch.cat(parts).double() for name, parts in found.items()}


def test_weights_are_the_least_squares_of_all_tokens_but_padding(network):
    rows, negative = rows_and_negative()
    weights = fit_norms(network, [rows], negative)
    for name, values in projected(network, rows, negative).items():
        if name.endswith("attn1.norm_q.weight"):
            assert weights[name].eq(1).all()
            continue
        weight = weights[name].double().requires_grad_()
        normalised = weight * values / (values.square().mean(1, keepdim=True) + EPS).sqrt()
        if "attn1" in name:  # linear attention
            normalised, values = normalised.relu(), values.relu()
        (gradient,) = torch.autograd.grad((normalised - values).square().sum(), weight)
        curvature = 2 * (normalised / weight).square().sum(0)  # 0 of a channel that no ReLU lets through
        assert (weight > 0).all() and (gradient.abs() <= 1e-5 * weight * curvature).all(), name  # float32 in the fit


def test_parts_of_the_rows_add_up(network):
    rows, negative = rows_and_negative()
    whole = fit_norms(network, [rows], negative)
    halves = [
        TrainingRows(
            *(getattr(rows, name)[part] for name in ("latents", "velocity", "timesteps", "pred_original_sample")),
            text=rows.text[prompt : prompt + 1],
            guidance_scale=rows.guidance_scale[part],
        )
        for prompt, part in enumerate((slice(0, 3), slice(3, 6)))
    ]
    parts = fit_norms(network, halves, negative)
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-5)
    assert not any(part._forward_pre_hooks for part in network.transformer.modules())


def test_a_network_whose_queries_and_keys_have_one_length_stays_as_it_is():
    """That length is all the weights then, and the norms undo nothing; ReLU passes some channels of it only."""
    torch.manual_seed(0)
    transformer = tiny_transformer(qk_norm=None, timestep_scale=0.001, attention_bias=True).requires_grad_(False)
    for name, part in transformer.named_modules():
        if name.endswith(("to_q", "to_k")):
            part.weight.zero_()
            part.bias.normal_(std=3)
    network = FlowTransformer(transformer)
    rows, negative = rows_and_negative()
    weights = fit_norms(network, [rows], negative)
    lengths = {name: values[0].square().mean().sqrt() for name, values in projected(network, rows, negative).items()}
    for name, weight in weights.items():
        expected = 1.0 if name.endswith("attn1.norm_q.weight") else lengths[name].item()
        torch.testing.assert_close(weight, torch.full_like(weight, expected), rtol=1e-5, atol=0)
    sample, s, text = branch_inputs(rows, negative)
    expected = network(sample, s, **text.arguments())
    found = with_qk_norm(network, weights)(sample, s, **text.arguments())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_normalised_queries_of_weight_1_are_exact_in_linear_attention(network):
    """The length of a query cancels, but not in cross-attention, and not by channel."""
    block = network.transformer.transformer_blocks[0]
    generator = torch.Generator().manual_seed(0)
    hidden, text = (torch.randn(2, length, 16, generator=generator) for length in (9, 4))
    before = block.attn1(hidden), block.attn2(hidden, encoder_hidden_states=text)
    block.attn1.norm_q, block.attn2.norm_q = (RMSNorm(16, eps=EPS).requires_grad_(False) for _ in range(2))
    after = block.attn1(hidden), block.attn2(hidden, encoder_hidden_states=text)
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-6)
    assert relative_error(after[1], before[1]) > 1e-2
    block.attn1.norm_q.weight.uniform_(0.5, 2, generator=generator)
    assert relative_error(block.attn1(hidden), before[0]) > 1e-3


def test_least_squares_are_nearer_than_norms_without_weights(network):
    rows, negative = rows_and_negative()
    sample, s, text = branch_inputs(rows, negative)
    expected = network(sample, s, **text.arguments())
    weights = fit_norms(network, [rows], negative)
    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    fitted, plain = (
        relative_error(with_qk_norm(network, given)(sample, s, **text.arguments()), expected)
        for given in (weights, ones)
    )
    assert 0 < fitted < 0.5 * plain


def test_the_network_is_what_its_config_makes(network, tmp_path):
    rows, negative = rows_and_negative()
    normalised = with_qk_norm(network, fit_norms(network, [rows], negative))
    made = SanaTransformer2DModel.from_config({**network.transformer.config, "qk_norm": QK_NORM})
    made.load_state_dict(normalised.transformer.state_dict())
    assert {(norm.eps, norm.dim) for name, norm in made.named_modules() if name.endswith(("norm_q", "norm_k"))} == {
        (EPS, (16,))
    }
    normalised.transformer.save_pretrained(tmp_path)
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.qk_norm == QK_NORM and network.transformer.config.qk_norm is None
    sample, s, text = branch_inputs(rows, negative)
    expected = normalised(sample, s, **text.arguments())
    for other in (made, loaded):
        found = FlowTransformer(other.eval())(sample, s, **text.arguments())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    theirs = dict(network.transformer.named_parameters())
    own = {name for name, part in normalised.transformer.named_parameters() if part is not theirs.get(name)}
    assert own == {name for name in made.state_dict() if ".norm_q." in name or ".norm_k." in name}
    assert not own & theirs.keys()


def test_norms_beside_adapters_train_and_are_their_own(network):
    rows, negative = rows_and_negative()
    base = with_qk_norm(network, fit_norms(network, [rows], negative)).transformer
    adapted = adapt(base, rank=2)
    train_norms(adapted)
    trained = {name for name, part in adapted.named_parameters() if part.requires_grad and "lora" not in name}
    assert trained == {name for name in base.state_dict() if ".norm_q." in name or ".norm_k." in name}
    for name in trained:
        before = base.get_parameter(name)
        torch.testing.assert_close(adapted.get_parameter(name).detach(), before)
        adapted.get_parameter(name).data.add_(1)
        assert not torch.equal(adapted.get_parameter(name), before) and not before.requires_grad
