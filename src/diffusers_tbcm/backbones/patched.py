"""What networks of one kind of patches and blocks answer alike, in whatever family."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def image_tokens(transformer: Any, shape: tuple[int, ...]) -> int:
    """Say how many tokens a picture is, which a dynamic shift of times depends on.

    Args:
        transformer: the network.
        shape: of its latents, from `latent_shape`.

    Returns:
        The number of patches.
    """
    patch = transformer.config["patch_size"]
    return (shape[-2] // patch) * (shape[-1] // patch)


def latent_size(resolution: int | None, *, native: int, factor: int, patch: int, largest: int | None = None) -> int:
    """Say how many latent pixels a side a square picture has.

    Args:
        resolution: pixels a side; None for the network's own.
        native: latent pixels a side of the network's own pictures.
        factor: pixels a side that a latent pixel stands for.
        patch: latent pixels a side of a token.
        largest: most pixels a side that the network knows places of; None for no limit.

    Returns:
        The number.

    Raises:
        ValueError: for a resolution that is no multiple of a token, or too large.
    """
    if resolution is None:
        return native
    multiple = factor * patch
    if resolution < multiple or resolution % multiple or (largest is not None and resolution > largest):
        limit = "" if largest is None else f", {largest} at most"
        raise ValueError(f"`resolution` is {resolution}: it has to be a positive multiple of {multiple} pixels{limit}")
    return resolution // factor


def blocks(transformer: Any) -> list[nn.Module]:
    """Give the network's blocks, in order."""
    return list(transformer.transformer_blocks)


def double_and_single_blocks(transformer: Any) -> list[nn.Module]:
    """As `blocks`, of a network whose last blocks have text and picture in one stream."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def after_blocks(transformer: Any) -> nn.Module:
    """Give what a forward calls after the last block."""
    return transformer.norm_out


def inner_dim(transformer: Any) -> int:
    """Give the size of the network's hidden states."""
    return transformer.inner_dim


def make_ready(transformer: Any) -> None:
    """Leave the network as it is: prompts are not shared, as the picture changes the text of every row."""


@contextmanager
def keep_text(transformer: Any) -> Iterator[Any]:
    """Keep nothing of the text over calls, for the reason of `make_ready`."""
    yield lambda text: text
