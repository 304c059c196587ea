"""Training rows from pictures: the points that sCM and Sana-Sprint distil at (arXiv 2410.11081, 2503.09641).

TBCM takes its rows from the teacher's own generation; these lie on the way from a real latent to noise.
"""

import math

import torch

from .draws import per_prompt_generators
from .flow import broadcast_time
from .guidance import guidance_branches, guided_output
from .rows import Recording
from .text import Text
from .trajectory import sample_timesteps
from .transfer import to_device
from .trigflow import SIGMA_DATA, TrigFlowTransformer


def sample_diffusion_timesteps(
    batch_size: int,
    *,
    logit_mean: float = 0.2,
    logit_std: float = 1.6,
    sigma_data: float = SIGMA_DATA,
    largest_probability: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw one time per row, t = atan(exp(n) / sigma_data) with n normal (arXiv 2410.11081, Algorithm 1).

    Args:
        batch_size: number of rows.
        logit_mean: P_mean, the mean of n.
        logit_std: P_std, the standard deviation of n.
        sigma_data: standard deviation of the latents.
        largest_probability: chance of pi/2 instead, in [0, 1]. The consistency loss has no weight there; it is for
            what Sana-Sprint's discriminator judges.
        generator: one per row (its time then depends on its own only), or one for all.
        device: where the result lies; the numbers are drawn where the generator is.

    Returns:
        Angles in radians in (0, pi/2], (batch,), float32.

    Raises:
        ValueError: if `largest_probability` is outside [0, 1], or a generator list has another length than
            `batch_size`.
    """
    if not 0 <= largest_probability <= 1:
        raise ValueError(f"`largest_probability` is {largest_probability}, but it must be in [0, 1].")
    route = sample_timesteps(
        "logit_normal",
        batch_size,
        num_steps=2,  # pi/2 and one draw
        logit_mean=logit_mean,
        logit_std=logit_std,
        sigma_data=sigma_data,
        generator=generator,
        device=device,
    )
    timesteps = route[:, 1]
    if largest_probability == 0:
        return timesteps
    draws = [
        torch.rand((), generator=own, device=device if own is None else own.device)
        for own in per_prompt_generators(generator, batch_size)
    ]
    return timesteps.where(to_device(torch.stack(draws), timesteps.device) >= largest_probability, math.pi / 2)


def diffuse(
    original_sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, sigma_data: float = SIGMA_DATA
) -> torch.Tensor:
    """Noise clean latents, x_t = cos(t) x_0 + sin(t) sigma_data e.

    Args:
        original_sample: x_0 with standard deviation `sigma_data`, (batch, channels, height, width).
        noise: e, standard normal, the shape of `original_sample`.
        timesteps: t in radians, (batch,).
        sigma_data: standard deviation of the latents.

    Returns:
        x_t, the shape of `original_sample`, in float32 or wider.
    """
    wide = torch.promote_types(original_sample.dtype, torch.float32)
    timesteps = broadcast_time(timesteps.to(wide), original_sample)
    return torch.cos(timesteps) * original_sample.to(wide) + torch.sin(timesteps) * sigma_data * noise.to(wide)


@torch.no_grad()
def diffusion_rows(
    teacher: TrigFlowTransformer,
    image_latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    text: Text,
    negative_text: Text | None,
    guidance_scale: torch.Tensor,
    *,
    sigma_data: float = SIGMA_DATA,
) -> Recording:
    """Make training rows from pictures: x_t by noising their latents, dx_t/dt from the teacher under guidance.

    Args:
        teacher: the frozen network; one that embeds guidance is given the scale and called once a row, any other one
            twice, both branches in one batch.
        image_latents: the pictures' latents times the autoencoder's scaling factor, (rows, channels, height, width).
        noise: standard normal, the shape of `image_latents`.
        timesteps: t in radians, (rows,).
        text: of the pictures' captions.
        negative_text: of one negative prompt, or one a row; None only for a teacher that embeds guidance.
        guidance_scale: classifier-free guidance weight, (rows,).
        sigma_data: standard deviation of the rows' latents.

    Returns:
        The rows in float32 or wider; `pred_original_sample` is the picture's own latent, times `sigma_data`.

    Raises:
        ValueError: if `timesteps` or `guidance_scale` does not fit the batch, or `negative_text` is None and
            the teacher needs it.
    """
    rows = (len(image_latents),)
    for name, value in (("timesteps", timesteps), ("guidance_scale", guidance_scale)):
        if value.shape != rows:
            raise ValueError(f"`{name}` has shape {tuple(value.shape)}, but it must be {rows}.")
    branches = guidance_branches(teacher, text, negative_text)
    original_sample = sigma_data * image_latents.to(torch.promote_types(image_latents.dtype, torch.float32))
    latents, timesteps = diffuse(original_sample, noise, timesteps, sigma_data), timesteps.to(original_sample.dtype)
    velocity = sigma_data * guided_output(teacher, latents / sigma_data, timesteps, branches, guidance_scale)
    return Recording(
        latents=latents.unsqueeze(1),
        velocity=velocity.unsqueeze(1),
        timesteps=timesteps.unsqueeze(1),
        pred_original_sample=original_sample,
        text=text,
        guidance_scale=guidance_scale,
    )
