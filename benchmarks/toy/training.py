"""How a student is trained and judged, the same for all methods."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from diffusers_tbcm.flow import FlowTransformer
from diffusers_tbcm.rows import Recording
from diffusers_tbcm.trigflow import SIGMA_DATA, consistency_output

from .mixture import CLASSES, energy_distance, ode_ends, text_of
from .network import FAMILY, Network, trig


BATCH_SIZE, CLIP, WARMUP = 512, 1.0, 50
POINTS = 4096


@dataclass
class Phase:
    """So many updates of one loss; the learning rate rises for 50 of them and falls to zero by a cosine."""

    loss: nn.Module
    updates: int
    learning_rate: float

    def decay(self, step: int) -> float:
        return min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / self.updates)) / 2


def distil(start: Network, recording: Recording, phases: Sequence[Phase], seed: int) -> Network:
    """Train a copy of a network on rows drawn at random from a recording."""
    torch.manual_seed(seed)
    network = copy.deepcopy(start)
    student = trig(network)
    for phase in phases:
        parameters = [*network.parameters(), *phase.loss.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=phase.learning_rate, weight_decay=0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, phase.decay)
        for _ in range(phase.updates):
            rows = recording.rows(torch.randint(len(recording), (BATCH_SIZE,)))
            optimizer.zero_grad()
            phase.loss(student, rows).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
    return network


class Judge:
    """Compares one-step samples with the ends of the teacher's guided ODE; lengths are of TrigFlow's latents.

    Args:
        teacher: the velocity.
        guidance: classifier-free guidance weight.
        dim: of the data.
    """

    def __init__(self, teacher: nn.Module, guidance: float, dim: int = 2, points: int = POINTS) -> None:
        generator = torch.Generator().manual_seed(99)
        classes = torch.arange(2 * points) % CLASSES
        noise = torch.randn(2 * points, dim, generator=generator)
        ends = SIGMA_DATA * ode_ends(FlowTransformer(teacher, backbone=FAMILY), noise, classes, guidance)
        self.classes, self.noise, self.ends = classes[:points], noise[:points], ends[:points]
        self.others = ends[points:]  # from other noises

    @torch.no_grad()
    def draw(self, network: nn.Module) -> torch.Tensor:
        """One step from the judge's noises, (points, dim)."""
        t = torch.full((len(self.noise),), math.pi / 2)
        output = trig(network)(self.noise, t, **text_of(self.classes).arguments())
        return consistency_output(SIGMA_DATA * self.noise, output, t)

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """RMSE per element to the end from the same noise; energy distance of a class to ends from other noises; share
        of samples nearer to their end than to its mirror image."""
        drawn = self.draw(network)
        near = (drawn - self.ends).square().sum(1) < (drawn + self.ends).square().sum(1)
        distances = [
            energy_distance(drawn[self.classes == one], self.others[self.classes == one]) for one in range(CLASSES)
        ]
        return {
            "RMSE": float((drawn - self.ends).square().mean().sqrt()),
            "energy distance": sum(distances) / CLASSES,
            "right mode": float(near.float().mean()),
        }
