"""What networks of one kind of patches and blocks answer alike, in whatever family."""

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


def blocks(transformer: Any) -> list[nn.Module]:
    """Give the network's blocks, in order."""
    return list(transformer.transformer_blocks)


def after_blocks(transformer: Any) -> nn.Module:
    """Give what a forward calls after the last block."""
    return transformer.norm_out
