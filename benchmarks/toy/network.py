"""The networks: a small one and the exact velocity, with as much of a family's face as the library's functions ask."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from diffusers_tbcm.backbones import Backbone
from diffusers_tbcm.flow import add_flow_noise
from diffusers_tbcm.text import Text
from diffusers_tbcm.trigflow import TrigFlowTransformer

from .mixture import CLASSES, exact_velocity, real_samples, text_of


FREQUENCIES = 6
EMPTY_SHARE = 0.1


class Exact(nn.Module):
    """The exact velocity as a network."""

    def forward(self, sample: torch.Tensor, s: torch.Tensor, **words: torch.Tensor) -> torch.Tensor:
        return exact_velocity(sample, s, **words)


class Network(nn.Module):
    """The velocity by three hidden layers."""

    def __init__(self, width: int = 256, dim: int = 2) -> None:
        super().__init__()
        sizes = [dim + 2 * FREQUENCIES + CLASSES, width, width, width]
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(
        self,
        sample: torch.Tensor,
        s: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        angles = s[:, None] * torch.arange(1, FREQUENCIES + 1)
        return self.layers(torch.cat([sample, angles.sin(), angles.cos(), encoder_hidden_states[:, 0]], dim=1))


class Family:
    """What the library asks of a network's family in training: no guidance input, no scaling of time, nothing kept."""

    RESCALE_GUIDED = None

    def timestep_scale(self, network: nn.Module) -> float:
        return 1.0

    def embeds_guidance(self, network: nn.Module) -> bool:
        return False

    def make_ready(self, network: nn.Module) -> None:
        pass

    def keep_text(self, network: nn.Module) -> AbstractContextManager[Callable[[Text], Text]]:
        return nullcontext(lambda text: text)

    def velocity(self, network: nn.Module, sample: Any, time: Any, text: Text, guidance: None) -> Any:
        return network(sample, time, **text.arguments())

    def embed_time(self, network: nn.Module, time: torch.Tensor, guidance: None) -> torch.Tensor:
        angles = time[:, None] * torch.arange(1, FREQUENCIES + 1)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


FAMILY = cast(Backbone, Family())


def trig(network: nn.Module) -> TrigFlowTransformer:
    """A velocity seen as TrigFlow's F."""
    return TrigFlowTransformer(network, backbone=FAMILY)


def pretrain(steps: int = 3000, seed: int = 0, *, width: int = 256, dim: int = 2, batch_size: int = 256) -> Network:
    """Fit a network to the exact velocity."""

    def loss(network: Network, generator: torch.Generator) -> torch.Tensor:
        classes = torch.randint(CLASSES, (batch_size,), generator=generator)
        s = torch.rand(batch_size, generator=generator)
        noise = torch.randn(batch_size, dim, generator=generator)
        sample = add_flow_noise(real_samples(classes, generator, dim), noise, s)
        words = text_of(classes).arguments()
        return (network(sample, s, **words) - exact_velocity(sample, s, **words)).square().mean()

    return _fit(loss, steps, seed, width=width, dim=dim, learning_rate=1e-3)


def learn(steps: int, seed: int = 0, *, width: int = 256, dim: int = 2, batch_size: int = 512) -> Network:
    """Teach a network from samples, as a real teacher is: flow matching, every tenth prompt empty."""

    def loss(network: Network, generator: torch.Generator) -> torch.Tensor:
        classes = torch.randint(CLASSES, (batch_size,), generator=generator)
        kept = torch.rand(batch_size, generator=generator) >= EMPTY_SHARE
        s = torch.rand(batch_size, generator=generator)
        original = real_samples(classes, generator, dim)
        noise = torch.randn(batch_size, dim, generator=generator)
        words = text_of(classes).arguments()
        words["encoder_hidden_states"] = words["encoder_hidden_states"] * kept[:, None, None]
        velocity = network(add_flow_noise(original, noise, s), s, **words)
        return (velocity - (noise - original)).square().mean()

    return _fit(loss, steps, seed, width=width, dim=dim, learning_rate=2e-3)


def _fit(
    loss: Callable[[Network, torch.Generator], torch.Tensor],
    steps: int,
    seed: int,
    *,
    width: int,
    dim: int,
    learning_rate: float,
) -> Network:
    """Train a new network on a loss of random batches, the rate falling to 0 by a cosine."""
    torch.manual_seed(seed)
    network = Network(width, dim)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network, generator).backward()
        optimizer.step()
        schedule.step()
    return network
