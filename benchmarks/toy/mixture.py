"""The data: four classes of two opposite modes each, the exact velocity of their flow, and the end of its ODE.

All is on the unit scale of flow matching, x_s = (1 - s) x_0 + s e; TrigFlow's latents are sigma_data = 0.5 times that.
"""

import math
from functools import cache
from itertools import pairwise

import torch
from torch import nn

from diffusers_tbcm.flow import FlowTransformer, flow_step
from diffusers_tbcm.guidance import guidance_branches, guided_output
from diffusers_tbcm.text import Text


RADIUS, STD, CLASSES = 1.5, 0.12, 4


@cache
def modes(dim: int = 2) -> torch.Tensor:
    """(8, dim): a class's two modes, opposite each other, stand side by side.

    Beyond the plane the modes lie on a plane turned at random, as far from the origin per element as in it.
    """
    angles = torch.tensor([math.pi * (number / CLASSES + side) for number in range(CLASSES) for side in range(2)])
    plane = RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)
    if dim == 2:
        return plane
    axes, _ = torch.linalg.qr(torch.randn(dim, 2, generator=torch.Generator().manual_seed(dim)))
    return math.sqrt(dim / 2) * plane @ axes.T


def text_of(classes: torch.Tensor) -> Text:
    """A class as a prompt: one token, one-hot."""
    return Text.unmasked(nn.functional.one_hot(classes, CLASSES).float()[:, None])


def empty_text() -> Text:
    """The empty prompt: a token of zeros."""
    return Text.unmasked(torch.zeros(1, 1, CLASSES))


def real_samples(classes: torch.Tensor, generator: torch.Generator, dim: int = 2) -> torch.Tensor:
    """Draw from the mixture, (batch, dim)."""
    side = torch.randint(2, classes.shape, generator=generator)
    return modes(dim)[2 * classes + side] + STD * torch.randn(len(classes), dim, generator=generator)


def exact_velocity(
    sample: torch.Tensor, s: torch.Tensor, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor
) -> torch.Tensor:
    """E[e - x_0 | x_s] of a class's modes; of all modes for a token of zeros, the empty prompt."""
    s, centres = s[:, None, None], modes(sample.shape[1])
    offset = sample[:, None] - (1 - s) * centres
    variance = ((1 - s) * STD) ** 2 + s**2
    member = encoder_hidden_states[:, 0].repeat_interleave(2, dim=1)
    member = torch.where(member.sum(1, keepdim=True) == 0, torch.ones_like(member), member)
    logits = -offset.square().sum(-1) / (2 * variance[..., 0])
    share = logits.masked_fill(member == 0, -torch.inf).softmax(1)[..., None]
    clean = centres + (1 - s) * STD**2 / variance * offset
    return (share * (s / variance * offset - clean)).sum(1)


@torch.no_grad()
def ode_ends(
    teacher: FlowTransformer, noise: torch.Tensor, classes: torch.Tensor, guidance: float, steps: int = 200
) -> torch.Tensor:
    """Follow the guided flow from noise to its end by Heun's method, (batch, dim)."""
    branches = guidance_branches(teacher, text_of(classes), empty_text())
    scale = torch.full((len(noise),), guidance)

    def velocity(sample: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return guided_output(teacher, sample, s, branches, scale)

    sample = noise
    for s, next_s in pairwise(torch.linspace(1, 0, steps + 1)[:, None].expand(-1, len(noise))):
        here = velocity(sample, s)
        there = velocity(flow_step(sample, here, s, next_s), next_s)
        sample = flow_step(sample, (here + there) / 2, s, next_s)
    return sample


def energy_distance(samples: torch.Tensor, others: torch.Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, of pairs of different points."""

    def within(points: torch.Tensor) -> torch.Tensor:
        return torch.cdist(points, points).sum() / (len(points) * (len(points) - 1))

    return float(2 * torch.cdist(samples, others).mean() - within(samples) - within(others))
