"""CDM's rollout: the student's own way from noise, by a schedule that is new every time (arXiv 2605.06376, Sec. 3)."""

from collections.abc import Callable

import torch

from .draws import per_prompt_generators
from .flow import broadcast_time, flow_prediction, flow_step, shift_sigmas
from .rows import Recording
from .text import Text
from .transfer import to_device


Velocity = Callable[..., torch.Tensor]  # v(x_s, s, **text.arguments())

MAX_ROLLOUT_STEPS = 28
ANCHOR_RANGE = (0.25, 0.95)  # the published code's; its authors advise (0.02, 0.98) to start from


def draw_sigmas(
    generator: torch.Generator,
    *,
    max_steps: int = MAX_ROLLOUT_STEPS,
    anchor_range: tuple[float, float] = ANCHOR_RANGE,
    shift: float = 1.0,
    stratified: bool = False,
) -> torch.Tensor:
    """Draw a dynamic schedule: N ~ U{1..max_steps}, s_1 = 1, N - 1 sorted draws from U(anchor_range), all shifted.

    Args:
        generator: on the CPU; every process has to use one that gives the same numbers.
        max_steps: the largest N.
        anchor_range: between which times the inner anchors lie, before the shift.
        shift: the static shift k of the scheduler, s -> k s / (1 + (k - 1) s).
        stratified: draw one anchor in each of N - 1 equal parts of the range instead.

    Returns:
        N + 1 times in [0, 1], float32, descending from 1 to 0.

    Raises:
        ValueError: where `max_steps` is below 1, or `anchor_range` does not ascend within [0, 1].
    """
    low, high = anchor_range
    if max_steps < 1:
        raise ValueError(f"`max_steps` is {max_steps}: a rollout has at least one step")
    if not 0 <= low < high <= 1:
        raise ValueError(f"`anchor_range` is {low:g} {high:g}: it has to ascend and lie in [0, 1]")
    steps = int(torch.randint(1, max_steps + 1, (), generator=generator))
    inner = torch.rand(steps - 1, generator=generator)
    if stratified:
        inner = (torch.arange(steps - 1) + inner) / max(1, steps - 1)
    inner = (low + (high - low) * inner).sort(descending=True).values
    return shift_sigmas(torch.cat([torch.ones(1), inner, torch.zeros(1)]), shift)


def draw_anchors(
    num_steps: int, batch_size: int, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """Draw the point of its rollout that a sample is trained at: i ~ U{0..N - 1}; the clean end is none.

    Args:
        num_steps: N.
        batch_size: number of samples.
        generator: one per sample, or one for all, on the CPU.

    Returns:
        (batch,) integers.
    """
    generators = per_prompt_generators(generator, batch_size)
    return torch.stack([torch.randint(num_steps, (), generator=one) for one in generators])


@torch.no_grad()
def record_rollout(
    student: Velocity,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    anchors: torch.Tensor,
    text: Text,
    *,
    last_anchor: int | None = None,
) -> Recording:
    """Generate from noise with the student, x_{i+1} = x_i + (s_{i+1} - s_i) v(x_i, s_i), and keep one point of each.

    The rollout ends where the last anchor lies.

    Args:
        student: the velocity; no guidance.
        noise: standard normal, (batch, channels, height, width).
        sigmas: s_1 = 1 to s_{N+1} = 0, (N + 1,).
        anchors: which point to keep, (batch,) integers below N.
        text: of the batch's prompts.
        last_anchor: the largest anchor of all processes, where they have to take the same number of steps.

    Returns:
        One row a prompt: x_i, v_i, s_i, and the local prediction D = x_i - s_i v_i, in float32 or wider.
    """
    sample = noise.to(torch.promote_types(noise.dtype, torch.float32))
    batch_size, times = len(sample), to_device(sigmas.to(sample.dtype), sample.device)
    last_anchor = int(anchors.max()) if last_anchor is None else last_anchor
    anchors = to_device(anchors, sample.device)
    latents, velocities = torch.zeros_like(sample), torch.zeros_like(sample)
    for step in range(last_anchor + 1):
        s, next_s = times[step].expand(batch_size), times[step + 1].expand(batch_size)
        velocity = student(sample, s, **text.arguments())
        here = broadcast_time(anchors == step, sample)
        latents, velocities = torch.where(here, sample, latents), torch.where(here, velocity, velocities)
        sample = flow_step(sample, velocity, s, next_s)
    return Recording(
        latents=latents[:, None],
        velocity=velocities[:, None],
        timesteps=times[anchors][:, None],
        pred_original_sample=flow_prediction(latents, velocities, times[anchors]),
        text=text,
        guidance_scale=torch.ones_like(times[anchors]),
    )
