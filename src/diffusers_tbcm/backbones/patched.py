"""What networks of one kind of patches and blocks answer alike, in whatever family."""

from typing import Any

import torch
from torch import nn


PACK = 2  # latent pixels a side of a token, of families whose latents are packed outside the network


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


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Put the latent pixels of a token side by side, as stock pipelines with packed latents do.

    Args:
        latents: (batch, channels, height, width).

    Returns:
        Row by row, (batch, height width / 4, 4 channels).
    """
    batch, channels, height, width = latents.shape
    tokens = latents.reshape(batch, channels, height // PACK, PACK, width // PACK, PACK).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, height * width // PACK**2, channels * PACK**2)


def unpack(tokens: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Undo `pack`.

    Args:
        tokens: (batch, height width / 4, 4 channels).
        shape: (batch, channels, height, width).

    Returns:
        The latents, of `shape`.
    """
    batch, channels, height, width = shape
    rows, columns = height // PACK, width // PACK
    latents = tokens.reshape(batch, rows, columns, channels, PACK, PACK).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(shape)


def blocks(transformer: Any) -> list[nn.Module]:
    """Give the network's blocks, in order."""
    return list(transformer.transformer_blocks)


def after_blocks(transformer: Any) -> nn.Module:
    """Give what a forward calls after the last block."""
    return transformer.norm_out
