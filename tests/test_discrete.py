import math

import pytest
import torch
from gaussian_data import exact_gaussian_function, gaussian_teacher
from tiny import tiny_transformer
from toy_networks import SIGMA_DATA, four_axes, generators, no_text, randn, trig_student

from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.diffusion import diffusion_rows
from diffusers_tbcm.discrete import discrete_loss, discrete_target, neighbouring_timesteps
from diffusers_tbcm.loss import endpoint_loss
from diffusers_tbcm.text import Text
from diffusers_tbcm.trajectory import reference_route, rotate
from diffusers_tbcm.trigflow import TrigFlowTransformer, consistency_output


def make_rows(teacher, t):
    """Rows of random latents, float64, without prompts to speak of."""
    count = len(t)
    image_latents, noise = randn(2, count, 2, 3, 3)
    text = no_text(count)
    return diffusion_rows(teacher, image_latents, noise, t, text, text[:1], torch.full((count,), 4.5)).rows()


def output_of(network, rows):
    sample = rows.latents / SIGMA_DATA
    return network(sample, rows.timesteps, **rows.text.arguments(), guidance=rows.guidance_scale)


def without_guidance(network):
    return lambda sample, t, guidance, **text: network(sample, t, **text)


def test_intervals_are_neighbours_of_the_grid_each_equally_often():
    route = reference_route(4)
    later, earlier = neighbouring_timesteps(route, 4000, generator=torch.Generator().manual_seed(0))
    grid = torch.cat([route, torch.zeros(1)])
    for index in range(4):
        chosen = later == grid[index]
        assert (earlier[chosen] == grid[index + 1]).all()
        assert chosen.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    together = neighbouring_timesteps(route, 3, generator=generators(5, 6, 7))
    alone = neighbouring_timesteps(route, 1, generator=generators(6))
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def test_the_target_is_the_prediction_where_the_teachers_step_leads():
    t, next_t = torch.linspace(0.4, 1.5, 4).double(), torch.linspace(0.0, 1.2, 4).double()
    rows = make_rows(gaussian_teacher(), t)
    network = without_guidance(trig_student(lambda sample, t: sample**2 * four_axes(t)))
    target = discrete_target(network, rows, next_t, SIGMA_DATA)
    delta = four_axes(t - next_t)
    arrived = delta.cos() * rows.latents - delta.sin() * rows.velocity
    output = (arrived / SIGMA_DATA) ** 2 * four_axes(next_t)
    expected = four_axes(next_t).cos() * arrived - four_axes(next_t).sin() * SIGMA_DATA * output
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(target[0], arrived[0])  # at t = 0 the step's end is the prediction


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
def test_a_consistent_student_has_no_loss(loss_type):
    """Where all data is one picture, a rotation follows the ODE exactly and every prediction is that picture."""
    picture = randn(1, 2, 3, 3, seed=3)

    def to_picture(sample, t):
        return (four_axes(t.cos()) * sample - picture / SIGMA_DATA) / four_axes(t.sin())

    teacher = trig_student(to_picture)
    t, next_t = torch.linspace(0.5, math.pi / 2, 4).double(), torch.linspace(0.1, 1.4, 4).double()
    rows = make_rows(teacher, t)
    target = discrete_target(without_guidance(teacher), rows, next_t, SIGMA_DATA)
    torch.testing.assert_close(target, picture.expand_as(target))
    output = output_of(without_guidance(teacher), rows)
    loss = discrete_loss(output, rows.latents, target, t, loss_type=loss_type, sigma_data=SIGMA_DATA)
    assert abs(loss.item()) < 1e-12
    assert discrete_loss(output + 0.1, rows.latents, target, t, loss_type=loss_type).item() > 1e-3


def test_the_exact_consistency_function_of_gaussian_data_loses_only_the_solvers_error():
    losses = []
    student = without_guidance(trig_student(exact_gaussian_function))
    t = torch.linspace(0.6, 1.5, 6).double()
    rows = make_rows(gaussian_teacher(), t)
    for step in (0.1, 0.05):
        target = discrete_target(student, rows, t - step, SIGMA_DATA)
        losses.append(discrete_loss(output_of(student, rows), rows.latents, target, t, loss_type="l2").item())
    # One rotation is off by O(step^2), and the loss is its square: half the step, a sixteenth of the loss.
    assert losses[0] / losses[1] == pytest.approx(16, rel=0.1)


