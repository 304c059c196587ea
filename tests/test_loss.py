import math

import pytest
import torch
from gaussian_data import DATA_STD, gaussian_std, gaussian_teacher
from tiny import tiny_transformer
from toy_networks import SIGMA_DATA, four_axes, network_inputs, no_text, randn, trig_student

from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.loss import (
    ENDPOINT_LOSS_TYPES,
    LOSS_WEIGHTINGS,
    NORM_CONSTANT,
    LogvarHead,
    StudentWithLogvar,
    consistency_error,
    consistency_loss,
    consistency_weight,
    endpoint_loss,
    loss_weight,
)
from diffusers_tbcm.tangent import consistency_tangent
from diffusers_tbcm.trajectory import record_trajectory, sample_timesteps
from diffusers_tbcm.trigflow import (
    TrigFlowTransformer,
    flow_to_trig_output,
    trig_to_flow_sample,
    trig_to_flow_timestep,
)


def loss_rows():
    trig_output, trig_output_sg, tangent = randn(3, 4, 2, 3, 3)
    return trig_output, trig_output_sg, tangent, randn(4, seed=1), torch.linspace(0.01, 1.56, 4, dtype=torch.float64)


def test_weight_is_one_over_sigma_data_tan_t():
    t = torch.tensor([math.pi / 4, math.atan(4.0)], dtype=torch.float64)
    torch.testing.assert_close(consistency_weight(t, 0.5), torch.tensor([2.0, 0.5], dtype=torch.float64))


def test_loss_and_error_are_means_over_elements():
    trig_output, trig_output_sg, tangent, logvar, t = loss_rows()
    total, errors = 0.0, []
    for i in range(4):
        squares = [
            (a - b - c).item() ** 2
            for a, b, c in zip(trig_output[i].ravel(), trig_output_sg[i].ravel(), tangent[i].ravel(), strict=True)
        ]
        weight = 1 / (0.3 * math.tan(t[i])) / math.exp(logvar[i])
        total += sum(weight * square + logvar[i].item() for square in squares)
        errors.append(sum(squares) / len(squares))
    loss = consistency_loss(trig_output, trig_output_sg, tangent, logvar, t, sigma_data=0.3)
    assert loss.item() == pytest.approx(total / trig_output.numel(), rel=1e-12)
    assert consistency_error(trig_output, trig_output_sg, tangent).tolist() == pytest.approx(errors, rel=1e-12)


def test_loss_is_wide():
    narrow = [tensor.bfloat16() for tensor in loss_rows()]
    wide = [tensor.float() for tensor in narrow]
    assert consistency_loss(*narrow).dtype == torch.float32
    torch.testing.assert_close(consistency_loss(*narrow), consistency_loss(*wide))


@pytest.mark.parametrize("loss_type", ENDPOINT_LOSS_TYPES)
def test_endpoint_loss_is_the_flow_matching_networks_error_in_the_clean_sample(loss_type):
    """Independently of F: in flow-matching form the predicted clean sample is x_s - s v, in units of sigma_data."""
    velocity, latents, clean = randn(3, 4, 2, 3, 3)
    t = torch.linspace(0.01, 1.56, 4, dtype=torch.float64)
    s = trig_to_flow_timestep(t)
    sample = trig_to_flow_sample(latents, t, SIGMA_DATA)
    trig_output = flow_to_trig_output(sample, velocity, s)
    error = (sample - four_axes(s) * velocity - clean / SIGMA_DATA).square()
    rows = [math.sqrt(row.mean() + NORM_CONSTANT**2) - NORM_CONSTANT for row in error]
    expected = error.mean() if loss_type == "l2" else torch.tensor(sum(rows) / 4, dtype=torch.float64)
    found = endpoint_loss(trig_output, latents, clean, t, SIGMA_DATA, loss_type=loss_type)
    torch.testing.assert_close(found, expected)
    narrow = [tensor.bfloat16() for tensor in (trig_output, latents, clean)]
    assert endpoint_loss(*narrow, t.float(), loss_type=loss_type).dtype == torch.float32


