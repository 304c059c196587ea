import math

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_transformer
from torch import nn
from toy_networks import SIGMA_DATA, network_inputs, randn

from diffusers_tbcm.adversarial import (
    DiscriminatorHeads,
    block_features,
    frozen_verdicts,
    head_blocks,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.diffusion import diffuse
from diffusers_tbcm.text import Text
from diffusers_tbcm.trigflow import TrigFlowTransformer, consistency_output


INNER_DIM = 16
TOKENS = 64


def make_teacher(num_layers=4, **overrides):
    return TrigFlowTransformer(tiny_transformer(num_layers=num_layers, **overrides).requires_grad_(False))


def make_heads(blocks=(1, 2), **kwargs):
    torch.manual_seed(0)
    return DiscriminatorHeads(INNER_DIM, blocks, **kwargs)


def random_features(rows=4, blocks=(1, 2), seed=0):
    return {block: randn(rows, TOKENS, INNER_DIM, seed=seed + block, dtype=torch.float32) for block in blocks}


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(module, state):
    return all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_the_references_blocks_are_drawn_together_for_a_shallow_teacher():
    assert head_blocks(28) == head_blocks(20) == (2, 8, 14, 19)
    assert head_blocks(6) == (1, 2, 4, 5)
    assert head_blocks(1) == (0,)
    assert head_blocks(8, [5, 0, 5]) == (0, 5)
    for wrong in ([8], [-1, 2], []):
        with pytest.raises(ValueError, match="it must name one or more of the teacher's blocks, 0 to 7"):
            head_blocks(8, wrong)


@pytest.mark.parametrize("blocks", [(0, 2), (3,), (1,)])
def test_features_are_what_the_blocks_of_a_whole_forward_give(blocks):
    teacher = make_teacher()
    sample, t, embeds, mask = network_inputs()
    seen, ran = {}, []
    handles = [
        block.register_forward_hook(lambda _, __, output, index=index: seen.update({index: output}))
        for index, block in enumerate(teacher.transformer.transformer_blocks)
    ]
    teacher(sample / SIGMA_DATA, t, embeds, mask)
    for handle in handles:
        handle.remove()
    for index, block in enumerate(teacher.transformer.transformer_blocks):
        block.register_forward_hook(lambda _, __, output, index=index: ran.append(index))
    hooks = [len(block._forward_hooks) for block in teacher.transformer.transformer_blocks]
    features = block_features(teacher, blocks, sample, t, Text(embeds, mask), torch.ones(3))
    assert [*features] == list(blocks) and features[blocks[0]].shape == (3, TOKENS, INNER_DIM)
    assert all(torch.equal(features[block], seen[block]) for block in blocks)
    assert ran == list(range(blocks[-1] + 1))  # nothing after the last of them
    # The teacher is held as it is: no hook stays behind, and its forward is whole again.
    assert hooks == [len(block._forward_hooks) for block in teacher.transformer.transformer_blocks]
    assert teacher(sample / SIGMA_DATA, t, embeds, mask).shape == sample.shape


def test_features_depend_on_the_prompt_and_on_embedded_guidance():
    sample, t, embeds, mask = network_inputs()
    plain, guided = make_teacher(), make_teacher(guidance_embeds=True)

    def features(teacher, embeds, weight):
        weight = torch.full((3,), weight)
        return block_features(teacher, (2,), sample, t, Text(embeds, mask), weight)[2]

    assert not torch.allclose(features(plain, embeds, 4.0), features(plain, embeds.flip(0), 4.0), rtol=1e-3)
    assert torch.equal(features(plain, embeds, 4.0), features(plain, embeds, 5.0))
    assert not torch.allclose(features(guided, embeds, 4.0), features(guided, embeds, 9.0), rtol=1e-3)


def test_an_error_of_the_teacher_is_not_swallowed_and_leaves_no_hook():
    teacher = make_teacher()
    sample, t, embeds, mask = network_inputs()
    with pytest.raises(RuntimeError):
        block_features(teacher, (1,), sample, t, Text(embeds[..., :7], mask), torch.ones(3))
    modules = [*teacher.transformer.transformer_blocks, teacher.transformer.norm_out]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_gradients_reach_the_latents_through_the_frozen_teacher():
    teacher = make_teacher()
    teacher.double()
    sample, t, embeds, _ = network_inputs(batch=2, dtype=torch.float64)
    heads = make_heads(norm_rows=1).double()
    sample.requires_grad_(True)

    def loss(latents):
        features = block_features(teacher, heads.blocks, latents, t, Text.unmasked(embeds), torch.ones(2))
        return hinge_generator_loss(frozen_verdicts(heads, features))

    (gradient,) = torch.autograd.grad(loss(sample), sample)
    direction = randn(*sample.shape, seed=9)
    with torch.no_grad():
        eps = 1e-4
        difference = (loss(sample + eps * direction) - loss(sample - eps * direction)) / (2 * eps)
    # A larger step crosses kinks of the network, a smaller one falls below its float32 upcasts.
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-2)
    assert difference.abs() > 1e-4


