"""A pipeline folder: where it is, whether it is complete, and what its configs say."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .backbones import find_backbone
from .files import read_json


MODEL_INDEX = "model_index.json"  # what makes a folder a pipeline to diffusers
CARD = "README.md"
TRAINING_RECORD = "training.json"  # what the card says about the training
TRAINING_CONFIG = "training_config.json"  # every flag, the versions, the revision
METRICS = "metrics.json"
CHECKPOINT = "checkpoint-"  # and its step: a folder in the run's
METRICS_LOG = "metrics.jsonl"  # of a run: every logged step
VALIDATION = "validation"
LORA = "lora"  # the adapters' folder, in the run's
SAMPLES = "images"
SAMPLE_GRID = "grid.png"  # shown on top of the card where it is there
LEGAL_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")  # the teacher's terms hold for its student

TRANSFORMER = "transformer"
SCHEDULER = "scheduler"
TOKENIZER = "tokenizer"  # components of this name hold no weights
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}  # second copies of weights, by diffusers' name
SKIPPED_FILES = ("*.bin", *(f"*.{variant}*" for variant in VARIANTS))  # pickles are none of ours


def resolve_teacher(teacher: str | PathLike[str]) -> Path:
    """Give the local folder of a teacher's pipeline, downloaded first where `teacher` is a Hub id.

    Args:
        teacher: pipeline folder or Hub id.

    Returns:
        The folder, its components checked to be there and to hold safetensors weights.

    Raises:
        ValueError: where it is neither a folder nor a Hub id, is of no known family, or lacks a component.
    """
    folder = Path(teacher)
    on_hub = not folder.is_dir()
    if on_hub:
        folder = _download(teacher, [MODEL_INDEX, CARD, *LEGAL_FILES])
    if not (folder / MODEL_INDEX).is_file():
        raise ValueError(f"teacher {str(teacher)!r} is no pipeline folder: it has no {MODEL_INDEX}")
    components = [TRANSFORMER, *find_backbone(folder).COPIED_COMPONENTS]
    if on_hub:
        folder = _download(teacher, [f"{component}/*" for component in [*components, SCHEDULER]])
    classes = read_json(folder / MODEL_INDEX)
    for component in components:
        if component not in classes or not (folder / component).is_dir():
            raise ValueError(f"teacher {str(teacher)!r} lacks its {component}")
    for component in holding_weights(components):
        weights = [path.name for path in (folder / component).glob("*.safetensors")]
        if all(any(fnmatch(name, pattern) for pattern in SKIPPED_FILES) for name in weights):
            raise ValueError(f"teacher {str(teacher)!r} has no full-precision safetensors weights of its {component}")
    return folder


def _download(teacher: str | PathLike[str], patterns: list[str]) -> Path:
    """The folder of a snapshot with these files, and no copies of lower precision."""
    try:
        return Path(snapshot_download(str(teacher), allow_patterns=patterns, ignore_patterns=list(SKIPPED_FILES)))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise ValueError(f"teacher {str(teacher)!r} is neither a folder nor a model on the Hub") from error


def holding_weights(components: Iterable[str]) -> list[str]:
    """Say which of a pipeline's components have weights; tokenizers and schedulers have none."""
    return [name for name in components if not name.startswith(TOKENIZER) and name != SCHEDULER]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Find the checkpoints of a run.

    Args:
        output_dir: the run's folder.

    Returns:
        The folders `checkpoint-{step}`, by step; those still being written are not among them.
    """
    found = [path for path in output_dir.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def license_of(card: Path) -> dict[str, str]:
    """The licence fields of a model card; none where there is no card or it names none."""
    if not card.is_file():
        return {}
    data = ModelCard.load(card).data.to_dict()
    return {field: data[field] for field in ("license", "license_name", "license_link") if field in data}
