"""What families answer alike whose tokens are 2 x 2 latent pixels: most pipelines pack them outside the network."""

from pathlib import Path
from typing import Any

import torch

from .autoencoder_kl import vae_scale_factor
from .patched import latent_size


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


def latent_shape(folder: Path, transformer: Any, resolution: int | None) -> tuple[int, ...]:
    """Say what shape a picture's latents have before they are packed, from the autoencoder's config alone.

    Args:
        folder: the pipeline's folder.
        transformer: its transformer.
        resolution: pixels a side; None for the stock pipeline's.

    Returns:
        (channels, height, width).

    Raises:
        ValueError: where the autoencoder and the packing do not allow the resolution.
    """
    return shape_before_packing(transformer, resolution, vae_scale_factor(folder))


def shape_before_packing(transformer: Any, resolution: int | None, factor: int) -> tuple[int, ...]:
    """As `latent_shape`, for an autoencoder of a given compression."""
    size = latent_size(resolution, native=NATIVE_SIZE, factor=factor, patch=PACK)
    return transformer.config["in_channels"] // PACK**2, size, size


def image_places(
    rows: int, columns: int, device: torch.device, *, kind: float = 0.0, first: float = 0.0
) -> torch.Tensor:
    """Give the places of a picture's tokens.

    Args:
        rows, columns: of tokens.
        device: where to compute.
        kind: what says that they are a picture's.
        first: the first row, and the first column.

    Returns:
        Kind, row and column, (tokens, 3), float32.
    """
    row, column = (torch.arange(size, dtype=torch.float32, device=device) + first for size in (rows, columns))
    places = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat([torch.full_like(places[:, :1], kind), places], dim=1)


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