def test_checkpointing_the_teacher_changes_no_gradient():
    sample, t, embeds, mask = network_inputs()
    heads, gradients = make_heads(), []
    for checkpointing in (False, True):
        teacher = make_teacher()
        if checkpointing:
            teacher.transformer.enable_gradient_checkpointing()
        latents = sample.clone().requires_grad_(True)
        features = block_features(teacher, heads.blocks, latents, t, Text(embeds, mask), torch.ones(3))
        hinge_generator_loss(frozen_verdicts(heads, features)).backward()
        gradients.append(latents.grad)
    assert torch.equal(*gradients) and gradients[0].norm() > 0


def test_a_head_is_its_formula():
    heads = make_heads(blocks=(1,), norm_rows=8).double().train()
    head, features = heads.heads["1"], random_features(3, (1,))[1].double()
    # Training mode moves the power iteration along: let it converge, then the weight is the matrix over its norm.
    for _ in range(200):
        heads({1: features})

    def normal(conv):
        weight = conv.parametrizations.weight.original
        return weight / torch.linalg.matrix_norm(weight.flatten(1), 2)

    def block(part, hidden, taps):
        padded = torch.cat([hidden[..., -(taps // 2) :], hidden, hidden[..., : taps // 2]], -1) if taps > 1 else hidden
        hidden = F.conv1d(padded, normal(part.conv), part.conv.bias)
        mean, variance = hidden.mean((0, 2), keepdim=True), hidden.var((0, 2), keepdim=True, unbiased=False)
        hidden = (hidden - mean) / torch.sqrt(variance + 1e-5)
        return torch.where(hidden > 0, hidden, 0.2 * hidden)

    hidden = block(head.pointwise, features.transpose(1, 2), 1)
    hidden = (hidden + block(head.mixing, hidden, 9)) / math.sqrt(2)
    expected = F.conv1d(hidden, normal(head.verdict), head.verdict.bias)[:, 0]
    (verdicts,) = heads({1: features})
    assert verdicts.shape == (3, TOKENS)
    torch.testing.assert_close(verdicts, expected)


def test_every_convolution_has_spectral_norm_one():
    heads = make_heads()
    for _ in range(100):
        heads(random_features())
    convolutions = [module for module in heads.modules() if isinstance(module, nn.Conv1d)]
    assert len(convolutions) == 2 * 3
    for convolution in convolutions:
        assert "_SpectralNorm" in type(convolution.parametrizations.weight[0]).__name__
        norm = torch.linalg.matrix_norm(convolution.weight.flatten(1), 2)
        assert norm.item() == pytest.approx(1, rel=1e-3)  # power iteration, converged


def test_verdicts_of_all_blocks_stand_side_by_side_and_batches_apart():
    heads = make_heads()
    real, fake = random_features(3), random_features(2, seed=10)
    heads.eval()
    found = heads(real, fake)
    assert [part.shape for part in found] == [(3, 2 * TOKENS), (2, 2 * TOKENS)]
    assert torch.equal(found[0], heads(real)[0]) and torch.equal(found[1], heads(fake)[0])
    only = {1: real[1], 2: torch.zeros_like(real[2])}
    assert torch.equal(heads(only)[0][:, :TOKENS], found[0][:, :TOKENS])
    assert not torch.equal(heads(only)[0][:, TOKENS:], found[0][:, TOKENS:])


def test_rows_share_statistics_in_groups():
    features = random_features(5, (1,))[1]
    for norm_rows, groups in ((2, [2, 2, 1]), (1, [1] * 5), (8, [5])):
        heads = make_heads((1,), norm_rows=norm_rows).eval()
        apart = torch.cat([heads({1: part})[0] for part in features.split(groups)])
        torch.testing.assert_close(heads({1: features})[0], apart)
    other = features.clone()
    other[1] += 1 + other[0]
    assert torch.equal(make_heads((1,), norm_rows=1).eval()({1: other})[0][0], apart_row(features, 1))
    assert not torch.allclose(make_heads((1,)).eval()({1: other})[0][0], apart_row(features, 8))


def apart_row(features, norm_rows):
    return make_heads((1,), norm_rows=norm_rows).eval()({1: features})[0][0]


def test_half_precision_features_are_judged_in_the_heads_precision():
    features = {block: value.bfloat16() for block, value in random_features().items()}
    heads = make_heads().eval()
    (verdicts,) = heads(features)
    assert verdicts.dtype == torch.float32
    assert torch.equal(verdicts, heads({block: value.float() for block, value in features.items()})[0])


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-2.0, 0.0], [1.0, -0.5], [3.0, -1.0]])
    # real: 0, 0.5, 2, 0; fake: 0, 1, 2, 0.5, 4, 0
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 4 + 7.5 / 6))
    assert hinge_generator_loss(fake).item() == pytest.approx(-0.5 / 6)
    assert hinge_discriminator_loss(torch.full((2, 2), 1.0), torch.full((2, 2), -1.0)) == 0
    narrow = hinge_discriminator_loss(real.bfloat16(), fake.bfloat16())
    assert narrow.dtype == hinge_generator_loss(fake.bfloat16()).dtype == torch.float32


