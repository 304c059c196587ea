"""Parts of a teacher's pipeline folder, loaded for training: what is alike in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..components import stored_precision
from ..errors import loading
from ..text import check_tokenizer
from ..transfer import check_finite_weights
from ..versions import dtype_argument


def load_network(network_class: Any, folder: Path, component: str, variant: str | None = None) -> Any:
    """Load a network of a pipeline folder, in float32.

    Args:
        network_class: diffusers' class of it.
        folder: the pipeline's.
        component: its name there.
        variant: the half-precision weights to load where there are some; None for the ordinary ones.

    Returns:
        The network.

    Raises:
        ValueError: where it cannot be loaded, or a weight is not finite.
    """
    precision = stored_precision(folder / component, variant) or None
    with loading("teacher", folder):
        network = network_class.from_pretrained(folder, subfolder=component, variant=precision)
    return check_finite_weights(network.float(), component)


def load_prompt_pipeline(
    pipeline_class: type[DiffusionPipeline],
    folder: Path,
    dtype: torch.dtype,
    variant: str | None = None,
    *,
    without: tuple[str, ...] = (),
) -> Any:
    """Load what embeds prompts, frozen, and neither the transformer nor the autoencoder.

    Args:
        pipeline_class: the family's stock pipeline.
        folder: the pipeline's.
        dtype: of the text encoders.
        variant: the half-precision weights to load where there are some; None for the ordinary ones.
        without: other components that embedding a prompt does not take.

    Returns:
        A pipeline of tokenizers and text encoders.

    Raises:
        ValueError: where a weight is not finite, or a tokenizer is none or not its text encoder's.
    """
    encoders = folder.glob("text_encoder*")
    precision = max((stored_precision(encoder, variant) for encoder in encoders), default="") or None
    absent: dict[str, Any] = dict.fromkeys(("vae", "transformer", *without))
    with loading("teacher", folder):
        pipeline = pipeline_class.from_pretrained(folder, **absent, variant=precision, **dtype_argument(dtype))
    check_prompt_pipeline(pipeline)
    for name, encoder in text_encoders(pipeline).items():
        check_finite_weights(encoder, name).requires_grad_(False)
    return pipeline


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Give a pipeline's text encoders by name, such as `text_encoder` and `text_encoder_2`."""
    return {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part}


def check_prompt_pipeline(pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline whose tokenizers are not those of its text encoders, as `check_tokenizer` does."""
    for name, encoder in text_encoders(pipeline).items():
        check_tokenizer(pipeline.components[name.replace("text_encoder", "tokenizer")], encoder)