def test_of_ends_that_cannot_be_told_apart_the_norm_chooses_the_likelier_and_the_square_their_mean():
    """The same noise led to one picture twice and to another once."""
    pictures, noise = randn(2, 1, 2, 3, 3), randn(1, 1, 2, 3, 3)
    ends, t = pictures[torch.tensor([0, 0, 1])].flatten(0, 1), torch.full((3,), math.pi / 2, dtype=torch.float64)
    answers = {}
    for loss_type in ENDPOINT_LOSS_TYPES:
        output = torch.zeros_like(noise[0], requires_grad=True)
        optimizer = torch.optim.LBFGS([output], max_iter=200, line_search_fn="strong_wolfe")

        def closure(output=output, optimizer=optimizer, loss_type=loss_type):
            optimizer.zero_grad()
            rows = output.expand(3, -1, -1, -1), noise[0].expand(3, -1, -1, -1), ends, t
            loss = endpoint_loss(*rows, 1.0, loss_type=loss_type)
            loss.backward()
            return loss

        optimizer.step(closure)
        answers[loss_type] = -output.detach()  # f(x, pi / 2) = -F
    torch.testing.assert_close(answers["l2"][0], ends.mean(0))
    torch.testing.assert_close(answers["norm"][0], ends[0], rtol=0, atol=0.02)  # to its constant


def test_the_norm_has_a_gradient_where_the_end_is_met():
    output = torch.zeros(1, 2, 3, 3, requires_grad=True)
    endpoint_loss(output, torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.ones(1)).backward()
    assert output.grad.eq(0).all()
    with pytest.raises(ValueError, match="`loss_type` is 'l1', but it must be one of norm, l2"):
        endpoint_loss(output, output, output, torch.ones(1), loss_type="l1")


def weight_of(weighting, t, logvar):
    """The weight of one row, from its definition."""
    prior = math.cos(t) / (SIGMA_DATA * math.sin(t))
    return {"learned": prior * math.exp(-logvar), "prior": prior, "uniform": 1.0}[weighting]


@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_gradient_is_the_weighted_tangent(weighting):
    _, trig_output_sg, tangent, logvar, t = loss_rows()
    trig_output = trig_output_sg.clone().requires_grad_()
    loss = consistency_loss(trig_output, trig_output_sg, tangent, logvar, t, SIGMA_DATA, weighting=weighting)
    loss.backward()
    weights = torch.tensor([weight_of(weighting, *row) for row in zip(t.tolist(), logvar.tolist(), strict=True)])
    torch.testing.assert_close(loss_weight(t, logvar, weighting, SIGMA_DATA), weights.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        trig_output.grad, -2 * four_axes(weights.double()) * tangent / tangent.numel(), rtol=1e-6, atol=0
    )
    # Two of the elements by central differences: of a quadratic function these are exact, up to rounding.
    for index in ((0, 0, 0, 0), (3, 1, 2, 2)):
        values = []
        for step in (1e-3, -1e-3):
            moved = trig_output_sg.clone()
            moved[index] += step
            values.append(consistency_loss(moved, trig_output_sg, tangent, logvar, t, SIGMA_DATA, weighting=weighting))
        assert trig_output.grad[index].item() == pytest.approx((values[0] - values[1]).item() / 2e-3, rel=1e-6)


def test_only_a_learned_weight_trains_logvar():
    trig_output, trig_output_sg, tangent, logvar, t = loss_rows()
    errors = (trig_output, trig_output_sg, tangent)
    for weighting, mean in (("prior", consistency_weight(t, SIGMA_DATA)), ("uniform", torch.ones_like(t))):
        loss = consistency_loss(*errors, logvar.requires_grad_(), t, SIGMA_DATA, weighting=weighting)
        torch.testing.assert_close(loss, (mean * consistency_error(*errors)).mean())
        assert not loss.requires_grad
    assert consistency_loss(*errors, logvar, t, SIGMA_DATA).requires_grad
    with pytest.raises(ValueError, match="`weighting` is 'even', but it must be one of learned, prior, uniform"):
        consistency_loss(*errors, logvar, t, SIGMA_DATA, weighting="even")


def test_best_logvar_is_the_log_of_the_weighted_error():
    trig_output, trig_output_sg, tangent, _, t = loss_rows()
    error = (trig_output - trig_output_sg - tangent).square().mean(dim=(1, 2, 3))
    best = (error / (SIGMA_DATA * t.tan())).log().requires_grad_()
    loss = consistency_loss(trig_output, trig_output_sg, tangent, best, t, SIGMA_DATA)
    loss.backward()
    torch.testing.assert_close(best.grad, torch.zeros(4, dtype=torch.float64))
    for offset in (-0.1, 0.1):
        assert consistency_loss(trig_output, trig_output_sg, tangent, best + offset, t, SIGMA_DATA) > loss
    torch.testing.assert_close(loss_weight(t, best, sigma_data=SIGMA_DATA), 1 / error)


