"""Every method in a few lines: where its rows come from, and its loss. CDM, which has a critic, is `cdm_mixture`'s."""

from collections.abc import Callable

import torch
from torch import nn

from diffusers_tbcm.diffusion import diffusion_rows, sample_diffusion_timesteps
from diffusers_tbcm.discrete import discrete_loss, discrete_target, neighbouring_timesteps
from diffusers_tbcm.loss import LogvarHead, consistency_loss, endpoint_loss
from diffusers_tbcm.rows import Recording, TrainingRows
from diffusers_tbcm.tangent import dual_inputs, normalized_tangent
from diffusers_tbcm.trajectory import record_trajectory, reference_route, sample_timesteps
from diffusers_tbcm.trigflow import SIGMA_DATA, TrigFlowTransformer

from .mixture import CLASSES, empty_text, real_samples, text_of
from .network import FREQUENCIES


LCM_GRID = reference_route(50)


# Rows: TBCM's are what the teacher passes on its way from noise; sCM's and LCM's are data with noise on it.


def trajectory_rows(
    teacher: TrigFlowTransformer, timesteps: torch.Tensor, guidance: float, dim: int, generator: torch.Generator
) -> Recording:
    """The teacher generates along a route of times, (prompts, N), without data; all steps but the first are rows."""
    prompts = len(timesteps)
    classes = torch.randint(CLASSES, (prompts,), generator=generator)
    noise = torch.randn(prompts, dim, generator=generator)
    scale = torch.full((prompts,), guidance)
    return record_trajectory(teacher, noise, timesteps, text_of(classes), empty_text(), scale)


def noised_rows(
    teacher: TrigFlowTransformer, timesteps: torch.Tensor, guidance: float, dim: int, generator: torch.Generator
) -> Recording:
    """Samples of the data, noised to times, (rows,); the teacher gives the velocity there."""
    rows = len(timesteps)
    classes = torch.randint(CLASSES, (rows,), generator=generator)
    data, noise = real_samples(classes, generator, dim), torch.randn(rows, dim, generator=generator)
    scale = torch.full((rows,), guidance)
    return diffusion_rows(teacher, data, noise, timesteps, text_of(classes), empty_text(), scale)


def record(
    places: str, teacher: TrigFlowTransformer, rows: int, guidance: float, *, num_steps: int, dim: int, seed: int
) -> Recording:
    """Make the rows of a run.

    Args:
        places: "trajectory" (TBCM); "noised" (sCM), at log-normal times; "noised, route's times", at those of the
            trajectories; "noised, grid" (LCM).
        teacher: F.
        rows: how many.
        guidance: classifier-free guidance weight.
        num_steps: of a trajectory, with the first, which makes no row.
        dim: of the data.
        seed: of all that is random.

    Returns:
        The rows.
    """
    generator = torch.Generator().manual_seed(seed)
    route = sample_timesteps("reference", rows // (num_steps - 1), num_steps, generator=generator)
    if places == "trajectory":
        return trajectory_rows(teacher, route, guidance, dim, generator)
    if places == "noised":
        timesteps = sample_diffusion_timesteps(rows, generator=generator)
    elif places == "noised, grid":
        timesteps = neighbouring_timesteps(LCM_GRID, rows, generator=generator)[0]
    else:
        timesteps = route[:, 1:].flatten()
    return noised_rows(teacher, timesteps, guidance, dim, generator)


# Losses of a student F at rows.


def output_of(student: TrigFlowTransformer, rows: TrainingRows) -> torch.Tensor:
    return student(rows.latents / SIGMA_DATA, rows.timesteps, **rows.text.arguments())


def without_guidance(student: TrigFlowTransformer) -> Callable[..., torch.Tensor]:
    """A student that has learned one guidance scale, for who hands it one."""
    return lambda sample, t, guidance, **words: student(sample, t, **words)


class Endpoint(nn.Module):
    """Every point of a trajectory is to lead to its end at once; only trajectories have ends."""

    def forward(self, student: TrigFlowTransformer, rows: TrainingRows) -> torch.Tensor:
        ends = rows.pred_original_sample
        return endpoint_loss(output_of(student, rows), rows.latents, ends, rows.timesteps, loss_type="l2")


class LCM(nn.Module):
    """A point of the grid is to lead where the next one leads, the teacher's step on."""

    def forward(self, student: TrigFlowTransformer, rows: TrainingRows) -> torch.Tensor:
        place = (LCM_GRID[:, None] - rows.timesteps).abs().argmin(0)
        next_timesteps = torch.cat([LCM_GRID[1:], torch.zeros(1)])[place]
        led_to = discrete_target(without_guidance(student), rows, next_timesteps)
        return discrete_loss(output_of(student, rows), rows.latents, led_to, rows.timesteps)


class Consistency(nn.Module):
    """Where a point leads is not to change along the teacher's ODE: TBCM and sCM.

    Args:
        weighting: a row's weight, as in `loss.loss_weight`.
        sign: -1 flips the tangent, which is a control.
    """

    def __init__(self, weighting: str = "uniform", sign: int = 1) -> None:
        super().__init__()
        self.weighting, self.sign = weighting, sign
        self.head = LogvarHead(2 * FREQUENCIES)

    def forward(self, student: TrigFlowTransformer, rows: TrainingRows) -> torch.Tensor:
        output = student(*dual_inputs(rows.latents, rows.velocity, rows.timesteps), **rows.text.arguments())
        found = normalized_tangent(output, rows.latents, rows.velocity, rows.timesteps, ratio=1.0)
        parts = output.primal, found.trig_output, self.sign * found.tangent
        logvar = self.head(student.embed_timestep(rows.timesteps))
        return consistency_loss(*parts, logvar, rows.timesteps, weighting=self.weighting)
