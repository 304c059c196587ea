"""What families answer alike whose tokens are 2 x 2 latent pixels: most pipelines pack them outside the network."""

from typing import Any

import torch


PACK = 2  # latent pixels a side of a token
NATIVE_SIZE = 128  # latent pixels a side of the stock pipelines' own pictures


def native_size(transformer: Any) -> int:
    """Say how many latent pixels a side a network's own pictures have."""
    return NATIVE_SIZE


def image_tokens(transformer: Any, shape: tuple[int, ...]) -> int:
    """Say how many tokens a picture is, which a dynamic shift of times depends on.

    Args:
        transformer: the network.
        shape: of its latents, from `latent_shape`.

    Returns:
        The number of packed latents.
    """
    return (shape[-2] // PACK) * (shape[-1] // PACK)


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
