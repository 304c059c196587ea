"""Time embedded through sinusoids of 1000 s, as many families do, and what consistency training makes of it.

Sinusoids of periods from 6 to 60,000 let the embedding, and the network with it, jitter between neighbouring s. A
network in dense time sees the slow ones alone, and is still given 1000 s by its stock pipeline.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import nn


PROJECTED_TIME = 1000.0  # times s: what the sinusoids are of
STEEPEST = math.pi  # slope in s of a slow sinusoid: half a period over [0, 1]
POINTS = 4001  # times in [0, 1] that slopes are measured between


def time_layers(embedder: nn.Module) -> tuple[Any, Any]:
    """Give the two linear layers that sinusoids pass, whatever they are called.

    Args:
        embedder: a family's `TIME_EMBEDDER`: a linear layer, an activation and a linear layer.

    Returns:
        The first and the second.
    """
    first, _, second = embedder.children()
    return first, second


def time_embedding_name(transformer: nn.Module) -> str:
    """Name the part of a network that has the sinusoids of time, `time_proj`, and their `timestep_embedder`."""
    return next(name for name, part in transformer.named_children() if hasattr(part, "time_proj"))


def time_embedding_of(transformer: nn.Module) -> Any:
    """Give the part that `time_embedding_name` names."""
    return transformer.get_submodule(time_embedding_name(transformer))


def slow_sinusoids(projection: Timesteps) -> torch.Tensor:
    """Say which sinusoids of 1000 s are smooth in s.

    Args:
        projection: diffusers' sinusoids.

    Returns:
        Whether the slope is `STEEPEST` at most, (channels,), on the CPU.
    """
    changes = projection(PROJECTED_TIME / projection.scale * torch.linspace(0, 1, POINTS)).diff(dim=0)
    return changes.abs().amax(0) * (POINTS - 1) <= STEEPEST


def slow_features(projection: Timesteps, time: torch.Tensor) -> torch.Tensor:
    """Give what an embedder in dense time sees of times.

    Args:
        projection: diffusers' sinusoids.
        time: 1000 s over the projection's own scale, (batch,).

    Returns:
        The slow sinusoids, and 0 for the fast ones, (batch, channels), float32.
    """
    return projection(time) * slow_sinusoids(projection).to(time.device)


def sees_slow_sinusoids_only(projection: Timesteps, embedder: nn.Module) -> bool:
    """Say whether an embedder gives fast sinusoids no weight.

    Args:
        projection: diffusers' sinusoids.
        embedder: what sees them.

    Returns:
        Whether it is one in dense time.
    """
    weight = time_layers(embedder)[0].weight
    return not weight[:, ~slow_sinusoids(projection).to(weight.device)].any()


def in_dense_time(transformer: nn.Module, scale: float) -> bool:
    """Say whether a network sees slow sinusoids of 1000 s alone, as consistency training wants it."""
    embed = time_embedding_of(transformer)
    return sees_slow_sinusoids_only(embed.time_proj, embed.timestep_embedder)


def modulation(transformer: nn.Module, embedded: torch.Tensor) -> torch.Tensor:
    """Give what a network's blocks are modulated by, were time all that modulates them.

    Args:
        transformer: whose blocks have adaptive layer norms.
        embedded: the conditioning vector, as `embed_time` gives it, (batch, inner_dim).

    Returns:
        Shifts, scales and gates of all blocks, (batch, features).
    """
    norms: list[Any] = [
        norm for norm in transformer.modules() if isinstance(norm, AdaLayerNormZero | AdaLayerNormZeroSingle)
    ]
    return torch.cat([norm.linear(norm.silu(embedded)) for norm in norms], dim=1)


class WideTimestepEmbedding(TimestepEmbedding):
    """diffusers' embedding of sinusoids, in float32 under autocast too: its tangent spikes in bf16.

    Sinusoids without weight stay so in training: Adam would soon give the fast ones as much as the slow ones.

    Args:
        embedder: whose layers it takes over.
    """

    seen: torch.Tensor

    def __init__(self, embedder: TimestepEmbedding) -> None:
        super().__init__(embedder.linear_1.in_features, embedder.linear_1.out_features)
        self.linear_1, self.linear_2 = embedder.linear_1, embedder.linear_2
        self.register_buffer("seen", embedder.linear_1.weight.detach().any(dim=0), persistent=False)

    def forward(self, sample: torch.Tensor, condition: None = None) -> torch.Tensor:
        """Embed sinusoids, (batch, channels), in the layers' own dtype."""
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward((sample * self.seen).to(self.linear_1.weight.dtype))


class WideTimeEmbedding(nn.Module):
    """A network's embedding of time through sinusoids, in float32 under autocast too, as `WideTimestepEmbedding` is.

    Args:
        embed: diffusers' module, whose parts it takes over.
    """

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.time_proj, self.timestep_embedder = embed.time_proj, WideTimestepEmbedding(embed.timestep_embedder)

    def forward(self, timestep: torch.Tensor, *activations: Any) -> torch.Tensor:
        """Embed times, (batch,); the dtype of `activations`, whatever says it, is not followed."""
        return self.timestep_embedder(self.time_proj(timestep))


def copy_wide(teacher: Any, name: str, wide: Callable[[Any], nn.Module]) -> Any:
    """Copy a teacher into a trainable student, which is equal to it and embeds time in float32.

    Args:
        teacher: the network to copy; it is left as it is.
        name: of the part that embeds time.
        wide: makes of it what takes its place.

    Returns:
        The student, on the teacher's device and in its dtype, every parameter trainable.
    """
    student = copy.deepcopy(teacher)
    student.set_submodule(name, wide(student.get_submodule(name)))
    return student.requires_grad_(True)


def make_student(teacher: Any) -> Any:
    """As `copy_wide`, of a teacher whose time is embedded beside other conditions."""
    return copy_wide(teacher, f"{time_embedding_name(teacher)}.timestep_embedder", WideTimestepEmbedding)
