"""A pipeline folder of the Sana family: where it is, whether it is complete, and what its configs say."""

from __future__ import annotations

from fnmatch import fnmatch
from os import PathLike
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .files import read_json


MODEL_INDEX = "model_index.json"  # what makes a folder a pipeline to diffusers
CARD = "README.md"
TRAINING_RECORD = "training.json"  # what the card says about the training
TRAINING_CONFIG = "training_config.json"  # every flag, the versions, the revision
METRICS = "metrics.json"
SAMPLES = "images"
SAMPLE_GRID = "grid.png"  # shown on top of the card where it is there
LEGAL_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")  # the teacher's terms hold for its student

TRANSFORMER = "transformer"
COPIED_COMPONENTS = ("text_encoder", "tokenizer", "vae")  # the student's are its teacher's, byte for byte
WEIGHTS_COMPONENTS = (TRANSFORMER, "text_encoder", "vae")
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}  # second copies of weights, by diffusers' name
SKIPPED_FILES = ("*.bin", *(f"*.{variant}*" for variant in VARIANTS))  # pickles are none of ours


def resolve_teacher(teacher: str | PathLike[str]) -> Path:
    """Give the local folder of a Sana-family pipeline, downloaded first where `teacher` is a Hub id.

    Args:
        teacher: pipeline folder or Hub id.

    Returns:
        The folder, its components checked to be there and to hold safetensors weights.

    Raises:
        ValueError: where it is neither a folder nor a Hub id, is no Sana pipeline, or lacks a component.
    """
    folder = Path(teacher)
    if not folder.is_dir():
        components = {TRANSFORMER, *COPIED_COMPONENTS, "scheduler"}
        try:
            snapshot = snapshot_download(
                str(teacher),
                allow_patterns=[
                    MODEL_INDEX,
                    CARD,
                    *LEGAL_FILES,
                    *(f"{component}/*" for component in sorted(components)),
                ],
                ignore_patterns=list(SKIPPED_FILES),
            )
        except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            raise ValueError(f"teacher {str(teacher)!r} is neither a folder nor a model on the Hub") from error
        folder = Path(snapshot)

    if not (folder / MODEL_INDEX).is_file():
        raise ValueError(f"teacher {str(teacher)!r} is no pipeline folder: it has no {MODEL_INDEX}")
    classes = read_json(folder / MODEL_INDEX)
    if classes.get(TRANSFORMER) != ["diffusers", SanaTransformer2DModel.__name__]:
        raise ValueError(
            f"teacher {str(teacher)!r} is no Sana pipeline: its transformer is {classes.get(TRANSFORMER)}"
        )
    for component in (TRANSFORMER, *COPIED_COMPONENTS):
        if component not in classes or not (folder / component).is_dir():
            raise ValueError(f"teacher {str(teacher)!r} lacks its {component}")
    for component in WEIGHTS_COMPONENTS:
        weights = [path.name for path in (folder / component).glob("*.safetensors")]
        if all(any(fnmatch(name, pattern) for pattern in SKIPPED_FILES) for name in weights):
            raise ValueError(f"teacher {str(teacher)!r} has no full-precision safetensors weights of its {component}")
    return folder


def vae_scale_factor(folder: Path) -> int:
    """Read how many pixels a side a latent pixel stands for, without loading the autoencoder.

    Args:
        folder: a Sana pipeline's folder.

    Returns:
        The autoencoder's compression, 32 for Sana's own.
    """
    return 2 ** (len(read_json(folder / "vae" / "config.json")["encoder_block_out_channels"]) - 1)


def latent_size(teacher_folder: Path, transformer: SanaTransformer2DModel, resolution: int | None) -> int:
    """Say how large a teacher's latents are at a resolution, from its autoencoder's config alone.

    Args:
        teacher_folder: the teacher's pipeline folder.
        transformer: its transformer.
        resolution: pixels a side; None for the teacher's own.

    Returns:
        Latent pixels a side.

    Raises:
        ValueError: where the autoencoder or the position embedding does not allow the resolution.
    """
    if resolution is None:
        return transformer.config["sample_size"]
    factor = vae_scale_factor(teacher_folder)
    multiple = factor * transformer.config["patch_size"]
    if resolution < multiple or resolution % multiple:
        raise ValueError(f"resolution is {resolution}: it has to be a positive multiple of {multiple} pixels")
    size = resolution // factor
    if transformer.config["interpolation_scale"] is not None and size != transformer.config["sample_size"]:
        native = transformer.config["sample_size"] * factor
        raise ValueError(f"resolution is {resolution}: this teacher's position embedding is for {native} pixels")
    return size


def license_of(card: Path) -> dict[str, str]:
    """The licence fields of a model card; none where there is no card or it names none."""
    if not card.is_file():
        return {}
    data = ModelCard.load(card).data.to_dict()
    return {field: data[field] for field in ("license", "license_name", "license_link") if field in data}
