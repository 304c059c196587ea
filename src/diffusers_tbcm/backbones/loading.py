"""Parts of a pipeline folder, loaded to train and to draw: what is alike in every family."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from ..components import MODEL_INDEX, stored_precision
from ..errors import loading
from ..files import read_json
from ..text import check_tokenizer
from ..transfer import check_finite_weights, load_whole
from ..versions import dtype_argument


LIBRARIES = {"diffusers": diffusers, "transformers": transformers}  # of a pipeline's networks


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
        ValueError: where it cannot be loaded, or a weight is not there or not finite.
    """
    precision = stored_precision(folder / component, variant) or None
    with loading("teacher", folder):
        network = load_whole(network_class, folder, subfolder=component, variant=precision)
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
        ValueError: where a weight is not there or not finite, or a tokenizer is none or not its text encoder's.
    """
    with loading("teacher", folder):
        networks = load_networks(folder, dtype, variant, without=("vae", "transformer", *without))
        pipeline = pipeline_class.from_pretrained(folder, **networks, **dtype_argument(dtype))
    check_prompt_pipeline(pipeline)
    for name, encoder in text_encoders(pipeline).items():
        check_finite_weights(encoder, name).requires_grad_(False)
    return pipeline


def load_networks(
    folder: Path, dtype: torch.dtype, variant: str | None = None, *, without: Collection[str] = ()
) -> dict[str, Any]:
    """Load the networks of a pipeline folder as the pipeline would, and refuse those that it would fill in at random.

    Args:
        folder: the pipeline's.
        dtype: of the networks.
        variant: the half-precision weights to load where there are some; None for the ordinary ones.
        without: components that are not loaded.

    Returns:
        The networks by component, None for those that are not loaded: arguments of the pipeline's `from_pretrained`.

    Raises:
        ValueError: where one cannot be loaded, or lacks a weight; the message names the component.
    """
    networks: dict[str, Any] = dict.fromkeys(without)
    for name, entry in read_json(folder / MODEL_INDEX).items():
        library, kind = entry if isinstance(entry, list) and len(entry) == 2 else ("", "")
        network_class = getattr(LIBRARIES.get(library), str(kind), None)
        if name in without or not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
            continue
        options: dict[str, Any] = {"dtype": dtype} if library == "transformers" else dtype_argument(dtype)
        options |= {"subfolder": name, "variant": stored_precision(folder / name, variant) or None}
        with loading("component", name):
            networks[name] = load_whole(network_class, folder, **options)
    return networks


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Give a pipeline's text encoders by name, such as `text_encoder` and `text_encoder_2`."""
    return {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part}


def check_prompt_pipeline(pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline whose tokenizers are not those of its text encoders, as `check_tokenizer` does."""
    for name, encoder in text_encoders(pipeline).items():
        check_tokenizer(pipeline.components[name.replace("text_encoder", "tokenizer")], encoder)
