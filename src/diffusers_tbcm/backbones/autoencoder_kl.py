"""Latents of diffusers' AutoencoderKL, whose unit scale has a shift: what its families share."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..files import read_json
from .loading import load_network


def load_vae(folder: Path, variant: str | None = None) -> AutoencoderKL:
    """Load the autoencoder of a pipeline folder, in float32; arguments and errors are those of `load_network`."""
    return load_network(AutoencoderKL, folder, "vae", variant)


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pictures, each to the mean of its distribution.

    Args:
        vae: the autoencoder.
        pixels: in [-1, 1], (batch, 3, height, width).

    Returns:
        Latents on unit scale, (latent - shift) scale, (batch, channels, height, width), float32, on the autoencoder's
        device.
    """
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    return (latents - (vae.config["shift_factor"] or 0.0)) * vae.config["scaling_factor"]


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents.

    Args:
        vae: the autoencoder.
        latents: on unit scale, (batch, channels, height, width).

    Returns:
        Pixels in [-1, 1], (batch, 3, height, width), float32, on the autoencoder's device.
    """
    latents = latents.to(vae.device) / vae.config["scaling_factor"] + (vae.config["shift_factor"] or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample.float().clamp(-1, 1)


def vae_scale_factor(folder: Path) -> int:
    """Read how many pixels a side a latent pixel stands for, without loading the autoencoder.

    Args:
        folder: a pipeline's folder.

    Returns:
        The autoencoder's compression, usually 8.
    """
    return 2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
