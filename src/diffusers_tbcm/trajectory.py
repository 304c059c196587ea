"""The teacher's generation trajectory: its times and what it records (arXiv 2511.20410, Sec. 5.2, Eq. 8-9)."""

import math

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from .draws import per_prompt_generators
from .flow import broadcast_time
from .guidance import guidance_branches, guided_output
from .rows import Recording
from .text import Text
from .transfer import to_device
from .trigflow import SIGMA_DATA, TrigFlowTransformer, flow_to_trig_timestep


SAMPLING_SCHEMES = ("reference", "logit_normal", "random")

# The float32 nearest to pi/2 lies 4e-8 above it, so its cosine is negative. That is harmless for a rotation, and t_0
# uses it; a training row stays below, where the weight 1 / tan t is positive.
_BELOW_HALF_PI = math.pi / 2 - 2**-23


def reference_route(num_steps: int, shift: float = 2.5) -> torch.Tensor:
    """Map the sigmas of a shifted flow-matching Euler scheduler to TrigFlow angles (Sec. 5.2, inverse of Eq. 5).

    Args:
        num_steps: number of steps N.
        shift: the static shift of the flow-matching schedule.

    Returns:
        The route, (N,) float32 radians, strictly descending, its first pi/2.

    Raises:
        ValueError: if `num_steps` or `shift` is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` is {num_steps}, but a route has at least one step.")
    if shift <= 0:
        raise ValueError(f"`shift` is {shift}, but it must be positive.")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    route = flow_to_trig_timestep(scheduler.sigmas[:-1])
    route[0] = math.pi / 2
    return route


def sample_timesteps(
    scheme: str,
    batch_size: int,
    num_steps: int,
    *,
    shift: float = 2.5,
    logit_mean: float = 0.2,
    logit_std: float = 1.6,
    sigma_data: float = SIGMA_DATA,
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw one route from pure noise towards the clean latent per prompt (Sec. 5.2).

    `reference` draws one angle uniformly in every partition of `reference_route`, `logit_normal` draws
    atan(exp(n) / sigma_data) with n normal, `random` draws uniformly on (0, pi/2).

    Args:
        scheme: one of `SAMPLING_SCHEMES`.
        batch_size: number of prompts B.
        num_steps: number of steps N, the first at pi/2 included.
        shift: static shift of the `reference` route.
        logit_mean: mean of the `logit_normal` exponent.
        logit_std: standard deviation of the `logit_normal` exponent.
        sigma_data: standard deviation of the latents, for `logit_normal`.
        generator: one per prompt (a row then depends on its own only), or one for all.
        device: where the result lies; the numbers are drawn where the generator is.

    Returns:
        (B, N) float32 radians, every row descending, its first pi/2, the others in (0, pi/2).

    Raises:
        ValueError: if `scheme` is unknown, `num_steps` is below 2, or a generator list has another length than
            `batch_size`.
    """
    if scheme not in SAMPLING_SCHEMES:
        raise ValueError(f"`scheme` is {scheme!r}, but it must be one of {', '.join(SAMPLING_SCHEMES)}.")
    if num_steps < 2:
        raise ValueError(f"`num_steps` is {num_steps}, but it must be at least 2: the first gives no training row.")
    if scheme == "reference":
        route = reference_route(num_steps, shift)
        upper, lower = route[:-1], route[1:]
    else:
        upper, lower = torch.tensor(math.pi / 2), torch.tensor(0.0)
    rows = []
    # Row by row, because a vectorised kernel may round an element differently at another place in a batch.
    for row_generator in per_prompt_generators(generator, batch_size):
        draw_device = device if row_generator is None else row_generator.device
        if scheme == "logit_normal":
            normal = torch.randn(num_steps - 1, generator=row_generator, device=draw_device)
            angles = torch.atan(torch.exp(logit_mean + logit_std * normal) / sigma_data)
        else:
            # In (0, 1]: an angle of 0 would have infinite weight.
            uniform = 1 - torch.rand(num_steps - 1, generator=row_generator, device=draw_device)
            angles = lower.to(draw_device) + (upper - lower).to(draw_device) * uniform
        angles = angles.clamp(max=_BELOW_HALF_PI).sort(descending=True).values
        rows.append(torch.cat([angles.new_full((1,), math.pi / 2), angles]))
    return to_device(torch.stack(rows), device)


