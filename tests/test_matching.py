import pytest
import torch
from toy_networks import four_axes, generators, randn

from benchmarks import cdm_mixture
from diffusers_tbcm.flow import add_flow_noise, flow_prediction
from diffusers_tbcm.matching import (
    augmentation_loss,
    critic_loss,
    distribution_loss,
    draw_tau,
    matching_weight,
    merge_critic,
)


def predictions():
    """x_0 with gradient, D_R(z, c), D_R(z, empty) and D_F(z, c)."""
    prediction, *judged = randn(4, 3, 2, 4, 4)
    return prediction.requires_grad_(), *judged


def test_tau_is_uniform_below_its_limit_and_clamped():
    upper = torch.full((20000,), 0.5)
    tau = draw_tau(upper, torch.Generator().manual_seed(0))
    assert tau.min() == torch.tensor(0.02) and tau.max() <= 0.5
    assert abs(tau.mean() - 0.25) < 0.01
    tau = draw_tau(torch.ones(20000), torch.Generator().manual_seed(0))
    assert tau.max() == torch.tensor(0.98)
    anchors = torch.rand(1000)
    assert (draw_tau(anchors, torch.Generator().manual_seed(1)) <= anchors.clamp(min=0.02)).all()  # CA's tau <= t_i
    one = torch.cat([draw_tau(torch.ones(1), generators(seed)) for seed in (3, 4)])
    assert torch.equal(draw_tau(torch.ones(2), generators(3, 4)), one)


def test_critic_learns_the_velocity_of_the_students_predictions():
    original, noise = randn(2, 3, 2, 4, 4)
    tau = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    velocity = (noise - original).requires_grad_()
    assert critic_loss(velocity, original, noise) == 0
    off = critic_loss(velocity + 2, original, noise)
    torch.testing.assert_close(off, torch.tensor(4.0, dtype=torch.float64))
    # the velocity that it is after leads back from z to the prediction
    torch.testing.assert_close(flow_prediction(add_flow_noise(original, noise, tau), noise - original, tau), original)


def test_weight_is_the_inverse_distance_to_the_teacher_and_at_most_ten():
    prediction = torch.zeros(2, 1, 2, 2)
    real = prediction + four_axes(torch.tensor([0.5, 0.01]))
    torch.testing.assert_close(matching_weight(prediction, real), torch.tensor([2.0, 10.0]))


def test_gradient_is_minus_two_w_delta_over_numel():
    prediction, real, unconditional, fake = predictions()
    weight = four_axes(matching_weight(prediction.detach(), real))
    for loss, delta in (
        (augmentation_loss(prediction, real, unconditional, 3.5), 3.5 * (real - unconditional)),
        (distribution_loss(prediction, real, fake), real - fake),
    ):
        (gradient,) = torch.autograd.grad(loss, prediction)
        torch.testing.assert_close(gradient, -2 * weight * delta / prediction.numel())
        torch.testing.assert_close(loss.detach(), (weight * delta).square().mean())


def test_no_gradient_reaches_teacher_critic_or_weight():
    prediction, *judged = predictions()
    judged = [one.requires_grad_() for one in judged]
    real, unconditional, fake = judged
    loss = augmentation_loss(prediction, real, unconditional, 7.0) + distribution_loss(prediction, real, fake)
    loss.backward()
    assert prediction.grad is not None and all(one.grad is None for one in judged)


def test_losses_vanish_where_there_is_nothing_to_tell():
    prediction, real, unconditional, _ = predictions()
    assert distribution_loss(prediction, real, real) == 0  # F == R
    assert augmentation_loss(prediction, real, unconditional, 0.0) == 0
    assert augmentation_loss(prediction, real, real, 7.0) == 0  # c = empty


def test_difference_of_predictions_is_minus_tau_times_that_of_velocities():
    sample, real, fake = randn(3, 3, 2, 4, 4)
    tau = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(
        flow_prediction(sample, real, tau) - flow_prediction(sample, fake, tau), -four_axes(tau) * (real - fake)
    )


def test_shared_forward_of_augmentation_and_matching_is_two_forwards():
    network = torch.nn.Linear(4, 4).double()
    sample, _, _, _ = randn(4, 3, 2, 4, 4)
    _, real, unconditional, fake = predictions()

    def gradient(loss):
        return torch.autograd.grad(loss, network.weight)[0]

    shared = network(sample)
    once = gradient(augmentation_loss(shared, real, unconditional, 7.0) + distribution_loss(shared, real, fake))
    twice = gradient(augmentation_loss(network(sample), real, unconditional, 7.0))
    twice += gradient(distribution_loss(network(sample), real, fake))
    torch.testing.assert_close(once, twice)


def test_a_little_of_the_student_flows_into_the_critic():
    critic, student = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    before, kept = critic.weight.detach().clone(), student.weight.detach().clone()
    merge_critic(critic, student)
    torch.testing.assert_close(critic.weight.detach(), 0.999 * before + 0.001 * student.weight.detach())
    assert torch.equal(student.weight, kept)
    bias = critic.bias.requires_grad_(False).clone()  # frozen, as the base of adapters is
    merge_critic(critic, student)
    assert torch.equal(critic.bias, bias)
    critic.own = torch.nn.Parameter(torch.ones(1))
    merge_critic(critic, student, 1.0)
    assert critic.own == 1 and torch.equal(critic.weight, student.weight)
    with pytest.raises(AttributeError):
        merge_critic(torch.nn.Linear(2, 3, bias=False), student)


def test_two_dimensional_mixture_converges_and_its_controls_do_not():
    """150 of the benchmark's 2000 updates tell them apart already."""
    start = cdm_mixture.pretrain(steps=1000)
    distances = {
        variant: cdm_mixture.distance_per_class(cdm_mixture.distil(start, variant, updates=150), 1, points=1024)
        for variant in cdm_mixture.VARIANTS
    }
    untrained = cdm_mixture.distance_per_class(start, 1, points=1024)
    assert distances["CDM"] < 0.25 * untrained
    assert all(distances[control] > 0.75 * untrained for control in cdm_mixture.VARIANTS[1:])


def test_exact_velocity_is_that_of_the_mixture():
    """Its prediction is the conditional mean, estimated from draws near a point."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.zeros(400_000, dtype=torch.long)
    original = cdm_mixture.real_samples(classes, generator)
    s = torch.full((len(classes),), 0.6)
    sample = add_flow_noise(original, torch.randn(original.shape, generator=generator), s)
    point = torch.tensor([[0.3, 0.1]])
    near = (sample - point).norm(dim=1) < 0.05
    words = cdm_mixture.text_of(classes[:1]).arguments()
    prediction = flow_prediction(point, cdm_mixture.exact_velocity(point, s[:1], **words), s[:1])
    spread = original[near].std(dim=0) / near.sum().sqrt()
    assert ((prediction - original[near].mean(0)).abs() < 5 * spread + 0.02).all()