def test_logvar_head_starts_at_zero_and_stays_wide():
    head = LogvarHead(16)
    embedded = randn(3, 16, dtype=torch.float32)
    assert torch.equal(head(embedded), torch.zeros(3))
    torch.nn.init.normal_(head.linear.weight)
    expected = embedded @ head.linear.weight[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(embedded), expected)
    assert head(embedded.bfloat16()).dtype == torch.float32


def test_one_forward_reaches_every_trained_parameter():
    student = TrigFlowTransformer(make_student(tiny_transformer()))
    module = StudentWithLogvar(student, LogvarHead(16))
    torch.nn.init.ones_(module.logvar_head.linear.weight)
    torch.nn.init.normal_(student.transformer.time_embed.guidance_embedder.linear_2.weight)  # guidance matters
    sample, t, embeds, mask = network_inputs()
    guidance = torch.tensor([4.0, 4.5, 5.0])
    trig_output, logvar = module(sample, t, embeds, mask, guidance)
    logvar.sum().backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in student.parameters())  # the head trains itself only
    assert torch.equal(trig_output, student(sample, t, embeds, mask, guidance))
    assert torch.equal(logvar, module.logvar_head(student.embed_timestep(t, guidance)))
    consistency_loss(
        trig_output, trig_output.detach(), randn(*sample.shape, dtype=torch.float32), logvar, t
    ).backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_without_a_head_logvar_is_zero_and_everything_trains():
    student = TrigFlowTransformer(make_student(tiny_transformer()))
    module = StudentWithLogvar(student, None)
    assert module.state_dict().keys() == {f"student.{name}" for name in student.state_dict()}
    sample, t, embeds, mask = network_inputs()
    guidance = torch.tensor([4.0, 4.5, 5.0])
    torch.nn.init.normal_(student.transformer.time_embed.guidance_embedder.linear_2.weight)
    trig_output, logvar = module(sample, t, embeds, mask, guidance)
    assert torch.equal(trig_output, student(sample, t, embeds, mask, guidance)) and torch.equal(logvar, torch.zeros(3))
    tangent = randn(*sample.shape, dtype=torch.float32)
    consistency_loss(trig_output, trig_output.detach(), tangent, logvar, t, weighting="uniform").backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_training_finds_the_consistency_function_of_a_gaussian():
    # F = sum_j c_j t^(j+1) x / sigma_data, from c = 0; the exact f(x_t, t) is x_t DATA_STD / std(t).
    coefficients = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    def slope(t):
        return sum(c * t ** (power + 1) for power, c in enumerate(coefficients))

    student = trig_student(lambda sample, t: four_axes(slope(t)) * sample)
    optimizer = torch.optim.Adam([coefficients], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=150)
    generator = torch.Generator().manual_seed(0)

    def consistency_error_at(t):
        return ((t.cos() - t.sin() * slope(t)) * gaussian_std(t) / DATA_STD - 1).abs().max().item()

    angles = torch.linspace(0.05, math.pi / 2, 20, dtype=torch.float64)
    assert consistency_error_at(angles) > 0.9
    for _ in range(150):
        timesteps = sample_timesteps("reference", 16, 16, generator=generator)
        noise = torch.randn(16, 1, 2, 2, generator=generator, dtype=torch.float64)
        text = no_text(16)
        rows = record_trajectory(gaussian_teacher(), noise, timesteps, text, text, torch.ones(16)).rows()
        latents, t, text = rows.latents, rows.timesteps, no_text(len(rows))
        target = consistency_tangent(student, latents, rows.velocity, t, text, None, ratio=1.0)
        output = student(latents / SIGMA_DATA, t, **text.arguments())
        loss = consistency_loss(output, target.trig_output, target.tangent, torch.zeros(len(t)), t, SIGMA_DATA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # What remains is mostly what a quintic cannot represent and 150 steps do not reach.
    assert consistency_error_at(angles) < 0.03
