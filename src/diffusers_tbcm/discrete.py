"""Discrete-time consistency distillation on TrigFlow's rotation (LCM, arXiv 2310.04378, Algorithm 1).

The student's predictions at two neighbouring times of a grid are to agree, the second at the point that one step of
the teacher's guided ODE leads to. The guidance scale is the student's input, as it is in TBCM.
"""

from collections.abc import Callable

import torch

from .draws import per_prompt_generators
from .loss import clean_error
from .rows import TrainingRows
from .trajectory import rotate
from .transfer import to_device
from .trigflow import SIGMA_DATA, consistency_output


HUBER_CONSTANT = 0.001  # of the pseudo-Huber loss; the value is diffusers' LCM example's
LOSS_TYPES = ("huber", "l2")


def neighbouring_timesteps(
    route: torch.Tensor,
    batch_size: int,
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one interval of a grid per row, each with the same chance.

    Args:
        route: the grid, (N,) descending radians, such as `trajectory.reference_route`; 0 follows its last.
        batch_size: number of rows.
        generator: one per row (its interval then depends on its own only), or one for all.
        device: where the result lies; the numbers are drawn where the generator is.

    Returns:
        The interval's later and earlier angle, noisier first, radians, (batch,) each.
    """
    grid = torch.cat([route, route.new_zeros(1)])
    draws = [
        torch.randint(len(route), (), generator=own, device=device if own is None else own.device)
        for own in per_prompt_generators(generator, batch_size)
    ]
    index = to_device(torch.stack(draws), grid.device)
    return to_device(grid[index], device), to_device(grid[index + 1], device)


@torch.no_grad()
def discrete_target(
    target: Callable[..., torch.Tensor],
    rows: TrainingRows,
    next_timesteps: torch.Tensor,
    sigma_data: float = SIGMA_DATA,
) -> torch.Tensor:
    """Take one step of the teacher's ODE and predict the clean latent from where it leads (Alg. 1, DDIM solver).

    Args:
        target: the network F that predicts, the student itself or its moving average, called as `TrigFlowTransformer`
            is.
        rows: the points to start from and the teacher's velocity there.
        next_timesteps: the angles to arrive at, radians, (rows,); at 0 the result is the teacher's own prediction.
        sigma_data: standard deviation of the latents.

    Returns:
        The clean latent to agree with, (rows, channels, height, width), without gradient.
    """
    arrived = rotate(rows.latents, rows.velocity, rows.timesteps - next_timesteps)
    output = target(arrived / sigma_data, next_timesteps, **rows.text.arguments(), guidance=rows.guidance_scale)
    return consistency_output(arrived, output, next_timesteps, sigma_data)


def discrete_loss(
    trig_output: torch.Tensor,
    latents: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    loss_type: str = "huber",
    huber_constant: float = HUBER_CONSTANT,
    sigma_data: float = SIGMA_DATA,
) -> torch.Tensor:
    """Evaluate the distance between two predictions of the clean latent, on unit scale (Alg. 1).

    It is the mean over elements of d^2, or of sqrt(d^2 + c^2) - c, which grows with |d| where that is above c.

    Args:
        trig_output: F of the student with gradient, (rows, channels, height, width).
        latents: x_t, the shape of `trig_output`.
        target: from `discrete_target`, the shape of `trig_output`.
        timesteps: t in radians, (rows,).
        loss_type: one of `LOSS_TYPES`.
        huber_constant: c, for "huber".
        sigma_data: standard deviation of the latents.

    Returns:
        The loss, a scalar in float32 or wider.

    Raises:
        ValueError: if `loss_type` is unknown.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"`loss_type` is {loss_type!r}, but it must be one of {', '.join(LOSS_TYPES)}.")
    square = clean_error(trig_output, latents, target, timesteps, sigma_data)
    if loss_type == "l2":
        return square.mean()
    return (torch.sqrt(square + huber_constant**2) - huber_constant).mean()
