"""Distribution matching's losses: the critic's, and what the student is told by it and the teacher.

CDM's (arXiv 2605.06376, Sec. 3); DMD (arXiv 2311.18828) uses the same two, under guidance and without CA.

Everything is told apart by clean predictions D(x_s, s) = x_s - s v: D_R is the teacher's, D_F the critic's, at
z = (1 - tau) x_0 + tau e of the student's own prediction x_0.
"""

import torch
from torch import nn

from .draws import per_prompt_generators
from .flow import broadcast_time
from .transfer import to_device


TAU_RANGE = (0.02, 0.98)
MIN_DISTANCE = 0.1  # of a prediction from the teacher's: no weight is above its inverse
CRITIC_MERGE = 0.001  # share of the student that flows into the critic at every step of it


def draw_tau(upper: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
    """Draw times to noise predictions to: tau ~ U(0, upper), clamped to [0.02, 0.98].

    Args:
        upper: the largest time of every sample, (batch,): 1, or for CA the anchor's own time.
        generator: one per sample, or one for all, on the CPU.

    Returns:
        (batch,), on the device of `upper`.
    """
    generators = per_prompt_generators(generator, len(upper))
    uniform = torch.stack([torch.rand((), generator=one) for one in generators])
    return (to_device(uniform.to(upper.dtype), upper.device) * upper).clamp(*TAU_RANGE)


def critic_loss(velocity: torch.Tensor, original_sample: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Teach the critic the student's own distribution: mean ||F(z, tau) - (e - b)||^2.

    Args:
        velocity: F(z, tau), with gradient, (batch, ...).
        original_sample: b, what the student predicted at an anchor, the shape of `velocity`.
        noise: e of z, the shape of `velocity`.

    Returns:
        A scalar.
    """
    return (velocity - (noise - original_sample)).square().mean()


def matching_weight(prediction: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Weigh a sample: w = 1 / max(mean |D_R - x_0|, 0.1).

    Args:
        prediction: x_0 of the student, (batch, ...).
        real: D_R, the shape of `prediction`.

    Returns:
        w, (batch,).
    """
    return 1 / (real - prediction).abs().flatten(1).mean(1).clamp(min=MIN_DISTANCE)


def matching_loss(prediction: torch.Tensor, direction: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Push predictions along a direction: mean (x_0 - sg[x_0 + w Delta])^2, so d/dx_0 is -2 w Delta / numel.

    Args:
        prediction: x_0 of the student, with gradient, (batch, ...).
        direction: Delta, the shape of `prediction`.
        real: D_R, for the weight w.

    Returns:
        A scalar.
    """
    with torch.no_grad():
        weight = broadcast_time(matching_weight(prediction, real), prediction)
        target = prediction + weight * direction
    return (prediction - target).square().mean()


def augmentation_loss(
    prediction: torch.Tensor, real: torch.Tensor, unconditional: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Classifier-free guidance as a loss (CA): Delta = alpha (D_R(z, c) - D_R(z, empty)).

    Args:
        prediction: x_0 of the student, with gradient, (batch, ...).
        real: D_R(z, c), the shape of `prediction`.
        unconditional: D_R(z, empty), the shape of `prediction`.
        alpha: the teacher's guidance scale less 1.

    Returns:
        A scalar.
    """
    return matching_loss(prediction, alpha * (real - unconditional), real)


def distribution_loss(prediction: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Distribution matching (DM at anchors, CDM off the trajectory): Delta = D_R(z, c) - D_F(z, c).

    CDM takes the teacher's D_R without guidance, and CA beside it; DMD takes it under guidance.

    Args:
        prediction: x_0 of the student, with gradient, (batch, ...).
        real: D_R(z, c), the shape of `prediction`.
        fake: D_F(z, c), the shape of `prediction`.

    Returns:
        A scalar.
    """
    return matching_loss(prediction, real - fake, real)


@torch.no_grad()
def merge_critic(critic: nn.Module, student: nn.Module, share: float = CRITIC_MERGE) -> None:
    """Let a little of the student flow into the critic, in place: F <- (1 - share) F + share student.

    What is frozen, as the base of LoRA adapters is, stays, and so does what the critic alone has.

    Args:
        critic: a module that has the student's parameters by name.
        student: the module.
        share: of the student.
    """
    for name, parameter in student.named_parameters():
        fake = critic.get_parameter(name)
        if fake.requires_grad:
            fake.lerp_(parameter.to(fake.dtype), share)
