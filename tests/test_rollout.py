import pytest
import torch
from toy_networks import generators, no_text, randn

from diffusers_tbcm.flow import flow_prediction, shift_sigmas
from diffusers_tbcm.rollout import draw_anchors, draw_sigmas, record_rollout


def schedules(count=400, **options):
    return [draw_sigmas(torch.Generator().manual_seed(seed), **options) for seed in range(count)]


def test_schedules_descend_from_noise_to_the_clean_latent():
    drawn = schedules()
    for sigmas in drawn:
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
        assert ((0.25 <= sigmas[1:-1]) & (sigmas[1:-1] <= 0.95)).all()
    assert {len(sigmas) - 1 for sigmas in drawn} == set(range(1, 29))  # N ~ U{1..28}, all of them


def test_every_number_of_steps_is_as_likely():
    steps = torch.tensor([len(sigmas) - 1 for sigmas in schedules(4000, max_steps=4)])
    counts = steps.bincount(minlength=5)[1:]
    assert (counts - 1000).abs().max() < 5 * (1000 * 0.75) ** 0.5


def test_one_step_has_no_anchor_but_noise():
    assert all(torch.equal(sigmas, torch.tensor([1.0, 0.0])) for sigmas in schedules(9, max_steps=1, shift=3.0))


def test_shift_is_applied_last():
    plain, shifted = schedules(20), schedules(20, shift=3.0)
    for before, after in zip(plain, shifted, strict=True):
        torch.testing.assert_close(after, shift_sigmas(before, 3.0))


def test_stratified_anchors_fall_one_into_every_part():
    for sigmas in schedules(200, anchor_range=(0.02, 0.98), stratified=True):
        parts = len(sigmas) - 2
        places = ((sigmas[1:-1] - 0.02) / 0.96 * parts).floor()
        assert sorted(places.int().tolist()) == list(range(parts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "`max_steps` is 0"),
        ({"anchor_range": (0.9, 0.1)}, "`anchor_range` is 0.9 0.1"),
        ({"anchor_range": (-0.1, 0.5)}, "`anchor_range` is -0.1 0.5"),
        ({"anchor_range": (0.1, 1.5)}, "`anchor_range` is 0.1 1.5"),
        ({"anchor_range": (float("nan"), 0.5)}, "`anchor_range` is nan"),
    ],
)
def test_wrong_schedules_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        draw_sigmas(torch.Generator(), **options)


def test_anchors_are_all_points_but_the_clean_end_and_each_samples_own():
    drawn = draw_anchors(4, 4000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1, 2, 3}
    assert (drawn.bincount() - 1000).abs().max() < 5 * (1000 * 0.75) ** 0.5
    assert torch.equal(
        draw_anchors(9, 2, generators(5, 6)), torch.cat([draw_anchors(9, 1, generators(n)) for n in (5, 6)])
    )


class Counted:
    """v = x (1 + s): grows on the way, so that every point is told from the others."""

    def __init__(self):
        self.times = []

    def __call__(self, sample, s, **text):
        self.times.append(s[0].item())
        assert not torch.is_grad_enabled()
        return sample * (1 + s.view(-1, 1, 1, 1))


def test_rollout_keeps_the_asked_point_of_the_students_own_way():
    noise, sigmas = randn(3, 2, 2, 2), torch.tensor([1.0, 0.7, 0.3, 0.0], dtype=torch.float64)
    student = Counted()
    rows = record_rollout(student, noise, sigmas, torch.tensor([0, 1, 2]), no_text(3)).rows()
    second = noise + (0.7 - 1.0) * 2.0 * noise
    third = second + (0.3 - 0.7) * 1.7 * second
    states, times = torch.stack([noise, second, third]), torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64)
    expected = torch.stack([states[index, index] for index in range(3)])
    torch.testing.assert_close(rows.latents, expected)
    assert torch.equal(rows.timesteps, times)
    torch.testing.assert_close(rows.velocity, expected * (1 + times.view(-1, 1, 1, 1)))
    torch.testing.assert_close(rows.pred_original_sample, flow_prediction(rows.latents, rows.velocity, times))


def test_rollout_ends_at_the_last_anchor_of_all_processes():
    noise, sigmas = randn(2, 2, 2, 2), torch.linspace(1, 0, 6)
    student = Counted()
    record_rollout(student, noise, sigmas, torch.tensor([0, 2]), no_text(2))
    assert len(student.times) == 3
    student = Counted()
    record_rollout(student, noise, sigmas, torch.tensor([0, 2]), no_text(2), last_anchor=4)
    assert len(student.times) == 5


def test_rollout_takes_no_gradient_and_is_wide():
    weight = torch.nn.Parameter(torch.tensor(0.5))
    noise = randn(2, 2, 2, 2, dtype=torch.float32)
    rows = record_rollout(
        lambda sample, s, **text: weight * sample,
        noise,
        torch.tensor([1.0, 0.5, 0.0]),
        torch.tensor([1, 1]),
        no_text(2),
    ).rows()
    assert not rows.latents.requires_grad and not rows.velocity.requires_grad
    assert rows.latents.dtype == rows.velocity.dtype == torch.float32
