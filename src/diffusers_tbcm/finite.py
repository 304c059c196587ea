"""A picture of numbers that are none is no picture: NaN would show as black, infinity as black or white."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.image_processor import PixArtImageProcessor


NOT_FINITE = (
    "is not finite: the network or the autoencoder gave NaN or infinity, which shows as black. The weights hold some,"
    " or they overflow in half precision: load them as torch.bfloat16 or torch.float32."
)


class NotFiniteWarning(RuntimeWarning):
    """What was drawn is no picture."""


class FiniteImageProcessor(PixArtImageProcessor):
    """diffusers' image processor, but infinity becomes NaN where it would have become black or white."""

    def postprocess(
        self, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None
    ) -> Any:
        """Turn the autoencoder's pixels into pictures, as the stock method does."""
        return super().postprocess(image.where(image.isfinite(), torch.nan), output_type, do_denormalize)


def is_finite(images: np.ndarray | torch.Tensor) -> bool:
    """Say whether pictures or latents are numbers throughout; it waits for the device that computes them."""
    return bool(np.isfinite(images).all() if isinstance(images, np.ndarray) else images.isfinite().all())
