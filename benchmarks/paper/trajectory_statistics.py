"""Numbers that describe equivalent noise (arXiv 2511.20410, Eq. 8) and sampled routes; their means with errors."""

import math

import torch

from diffusers_tbcm.trajectory import reference_route


def root_mean_square(noise: torch.Tensor) -> torch.Tensor:
    """Measure the size of each sample's noise.

    Args:
        noise: (batch, channels, height, width).

    Returns:
        (batch,); the standard deviation, for noise of mean zero.
    """
    return noise.square().mean((1, 2, 3)).sqrt()


def cosine_similarity(noise: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Compare the direction of each sample with that of another.

    Args:
        noise: (batch, channels, height, width).
        other: the shape of `noise`.

    Returns:
        (batch,), in [-1, 1]; 0 with a standard error of 1 / sqrt(channels * height * width) for independent noise.
    """
    return torch.nn.functional.cosine_similarity(noise.flatten(1), other.flatten(1), dim=1)


def neighbour_correlation(noise: torch.Tensor) -> torch.Tensor:
    """Measure how alike adjacent pixels are: what tells a pattern from white noise of the same size.

    Args:
        noise: (batch, channels, height, width), of mean zero where it is white.

    Returns:
        (batch,), the mean product of horizontal and vertical neighbours over the mean square; 0 for white noise, 1 for
        a constant.
    """
    horizontal = (noise[..., 1:] * noise[..., :-1]).flatten(1)
    vertical = (noise[..., 1:, :] * noise[..., :-1, :]).flatten(1)
    return torch.cat([horizontal, vertical], dim=1).mean(1) / noise.square().mean((1, 2, 3))


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Average over prompts.

    Args:
        values: (prompts,), at least two.

    Returns:
        The mean and its standard error.
    """
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def route_statistics(routes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Describe sampled routes.

    Args:
        routes: t in radians, (routes, N), every row descending from pi/2.

    Returns:
        (routes,) each: the longest step, the last of which ends at 0; the share of the reference route's N - 1
        partitions that have no angle; and the share of the N - 1 angles that lie above pi/4.
    """
    steps = routes - torch.cat([routes[:, 1:], torch.zeros_like(routes[:, :1])], dim=1)
    angles = routes[:, 1:].contiguous()
    boundaries = reference_route(routes.shape[1]).flip(0).to(angles.dtype)
    partitions = torch.searchsorted(boundaries, angles)  # 0 is what lies below them all
    occupied = torch.nn.functional.one_hot(partitions, len(boundaries) + 1)[..., 1:-1].amax(1)
    return {
        "longest step (rad)": steps.amax(1),
        "empty partitions of the reference route": 1 - occupied.float().mean(1),
        "angles above pi/4": (angles > math.pi / 4).float().mean(1),
    }
