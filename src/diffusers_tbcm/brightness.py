"""The filter that drops prompts for which the teacher drew a near-black image (arXiv 2511.20410, Sec. 4.3, App. D)."""

from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .backbones import Backbone, find_backbone
from .draws import per_prompt_generators
from .files import written_beside
from .pipeline_folder import digest_component
from .transfer import to_device
from .trigflow import SIGMA_DATA


@torch.no_grad()
def black_latent(vae: nn.Module, height: int, width: int, *, backbone: Backbone) -> torch.Tensor:
    """Encode an all-black image.

    Args:
        vae: the autoencoder.
        height: of the image, in pixels.
        width: of the image, in pixels.
        backbone: the autoencoder's family.

    Returns:
        The latent on unit scale, (1, channels, height, width), float32.
    """
    return backbone.encode_pixels(vae, torch.full((1, 3, height, width), -1.0))


def cached_black_latent(
    teacher_folder: str | PathLike[str], pixels: int, cache: str | PathLike[str], *, variant: str | None = None
) -> torch.Tensor:
    """Load the black latent, encoded once: the one use that training makes of the VAE.

    A cache that is torn, or of another autoencoder or size, is made again.

    Args:
        teacher_folder: the pipeline folder whose autoencoder encodes.
        pixels: the image's sides.
        cache: the safetensors file to read or write.
        variant: the half-precision weights to load of the autoencoder; None for the ordinary ones.

    Returns:
        As `black_latent`, on the CPU.

    Raises:
        ValueError: where the autoencoder gives NaN or infinity for black.
    """
    cache, folder = Path(cache), Path(teacher_folder)
    made_of = {"vae": digest_component(folder, "vae", variant), "pixels": str(pixels)}
    try:
        with safe_open(cache, framework="pt") as file:
            if file.metadata() == made_of:
                latent = file.get_tensor("black_latent")
                if latent.isfinite().all():
                    return latent
    except (FileNotFoundError, SafetensorError):
        pass
    backbone = find_backbone(folder)
    latent = black_latent(backbone.load_vae(folder, variant), pixels, pixels, backbone=backbone).contiguous()
    if not latent.isfinite().all():
        raise ValueError("the vae gives NaN or infinity for a black picture: its weights are not usable")
    with written_beside(cache) as partial:
        save_file({"black_latent": latent}, partial, metadata=made_of)
    return latent


def keep_mask(
    pred_original_sample: torch.Tensor,
    black: torch.Tensor,
    threshold: float,
    *,
    sigma_data: float = SIGMA_DATA,
    hard: bool = False,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Choose the prompts whose generated latent is far enough from black (Sec. 4.3).

    A prompt at mean squared distance mse < threshold is kept with probability mse / threshold, or never with `hard`.
    One whose latent is not a number is dropped.

    Args:
        pred_original_sample: the generated x_0, (batch, channels, height, width), standard deviation `sigma_data`.
        black: the black latent on unit scale, (1, channels, height, width).
        threshold: mean squared distance on unit scale; 0 keeps every prompt.
        sigma_data: standard deviation of `pred_original_sample`.
        hard: drop every prompt below the threshold.
        generator: one per prompt (its fate then depends on its own only), or one for all.

    Returns:
        True for a prompt to keep, (batch,).

    Raises:
        ValueError: if `threshold` is negative or a generator list has another length than the batch.
    """
    if threshold < 0:
        raise ValueError(f"`threshold` is {threshold}, but it must not be negative.")
    mse = (pred_original_sample.float() / sigma_data - black.float()).square().flatten(1).mean(1)
    if hard:
        return mse >= threshold
    draws = [
        torch.rand((), generator=row_generator, device=mse.device if row_generator is None else row_generator.device)
        for row_generator in per_prompt_generators(generator, mse.shape[0])
    ]
    return mse >= threshold * to_device(torch.stack(draws), mse.device)