def test_training_leads_to_the_teachers_own_discrete_ode():
    """One number per grid time, f(x, t) = a(t) x: without loss, a is the product of the rotations from there to 0."""
    route = torch.linspace(1.4, 0.35, 4).double()
    later, earlier = route, torch.cat([route[1:], torch.zeros(1).double()])
    rows = make_rows(gaussian_teacher(), later)
    factors = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def function(sample, t):
        factor = torch.where(t == 0, 1.0, factors[(route - t[:, None]).abs().argmin(1)])
        return four_axes((t.cos() - factor) / t.sin().clamp(min=1e-9)) * sample

    student = without_guidance(trig_student(function))
    optimizer = torch.optim.SGD([factors], lr=0.5)
    for _ in range(200):
        target = discrete_target(student, rows, earlier)
        loss = discrete_loss(output_of(student, rows), rows.latents, target, later, loss_type="l2")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sample, ends = rows.latents, []
    for start in range(4):  # from each grid time down to 0
        x = sample[start : start + 1]
        for t, next_t in zip(later[start:], earlier[start:], strict=True):
            output = gaussian_teacher()(x / SIGMA_DATA, t[None], torch.zeros(1, 1, 1))
            x = rotate(x, SIGMA_DATA * output, (t - next_t)[None])
        ends.append(x)
    torch.testing.assert_close(four_axes(factors.detach()) * sample, torch.cat(ends), rtol=1e-3, atol=1e-3)


def test_losses_by_hand():
    t = torch.tensor([math.pi / 6], dtype=torch.float64)
    latents, target = torch.zeros(1, 1, 1, 2).double(), torch.zeros(1, 1, 1, 2).double()
    trig_output = torch.tensor([[[[-6.0, 8.0]]]], dtype=torch.float64)  # predictions sin t (6, -8), on unit scale
    assert discrete_loss(trig_output, latents, target, t, loss_type="l2").item() == pytest.approx((9 + 16) / 2)
    expected = (math.sqrt(9 + 0.25) + math.sqrt(16 + 0.25)) / 2 - 0.5
    found = discrete_loss(trig_output, latents, target, t, loss_type="huber", huber_constant=0.5)
    assert found.item() == pytest.approx(expected)
    assert discrete_loss(trig_output, latents, target, t).item() == pytest.approx(3.5, abs=1e-3)
    with pytest.raises(ValueError, match="`loss_type` is 'l1', but it must be one of huber, l2"):
        discrete_loss(trig_output, latents, target, t, loss_type="l1")


def test_l2_is_the_endpoint_loss_towards_the_target():
    t = torch.linspace(0.2, 1.5, 3).double()
    trig_output, latents, target = randn(3, 3, 2, 3, 3)
    torch.testing.assert_close(
        discrete_loss(trig_output, latents, target, t, loss_type="l2", sigma_data=0.3),
        endpoint_loss(trig_output, latents, target, t, 0.3, loss_type="l2"),
    )


def test_the_student_takes_guidance_and_gets_the_only_gradient():
    teacher = TrigFlowTransformer(tiny_transformer().requires_grad_(False))
    student = TrigFlowTransformer(make_student(teacher.transformer))
    later, earlier = neighbouring_timesteps(reference_route(4), 2, generator=generators(1, 2))
    latents, noise = randn(2, 2, 4, 8, 8, dtype=torch.float32)
    text = Text.unmasked(randn(2, 3, 16, dtype=torch.float32))
    weight = torch.tensor([4.0, 5.0])
    rows = diffusion_rows(teacher, latents, noise, later, text, text[:1], weight).rows()
    target = discrete_target(student, rows, earlier)
    assert not target.requires_grad
    loss = discrete_loss(output_of(student, rows), rows.latents, target, later)
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_target_is_at_the_rows_prompt_and_guidance():
    network = TrigFlowTransformer(tiny_transformer(guidance_embeds=True))
    latents, noise = randn(2, 2, 4, 8, 8, dtype=torch.float32)
    later, earlier = torch.tensor([1.2, 0.9]), torch.tensor([0.8, 0.3])
    text = Text(randn(2, 3, 16, dtype=torch.float32), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    weight = torch.tensor([1.0, 9.0])
    rows = diffusion_rows(network, latents, noise, later, text, None, weight).rows()
    arrived = rotate(rows.latents, rows.velocity, later - earlier)
    with torch.no_grad():
        output = network(arrived / SIGMA_DATA, earlier, text.embeds, text.mask, weight)
        other = network(arrived / SIGMA_DATA, earlier, text.embeds, text.mask, weight.flip(0))
    assert not torch.allclose(output, other, rtol=1e-2)
    assert torch.equal(discrete_target(network, rows, earlier), consistency_output(arrived, output, earlier))
