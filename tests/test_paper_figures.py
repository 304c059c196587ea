import math

import pytest
import torch
from gaussian_data import DATA_STD, gaussian_std, gaussian_teacher
from toy_networks import SIGMA_DATA, no_text, randn

from benchmarks.paper.teacher_trajectories import diffuse, kept
from benchmarks.paper.trajectory_statistics import (
    cosine_similarity,
    mean_and_error,
    neighbour_correlation,
    root_mean_square,
    route_statistics,
)
from diffusers_tbcm.trajectory import equivalent_noise, record_trajectory, reference_route, sample_timesteps


def test_noise_statistics_of_known_patterns():
    white = randn(3, 16, 32, 32)
    torch.testing.assert_close(root_mean_square(2 * white), 2 * white.flatten(1).norm(dim=1) / math.sqrt(16 * 32 * 32))
    assert (root_mean_square(white) - 1).abs().max() < 0.05
    assert neighbour_correlation(white).abs().max() < 0.05  # some 7 standard errors
    torch.testing.assert_close(neighbour_correlation(3 * torch.ones(2, 1, 4, 4)), torch.ones(2))
    checkerboard = (-1.0) ** (torch.arange(4)[:, None] + torch.arange(4))
    torch.testing.assert_close(neighbour_correlation(checkerboard[None, None]), -torch.ones(1))
    rows = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(1, 1, 4, 4)  # alike beside, opposite below
    torch.testing.assert_close(neighbour_correlation(rows), torch.zeros(1))


def test_cosine_similarity_is_between_whole_samples():
    noise, other = randn(2, 4, 2, 3, 3)
    expected = [(a * b).sum() / (a.norm() * b.norm()) for a, b in zip(noise, other, strict=True)]
    torch.testing.assert_close(cosine_similarity(noise, other), torch.stack(expected))
    torch.testing.assert_close(cosine_similarity(noise, -2 * noise), -torch.ones(4, dtype=noise.dtype))


def test_mean_and_error_is_the_standard_error_of_the_mean():
    assert mean_and_error(torch.tensor([1.0, 3.0, 5.0, 7.0])) == pytest.approx((4.0, math.sqrt(20 / 3) / 2))


def test_route_statistics_of_known_routes():
    start = torch.tensor([math.pi / 2])
    route = reference_route(4)
    in_each = (route[:-1] + route[1:]) / 2
    crowded = torch.tensor([0.3, 0.2, 0.1]) + route[-1]  # all in the last partition
    found = route_statistics(torch.stack([torch.cat([start, in_each]), torch.cat([start, crowded])]))
    assert route[-2] > crowded[0]
    longest = torch.cat([start, in_each, torch.zeros(1)]).diff().abs().max()
    torch.testing.assert_close(found["longest step (rad)"], torch.stack([longest, math.pi / 2 - crowded[0]]))
    torch.testing.assert_close(found["empty partitions of the reference route"], torch.tensor([0, 2 / 3]))
    above = (in_each > math.pi / 4).float().mean()
    torch.testing.assert_close(found["angles above pi/4"], torch.stack([above, torch.tensor(0.0)]))


def test_the_reference_scheme_leaves_no_partition_empty():
    routes = sample_timesteps("reference", 100, 16, generator=torch.Generator().manual_seed(0))
    assert (route_statistics(routes)["empty partitions of the reference route"] == 0).all()


def test_along_diffusion_the_equivalent_noise_is_the_noise():
    original, noise = SIGMA_DATA * randn(2, 5, 2, 3, 3)
    t = torch.linspace(0.1, math.pi / 2, 5, dtype=torch.float64)
    noise_at_t = equivalent_noise(diffuse(original, noise, t), original, t)
    torch.testing.assert_close(cosine_similarity(noise_at_t, noise), torch.ones(5).double())


def test_along_a_gaussian_generation_the_equivalent_noise_keeps_its_direction_and_changes_its_size():
    # x_t = z std(t) / sigma_data and x_0 = z DATA_STD / sigma_data: Eq. 8 is z times a number that depends on t only.
    noise, steps = randn(2, 2, 3, 3), 400
    timesteps = reference_route(steps).double().expand(2, -1)
    found = record_trajectory(gaussian_teacher(), noise, timesteps, no_text(2), no_text(1), torch.ones(2).double())
    for place in (100, 200, 300):
        t = found.timesteps[:, place]
        at_t = equivalent_noise(found.latents[:, place], found.pred_original_sample, t)
        torch.testing.assert_close(cosine_similarity(at_t, noise), torch.ones(2).double())
        factor = (gaussian_std(t) - t.cos() * DATA_STD) / t.sin()
        expected = factor / SIGMA_DATA * root_mean_square(SIGMA_DATA * noise)
        torch.testing.assert_close(root_mean_square(at_t), expected, rtol=0.02, atol=0)  # Euler's error at 400 steps


def test_kept_tensors_are_computed_once_for_their_settings(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"value": torch.tensor([float(len(calls))]).expand(2)}

    folder = tmp_path / "work"
    for _ in range(2):
        assert kept(folder, "name", {"prompts": ["a"]}, compute)["value"].tolist() == [1.0, 1.0]
        assert kept(folder, "name", {"prompts": ["b"]}, compute)["value"].tolist() == [2.0, 2.0]
    assert len(list(folder.iterdir())) == len(calls) == 2
