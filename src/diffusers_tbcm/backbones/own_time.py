"""How time is scaled for networks that are given s, or 1 - s, and multiply it by 1000 themselves."""

from typing import Any

from ..text import Text


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