class Training:
    """A student, its frozen teacher, the heads and one batch: the two steps as a script takes them."""

    def __init__(self):
        self.teacher = make_teacher()
        self.student = TrigFlowTransformer(make_student(self.teacher.transformer))
        self.heads = make_heads()
        self.sample, self.t, embeds, mask = network_inputs()
        self.text = Text(embeds, mask)
        self.weight, self.real = torch.full((3,), 4.5), SIGMA_DATA * randn(3, 4, 8, 8, seed=2, dtype=torch.float32)
        self.disc_t, self.noise = torch.tensor([0.4, 0.9, 1.3]), randn(3, 4, 8, 8, seed=3, dtype=torch.float32)

    def predict(self):
        output = self.student(self.sample / SIGMA_DATA, self.t, **self.text.arguments(), guidance=self.weight)
        return consistency_output(self.sample, output, self.t)

    def features(self, original, text=None):
        return block_features(
            self.teacher,
            self.heads.blocks,
            diffuse(original, self.noise, self.disc_t),
            self.disc_t,
            self.text if text is None else text,
            self.weight,
        )

    def generator_loss(self):
        return hinge_generator_loss(frozen_verdicts(self.heads, self.features(self.predict())))

    def discriminator_loss(self, misaligned=True):
        with torch.no_grad():
            features = [self.features(self.real), self.features(self.predict())]
            if misaligned:
                features.append(self.features(self.real, self.text.roll(1)))
        real, *fake = self.heads(*features)
        return hinge_discriminator_loss(real, torch.cat(fake))

    def optimizers(self, lr=1e-2):
        return [torch.optim.SGD(module.parameters(), lr=lr) for module in (self.student, self.heads)]


def test_the_generator_step_changes_only_the_student():
    training = Training()
    before = [state_of(module) for module in (training.student, training.heads, training.teacher)]
    loss = training.generator_loss()
    loss.backward()
    assert all(parameter.grad is None for parameter in [*training.heads.parameters(), *training.teacher.parameters()])
    for optimizer in training.optimizers():
        optimizer.step()
    assert not same_state(training.student, before[0])
    assert same_state(training.heads, before[1])  # power iteration included
    assert same_state(training.teacher, before[2])
    assert training.generator_loss() < loss


def test_the_discriminator_step_changes_only_the_heads():
    training = Training()
    before = [state_of(module) for module in (training.student, training.heads, training.teacher)]
    loss = training.discriminator_loss()
    loss.backward()
    assert all(
        parameter.grad is None for parameter in [*training.student.parameters(), *training.teacher.parameters()]
    )
    assert all(parameter.grad is not None for parameter in training.heads.parameters())
    for optimizer in training.optimizers():
        optimizer.step()
    assert same_state(training.student, before[0]) and same_state(training.teacher, before[2])
    assert not same_state(training.heads, before[1])


def test_the_heads_learn_to_tell_real_from_fake_and_the_student_to_pass():
    training = Training()
    generator, discriminator = (
        torch.optim.Adam(module.parameters(), lr=lr)
        for module, lr in ((training.student, 1e-3), (training.heads, 1e-2))
    )
    first = training.discriminator_loss(misaligned=False).item()
    for _ in range(20):
        loss = training.discriminator_loss(misaligned=False)
        discriminator.zero_grad()
        loss.backward()
        discriminator.step()
    assert loss.item() < 0.9 * first
    start = training.generator_loss().item()
    for _ in range(20):
        loss = training.generator_loss()
        generator.zero_grad()
        loss.backward()
        generator.step()
    assert loss.item() < start - 0.1


def test_the_heads_state_holds_no_teacher_and_round_trips():
    heads = make_heads()
    heads(random_features())
    assert all(name.startswith(("heads.1.", "heads.2.")) for name in heads.state_dict())
    other = DiscriminatorHeads(INNER_DIM, (1, 2))
    other.load_state_dict(heads.state_dict())
    assert torch.equal(heads.eval()(random_features())[0], other.eval()(random_features())[0])


def test_noise_hides_the_difference_that_is_judged():
    """At the largest time, real and fake latents noised alike are the same."""
    original, noise = SIGMA_DATA * randn(2, 2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for angle, distance in ((0.0, 1.0), (1.0, math.cos(1.0)), (math.pi / 2, 0.0)):
        t = torch.full((2,), angle, dtype=torch.float64)
        real, fake = (diffuse(part, noise, t) for part in original)
        torch.testing.assert_close(real - fake, distance * (original[0] - original[1]))
