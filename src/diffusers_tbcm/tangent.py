"""The student's tangent: its consistency function differentiated along the teacher's ODE (arXiv 2511.20410, Eq. 4)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .dual import Dual
from .flow import broadcast_time
from .text import Text
from .trigflow import SIGMA_DATA


# The constant c of Algorithm 1's tangent normalisation g / (||g|| + c); the value is sCM's (arXiv 2410.11081).
NORMALIZATION_CONSTANT = 0.1


@dataclass
class TangentOutput:
    """The consistency tangent and what was computed on the way.

    Args:
        tangent: normalised g, (rows, channels, height, width).
        trig_output: F of the student, without gradient, the shape of `tangent`.
        norm: the norm of g before normalisation, (rows,).
    """

    tangent: torch.Tensor
    trig_output: torch.Tensor
    norm: torch.Tensor


def tangent_ratio(
    step: int, warmup_steps: int, cooldown_start_step: int | None, cooldown_steps: int, final_ratio: float
) -> float:
    """Evaluate the ratio r that scales the second term of the tangent (Alg. 1, Warmup-Cooldown of Sec. 4.3).

    r rises linearly from 0 to 1 over the warm-up, stays there, and falls linearly to `final_ratio` over the cooldown.
    Without a cooldown it rises to `final_ratio` and stays there: `final_ratio=1` is plain warm-up, less is the paper's
    warm-up-to-R_final ablation.

    Args:
        step: optimiser steps done, from 0.
        warmup_steps: length of the warm-up in steps; 0 starts at its end.
        cooldown_start_step: the step where the cooldown starts; None for no cooldown.
        cooldown_steps: length of the cooldown in steps; 0 falls at once.
        final_ratio: r at the end, in [0, 1].

    Returns:
        r in [0, 1].

    Raises:
        ValueError: if a number of steps is negative, `final_ratio` is outside [0, 1], or the cooldown starts before
            the warm-up ends.
    """
    for name, value in (("step", step), ("warmup_steps", warmup_steps), ("cooldown_steps", cooldown_steps)):
        if value < 0:
            raise ValueError(f"`{name}` is {value}, but it must not be negative.")
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"`final_ratio` is {final_ratio}, but it must be in [0, 1].")
    if cooldown_start_step is not None and cooldown_start_step < warmup_steps:
        raise ValueError(
            f"`cooldown_start_step` is {cooldown_start_step}, before the end of the warm-up at step {warmup_steps}."
        )
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if cooldown_start_step is None:
        return warmup * final_ratio
    if step < cooldown_start_step:
        return warmup
    cooldown = min(1.0, (step - cooldown_start_step) / cooldown_steps) if cooldown_steps else 1.0
    return (1 - cooldown) * warmup + cooldown * final_ratio


def dual_inputs(
    latents: torch.Tensor, velocity: torch.Tensor, timesteps: torch.Tensor, sigma_data: float = SIGMA_DATA
) -> tuple[Dual, Dual]:
    """Let the student's inputs move along the teacher's ODE, at the speed dt = cos(t) sin(t) (Alg. 1).

    The speed keeps dF/dt, which can be huge near t = pi/2, in range.

    Args:
        latents: x_t, (rows, channels, height, width).
        velocity: the teacher's dx_t/dt, the shape of `latents`.
        timesteps: t in radians, (rows,).
        sigma_data: standard deviation of the latents.

    Returns:
        x_t / sigma_data and t, each with its tangent, in float32 or wider.
    """
    wide = torch.promote_types(latents.dtype, torch.float32)
    latents, velocity, timesteps = latents.to(wide), velocity.to(wide), timesteps.to(wide)
    speed = torch.cos(timesteps) * torch.sin(timesteps)
    sample = Dual(latents / sigma_data, broadcast_time(speed, velocity) * velocity / sigma_data)
    return sample, Dual(timesteps, speed)


@torch.no_grad()
def normalized_tangent(
    trig_output: Dual,
    latents: torch.Tensor,
    velocity: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    ratio: float,
    sigma_data: float = SIGMA_DATA,
    resolution_invariant: bool = False,
) -> TangentOutput:
    """Evaluate the normalised tangent of the student along the teacher's ODE (Alg. 1, JVP rearrangement of Eq. 4).

    At r = 1 and before normalisation it is cos(t) df/dt.

    Args:
        trig_output: F of the student on `dual_inputs`, (rows, channels, height, width).
        latents: x_t, the shape of `trig_output`.
        velocity: the teacher's dx_t/dt, the shape of `trig_output`.
        timesteps: t in radians, (rows,).
        ratio: r, from `tangent_ratio`.
        sigma_data: standard deviation of the latents.
        resolution_invariant: divide the norm by the square root of the elements of a row, as some sCM code does.

    Returns:
        The tangent, the student's output and the norm, without gradients, in float32 or wider.
    """
    output, derivative = trig_output.primal.detach(), trig_output.tangent
    cos, sin = (broadcast_time(value, output) for value in (torch.cos(timesteps), torch.sin(timesteps)))
    tangent = -(cos**2) * (sigma_data * output - velocity) - ratio * (cos * sin * latents + sigma_data * derivative)
    norm = torch.linalg.vector_norm(tangent, dim=tuple(range(1, tangent.ndim)))
    if resolution_invariant:
        norm = norm / math.sqrt(tangent[0].numel())
    tangent = tangent / (broadcast_time(norm, tangent) + NORMALIZATION_CONSTANT)
    return TangentOutput(tangent=tangent, trig_output=output, norm=norm)


@torch.no_grad()
def consistency_tangent(
    student: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    velocity: torch.Tensor,
    timesteps: torch.Tensor,
    text: Text,
    guidance_scale: torch.Tensor | None,
    *,
    ratio: float,
    sigma_data: float = SIGMA_DATA,
    resolution_invariant: bool = False,
) -> TangentOutput:
    """Evaluate the normalised tangent by a pass of its own, under PyTorch's forward mode: the plain reference.

    Training has it from its gradient pass, by `dual_inputs` and `normalized_tangent`.

    Args:
        student: the network F, called as `TrigFlowTransformer` is: with sample, timestep, the text's arguments and
            `guidance`.
        latents: x_t, (rows, channels, height, width).
        velocity: the teacher's dx_t/dt, the shape of `latents`.
        timesteps: t in radians, (rows,).
        text: of the prompts; rows are a multiple of them, and consecutive rows share one.
        guidance_scale: classifier-free guidance weight, (rows,); None for a student that does not embed it.
        ratio: r, from `tangent_ratio`.
        sigma_data: standard deviation of the latents.
        resolution_invariant: as in `normalized_tangent`.

    Returns:
        As `normalized_tangent`.
    """
    sample, t = dual_inputs(latents, velocity, timesteps, sigma_data)

    def trig_output(sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return student(sample, t, **text.arguments(), guidance=guidance_scale)

    # Only the math kernel of scaled_dot_product_attention has forward-mode derivatives.
    with sdpa_kernel(SDPBackend.MATH):
        output, derivative = torch.func.jvp(  # type: ignore[misc]  # declared as if `has_aux` were known at run time only
            trig_output, (sample.primal, t.primal), (sample.tangent, t.tangent)
        )
    return normalized_tangent(
        Dual(output, derivative),
        latents,
        velocity,
        timesteps,
        ratio=ratio,
        sigma_data=sigma_data,
        resolution_invariant=resolution_invariant,
    )