def rotate(sample: torch.Tensor, velocity: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Take one step of the TrigFlow ODE towards the clean latent (Eq. 9).

    Args:
        sample: x_t, (batch, channels, height, width).
        velocity: dx_t/dt at t, the shape of `sample`.
        delta: t minus the angle to arrive at, radians, (batch,).

    Returns:
        x at t - delta, the shape of `sample`.
    """
    delta = broadcast_time(delta, sample)
    return torch.cos(delta) * sample - torch.sin(delta) * velocity


def equivalent_noise(sample: torch.Tensor, pred_original_sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Recover the noise that would carry a clean latent to a sample at once (Eq. 8).

    Args:
        sample: x_t, (batch, channels, height, width).
        pred_original_sample: the predicted x_0, the shape of `sample`.
        timestep: t in radians in (0, pi/2], (batch,).

    Returns:
        (x_t - cos(t) x_0) / sin(t), the shape of `sample`.
    """
    timestep = broadcast_time(timestep, sample)
    return (sample - torch.cos(timestep) * pred_original_sample) / torch.sin(timestep)


@torch.no_grad()
def record_trajectory(
    teacher: TrigFlowTransformer,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    text: Text,
    negative_text: Text | None,
    guidance_scale: torch.Tensor,
    *,
    noise_rows: int = 0,
    sigma_data: float = SIGMA_DATA,
) -> Recording:
    """Generate from noise with the teacher and keep every sample and velocity but the first (Eq. 9).

    Velocities are under classifier-free guidance, both branches in one batch of 2B rows. A teacher that embeds
    guidance is called with the scale as an input instead, and the negative prompt is not used.

    Args:
        teacher: the network F.
        noise: standard normal, (batch, channels, height, width).
        timesteps: t in radians, (batch, N), every row descending from pi/2.
        text: of the batch's prompts.
        negative_text: of one negative prompt, or one for each; None only for a teacher that embeds guidance.
        guidance_scale: classifier-free guidance weight, (batch,).
        noise_rows: how many of a prompt's first rows are its noise, at pi/2, in place of points of its trajectory; for
            losses that are defined there, as the consistency loss is not.
        sigma_data: standard deviation of the latents.

    Returns:
        The training rows and the generated latents, in float32 or wider.

    Raises:
        ValueError: if `timesteps` or `guidance_scale` does not fit the batch, `noise_rows` is more than there are, or
            `negative_text` is None and the teacher needs it.
    """
    batch_size = noise.shape[0]
    if timesteps.ndim != 2 or timesteps.shape[0] != batch_size or timesteps.shape[1] < 2:
        raise ValueError(f"`timesteps` has shape {tuple(timesteps.shape)}, but it must be ({batch_size}, at least 2).")
    if guidance_scale.shape != (batch_size,):
        raise ValueError(f"`guidance_scale` has shape {tuple(guidance_scale.shape)}, but it must be ({batch_size},).")
    if not 0 <= noise_rows < timesteps.shape[1]:
        raise ValueError(
            f"`noise_rows` is {noise_rows}, but it must be 0 to {timesteps.shape[1] - 1}, a prompt's rows."
        )
    sample = sigma_data * noise.to(torch.promote_types(noise.dtype, torch.float32))
    timesteps = timesteps.to(sample.dtype)
    branches = guidance_branches(teacher, text, negative_text)
    latents = []
    velocities = []
    next_timesteps = torch.cat([timesteps[:, 1:], torch.zeros_like(timesteps[:, :1])], dim=1)
    with teacher.backbone.keep_text(teacher.transformer) as kept:
        for t, next_t in zip(timesteps.unbind(1), next_timesteps.unbind(1), strict=True):
            velocity = sigma_data * guided_output(teacher, sample / sigma_data, t, branches, guidance_scale)
            branches = kept(branches)
            latents.append(sample)
            velocities.append(velocity)
            sample = rotate(sample, velocity, t - next_t)
    points = slice(1 + noise_rows, None)
    return Recording(
        latents=torch.stack(noise_rows * latents[:1] + latents[points], dim=1),
        velocity=torch.stack(noise_rows * velocities[:1] + velocities[points], dim=1),
        timesteps=torch.cat([timesteps[:, :1].expand(-1, noise_rows), timesteps[:, points]], dim=1),
        pred_original_sample=sample,
        text=text,
        guidance_scale=guidance_scale,
    )
