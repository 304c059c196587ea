"""Dual numbers against PyTorch's forward mode, and the one-pass step against the two-pass one."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from tiny import tiny_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from toy_networks import SIGMA_DATA, network_inputs, randn

from diffusers_tbcm import dual
from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.dual import Dual, checkpoint_dual
from diffusers_tbcm.lora import make_lora_student
from diffusers_tbcm.loss import LogvarHead, StudentWithLogvar, consistency_loss
from diffusers_tbcm.tangent import consistency_tangent, dual_inputs, normalized_tangent
from diffusers_tbcm.text import Text
from diffusers_tbcm.trigflow import TrigFlowTransformer


# Older versions break the graph where a function written in Python, such as F.pad, is given a dual number.
TRACES_DUALS = Version(torch.__version__) >= Version("2.11")
WEIGHT, BIAS = randn(5, 4, seed=1), randn(5, seed=2)
KERNEL, DEPTHWISE = randn(6, 4, 1, 1, seed=3), randn(4, 1, 3, 3, seed=4)
OTHER = randn(4, 4, seed=5)
FUNCTIONS = {
    "linear": lambda x: F.linear(x, WEIGHT, BIAS),
    "conv2d": lambda x: F.conv2d(x, KERNEL, randn(6)),
    "depthwise conv2d": lambda x: F.conv2d(x, DEPTHWISE, None, 1, 1, 1, 4),
    "matmul of a constant": lambda x: torch.matmul(OTHER, x) @ OTHER,
    "matmul of two": lambda x: x @ x.transpose(-1, -2),
    "sum of two": lambda x: x + x.flip(0),
    "sum with a constant": lambda x: (3 + x) + OTHER,
    "sum that broadcasts": lambda x: x[:, :1, :1] + OTHER,
    "constant plus": lambda x: OTHER + x[..., :1],
    "difference": lambda x: (x - x.mean(-1, keepdim=True)) - OTHER + (1 - x),
    "product": lambda x: x * torch.sin(x) * OTHER * 2,
    "quotients": lambda x: (x / 3) / (x.exp() + 1) + 2 / (x.square() + 1) + OTHER / (x * x + 1),
    "powers": lambda x: (x**2).pow(1.5) + torch.rsqrt(x.pow(2) + 1),
    "power of a tensor": lambda x: (x.abs() + 1) ** x,
    "layer norm": lambda x: F.layer_norm(x, (4,), None, None, 1e-6),
    "layer norm with weights": lambda x: F.layer_norm(x, (4,), WEIGHT[0], WEIGHT[1]),
    "silu": F.silu,
    "relu": F.relu,
    "views": lambda x: x.permute(0, 2, 3, 1).reshape(2, 4, -1).unflatten(1, (2, 2)).unsqueeze(0).mT,
    "repeat and expand": lambda x: x.repeat(2, 1, 1, 1)[:, :1].expand(-1, 3, -1, -1),
    "chunk": lambda x: x.chunk(2, dim=1)[1] * x.split(2, dim=1)[0],
    "pad": lambda x: F.pad(x, (0, 1), mode="constant", value=1.0),
    "cat": lambda x: torch.cat([x, OTHER.expand(2, 4, 4, 4), x * x]),
    "cat along a tuple": lambda x: torch.cat((x[:, :2], x), dim=1) + torch.cat([OTHER.expand(2, 2, 4, 4), x], 1),
    "stack": lambda x: torch.stack([-x[..., 1], OTHER[0].expand(2, 4, 4)], dim=-1),
    "unbind": lambda x: x.unflatten(-1, (2, 2)).unbind(-1)[1] * x.unbind(1)[0].unsqueeze(1)[..., :2],
    "splits": lambda x: x.split_with_sizes([1, 3], dim=1)[1] * x.split([3, 1], dim=1)[0],
    "einsum": lambda x: torch.einsum("nchw->nhwc", x) @ OTHER,
    "einsum of three": lambda x: torch.einsum("nchw,hk,nckw->nk", x, OTHER, x * x),
    "sine and cosine": lambda x: torch.sin(3 * x) * torch.cos(x) + x.sin().cos(),
    "square root": lambda x: torch.sqrt(x * x + 1),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "rms norm": lambda x: F.rms_norm(x, (4,), None, 1e-6),
    "rms norm of two axes with weights": lambda x: F.rms_norm(x, (4, 4), OTHER),
    "rotary embedding by complex numbers": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(2, 4, 4, 2, 2)) * torch.polar(OTHER.abs(), OTHER)[:, None, :2]
    ).flatten(3).type_as(x),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "no rule of its own": lambda x: torch.erf(x).cumsum(-1).clip(-2, 2),
    "dropout that does nothing": lambda x: F.dropout(x, 0.0, True) + F.dropout(x, 0.5, False),
    "dtypes": lambda x: x.float().to(torch.float64) * x,
}  # fmt: skip
WITHOUT_RULE = {"product", "quotients", "power of a tensor", "sum of two", "no rule of its own"}
ATTENTION_MASKS = {
    "none": None,
    "bias": torch.tensor([[0.0, 0, -10000, 0, -1]]).double(),
    "bias of every query": randn(2, 1, 7, 5, seed=9),
    "boolean": torch.tensor([[[[True, True, False, True, False]]], [[[True] * 5]]]),
}


def directions(value):
    return value, torch.roll(value.flip(0), 1, -1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rules_agree_with_forward_mode(name):
    x, tangent = directions(randn(2, 4, 4, 4))
    expected, derivative = torch.func.jvp(FUNCTIONS[name], (x,), (tangent,))
    actual = FUNCTIONS[name](Dual(x, tangent))
    assert torch.equal(actual.primal, expected)
    assert actual.tangent.shape == derivative.shape and actual.tangent.dtype == derivative.dtype
    torch.testing.assert_close(actual.tangent, derivative)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "dtypes"])  # whose float32 is too coarse
def test_tangents_agree_with_central_differences(name):
    x, tangent = directions(0.5 + randn(2, 4, 4, 4).abs())  # away from the kinks of relu and abs
    step = 1e-5
    difference = (FUNCTIONS[name](x + step * tangent) - FUNCTIONS[name](x - step * tangent)) / (2 * step)
    actual = FUNCTIONS[name](Dual(x, tangent)).tangent
    # Rounding is 1e-15 / 1e-5, the share of the third derivative 1e-10 of it
    torch.testing.assert_close(actual, difference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - WITHOUT_RULE))
def test_what_networks_are_made_of_has_a_rule_of_its_own(name, monkeypatch):
    def refuse(func, *_, **__):
        raise AssertionError(f"{func} took the slow way")

    monkeypatch.setattr(dual, "_by_forward_mode", refuse)
    FUNCTIONS[name](Dual(*directions(randn(2, 4, 4, 4))))


def test_a_norm_of_half_precision_follows_its_input():
    x, tangent = (part.bfloat16() for part in directions(randn(3, 8)))
    exact = torch.func.jvp(lambda x: F.rms_norm(x, (8,), None, 1e-6), (x.double(),), (tangent.double(),))[1]
    actual = F.rms_norm(Dual(x, tangent), (8,), None, 1e-6).tangent
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - exact).norm() < 3e-3 * exact.norm()  # the result is rounded to 8 bits, nothing else


@pytest.mark.parametrize("max_scores", [1, 2**26])
@pytest.mark.parametrize("mask", ATTENTION_MASKS)
@pytest.mark.parametrize("moving", ["query", "all", "key and value"])
def test_attention_agrees_with_forward_mode_in_any_chunks(monkeypatch, mask, moving, max_scores):
    monkeypatch.setattr(dual, "MAX_ATTENTION_SCORES", max_scores)
    parts = [randn(2, 3, tokens, 8, seed=seed) for seed, tokens in enumerate((7, 5, 5))]
    places = {"query": [0], "all": [0, 1, 2], "key and value": [1, 2]}[moving]

    def attention(*moved):
        arguments = list(parts)
        for place, value in zip(places, moved, strict=True):
            arguments[place] = value
        return F.scaled_dot_product_attention(*arguments, attn_mask=ATTENTION_MASKS[mask], dropout_p=0.0)

    values, tangents = zip(*(directions(parts[place]) for place in places), strict=True)
    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(attention, values, tangents)
    actual = attention(*map(Dual, values, tangents))
    assert torch.equal(actual.primal, F.scaled_dot_product_attention(*parts, attn_mask=ATTENTION_MASKS[mask]))
    torch.testing.assert_close(actual.tangent, derivative)


def test_attention_keeps_its_scores_in_float32_under_autocast():
    parts = [(3 * randn(2, 3, tokens, 16, seed=seed)).bfloat16() for seed, tokens in enumerate((7, 9, 9))]
    query, tangent = directions(parts[0])
    with sdpa_kernel(SDPBackend.MATH):
        _, exact = torch.func.jvp(
            lambda q: F.scaled_dot_product_attention(q, *(part.double() for part in parts[1:])),
            (query.double(),), (tangent.double(),),
        )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        actual = F.scaled_dot_product_attention(Dual(query, tangent), *parts[1:]).tangent
    assert actual.dtype == torch.bfloat16
    # The result is rounded to 8 bits, the scores on the way are not.
    assert (actual.double() - exact).norm() < 5e-3 * exact.norm()


def test_only_the_primal_part_has_a_graph():
    weight = WEIGHT.clone().requires_grad_()
    x = Dual(*directions(randn(3, 4)))
    output = F.silu(F.linear(x, weight)) * weight[:, 0]
    assert output.primal.requires_grad and not output.tangent.requires_grad
    assert output.shape == (3, 5) and output.dtype == torch.float64 and output.ndim == 2
    assert [leaf is part for leaf, part in zip(tree_leaves(output), (output.primal, output.tangent), strict=True)]


def test_what_a_tangent_cannot_follow_is_refused():
    x = Dual(*directions(randn(1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"`p` is 0\.5"):
        F.dropout(x, 0.5, training=True)
    with pytest.raises(ValueError, match="causal"):
        F.scaled_dot_product_attention(x, x, x, is_causal=True)


def student_model(**config):
    """A student with weights in every part, in training mode."""
    config = {"guidance_embeds": True, **config}
    transformer = tiny_transformer(**config)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    return StudentWithLogvar(TrigFlowTransformer(make_student(transformer)), LogvarHead(width)).train()


def step_inputs(dtype):
    """latents, velocity, timesteps; text for two rows a prompt; guidance."""
    sample, t, embeds, mask = network_inputs(batch=4, dtype=dtype)
    velocity = SIGMA_DATA * randn(*sample.shape, seed=3, dtype=dtype)
    return (SIGMA_DATA * sample, velocity, t), Text(embeds[:2], mask[:2]), torch.full((4,), 4.5)


def gradients(model, loss):
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def one_pass(model, dtype):
    (latents, velocity, t), text, guidance = step_inputs(dtype)
    inputs = dual_inputs(latents, velocity, t, SIGMA_DATA)
    trig_output, logvar = model(*inputs, **text.arguments(), guidance=guidance)
    tangent = normalized_tangent(trig_output, latents, velocity, t, ratio=0.9, sigma_data=SIGMA_DATA)
    loss = consistency_loss(trig_output.primal, tangent.trig_output, tangent.tangent, logvar, t, SIGMA_DATA)
    return tangent, gradients(model, loss)


def two_passes(model, dtype):
    (latents, velocity, t), text, guidance = step_inputs(dtype)
    tangent = consistency_tangent(
        model.student, latents, velocity, t, text, guidance, ratio=0.9, sigma_data=SIGMA_DATA
    )  # fmt: skip
    trig_output, logvar = model(latents / SIGMA_DATA, t, **text.arguments(), guidance=guidance)
    loss = consistency_loss(trig_output, tangent.trig_output, tangent.tangent, logvar, t, SIGMA_DATA)
    return tangent, gradients(model, loss)


def assert_same_step(actual, expected, tolerance):
    for part, reference in (
        (actual[0].tangent, expected[0].tangent), (actual[0].norm, expected[0].norm), (actual[1], expected[1])
    ):  # fmt: skip
        assert (part - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_pass_gives_the_gradients_of_two(dtype, tolerance, checkpointing):
    model = student_model().to(dtype)
    expected = two_passes(model, dtype)
    assert expected[1].norm() > 0
    if checkpointing:
        model.student.transformer.enable_gradient_checkpointing(checkpoint_dual)
    assert_same_step(one_pass(model, dtype), expected, tolerance)


@pytest.mark.parametrize("size", [72, 112])
def test_one_pass_has_the_head_sizes_of_the_published_models(size):
    width = {"attention_head_dim": size // 4, "num_attention_heads": 8, "cross_attention_dim": 2 * size}
    model = student_model(**width, num_cross_attention_heads=2, cross_attention_head_dim=size, num_layers=1)
    assert_same_step(one_pass(model, torch.float32), two_passes(model, torch.float32), 1e-5)


def test_one_pass_through_lora_adapters():
    transformer = make_lora_student(tiny_transformer(), rank=4)
    model = StudentWithLogvar(TrigFlowTransformer(transformer), LogvarHead(16)).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    assert_same_step(one_pass(model, torch.float32), two_passes(model, torch.float32), 1e-5)


def test_one_pass_under_autocast_is_as_close_as_two():
    model = student_model()
    exact = two_passes(model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        one = one_pass(model, torch.float32)
        two = two_passes(model, torch.float32)
    assert one[0].tangent.dtype == one[0].trig_output.dtype == torch.float32
    errors = [(step[0].tangent - exact[0].tangent).norm() / exact[0].tangent.norm() for step in (one, two)]
    assert 1e-5 < errors[0] < 1.5 * errors[1] + 1e-3


def test_checkpointing_computes_every_tangent_once():
    model = student_model()
    seen = []
    for block in model.student.transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda block, arguments: seen.append(type(arguments[0])))
    model.student.transformer.enable_gradient_checkpointing(checkpoint_dual)
    one_pass(model, torch.float32)
    assert seen == [Dual, Dual, torch.Tensor, torch.Tensor]


def test_a_graph_holds_no_tangents():
    weight = randn(4, 4, seed=1).requires_grad_()
    x = Dual(*directions(randn(3, 4)))
    middle = checkpoint_dual(lambda x: F.silu(F.linear(x, weight)), x)
    output = checkpoint_dual(lambda x: F.linear(x, weight), middle)
    tangents = [weakref.ref(dual.tangent) for dual in (x, middle, output)]
    primal = output.primal
    del x, middle, output
    assert [tangent() for tangent in tangents] == [None, None, None]
    primal.sum().backward()


def test_checkpointing_without_dual_numbers_is_plain_checkpointing():
    transformer = tiny_transformer().train()
    sample, t, embeds, mask = network_inputs()
    plain = TrigFlowTransformer(transformer)(sample, t, embeds, mask)
    transformer.enable_gradient_checkpointing(checkpoint_dual)
    checkpointed = TrigFlowTransformer(transformer)(sample, t, embeds, mask)
    assert torch.equal(checkpointed, plain)
    weight = transformer.transformer_blocks[0].ff.conv_depth.weight
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), weight)[0] for out in (plain, checkpointed)))


def test_compiled_blocks_take_the_same_step_and_where_torch_can_without_a_graph_break():
    model = student_model()
    expected = one_pass(model, torch.float32)
    for block in model.student.transformer.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=TRACES_DUALS)
    assert_same_step(one_pass(model, torch.float32), expected, 1e-6)
