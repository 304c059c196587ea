"""How time gets into networks that are given s, or 1 - s, and multiply it by 1000 themselves."""

from typing import Any

import torch

from ..text import Text
from .time_embedding import (
    PROJECTED_TIME,
    WideTimeEmbedding,
    copy_wide,
    slow_features,
    time_embedding_name,
    time_embedding_of,
)


TIME_SCALE = 1.0  # of s, before the network sees it
DENSE_TIME_SCALE = TIME_SCALE


def timestep_scale(transformer: Any) -> float:
    """Say what s is multiplied by before the network sees it."""
    return TIME_SCALE


def name_timestep_scale(transformer: Any, scale: float) -> None:
    """Write nothing: the stock pipeline feeds every network the same."""
    assert scale == TIME_SCALE


def infer_timestep_scale(transformer: Any, text: Text) -> float:
    """As `timestep_scale`."""
    return TIME_SCALE


def embed_time(transformer: Any, time: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
    """Embed time as the network does before it adds what else it may, such as guidance and a pooled prompt.

    Args:
        transformer: the network.
        time: s, (batch,).
        guidance: of no effect.

    Returns:
        The conditioning vector, (batch, inner_dim).
    """
    embed = time_embedding_of(transformer)
    return embed.timestep_embedder(embed.time_proj(_projected(embed, time)).to(transformer.dtype))


def time_features(transformer: Any, time: torch.Tensor) -> torch.Tensor:
    """Give the sinusoids through which `TIME_EMBEDDER` sees time in a network in dense time.

    Args:
        transformer: the network.
        time: s, (batch,).

    Returns:
        (batch, channels), float32.
    """
    embed = time_embedding_of(transformer)
    return slow_features(embed.time_proj, _projected(embed, time))


def make_student(teacher: Any) -> Any:
    """As `time_embedding.copy_wide`, of a teacher that time alone modulates."""
    return copy_wide(teacher, time_embedding_name(teacher), WideTimeEmbedding)


def _projected(embed: Any, time: torch.Tensor) -> torch.Tensor:
    """1000 s, or s where the sinusoids multiply it by 1000 themselves."""
    return time * (PROJECTED_TIME / embed.time_proj.scale)
