"""A pipeline folder: where it is, whether it is complete, and what its configs say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .backbones import find_backbone
from .components import WEIGHT_NAMES, check_file, model_files, scheduler_files, tokenizer_files
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
    _check_copied(teacher, folder, classes)
    return folder


def _check_copied(teacher: str | PathLike[str], folder: Path, classes: Mapping[str, Any]) -> None:
    """Make sure, before anything is trained, that what a student takes over from its teacher is whole and its own."""
    home = home_of(folder)
    try:
        component_files(folder, TRANSFORMER, classes, home=Path(folder.resolve().anchor))  # loaded, and not copied
        for component in find_backbone(folder).COPIED_COMPONENTS:
            component_files(folder, component, classes, home=home)
        for name in LEGAL_FILES:
            if (folder / name).exists():
                check_file(folder / name, home)
    except ValueError as error:
        raise ValueError(f"teacher {str(teacher)!r} cannot be used: {error}") from error


def _download(teacher: str | PathLike[str], patterns: list[str]) -> Path:
    """The folder of a snapshot with these files, and no copies of lower precision."""
    try:
        return Path(snapshot_download(str(teacher), allow_patterns=patterns, ignore_patterns=list(SKIPPED_FILES)))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"teacher {str(teacher)!r} is neither a folder nor a model on the Hub that can be reached"
        ) from error


def component_files(
    folder: Path, name: str, model_index: Mapping[str, Any], home: Path | None = None, variants: Sequence[str] = ()
) -> list[Path]:
    """List the files of a pipeline's component, checked to be whole.

    Args:
        folder: the pipeline's.
        name: of the component.
        model_index: the content of its model_index.json.
        home: where links may lead, as `check_file` takes it.
        variants: as `model_files` takes them.

    Returns:
        The files; nothing else that the component's folder holds.

    Raises:
        ValueError: where one is missing, torn or none of the folder's own, or the component is no library's own.
    """
    entry = model_index.get(name)
    if not isinstance(entry, list) or len(entry) != 2 or None in entry:
        raise ValueError(f"{MODEL_INDEX} names no {name}, which the pipeline needs")
    if entry[0] not in WEIGHT_NAMES:
        raise ValueError(f"{MODEL_INDEX} has {name} {entry}: its code would be {entry[0]}, and not a library's")
    if not (folder / name).is_dir():
        raise ValueError(f"its {name} is missing")
    if name == SCHEDULER:
        return scheduler_files(folder / name, home)
    if name.startswith(TOKENIZER):
        return tokenizer_files(folder / name, home)
    return model_files(folder / name, entry[0], home, variants)


def home_of(folder: Path) -> Path:
    """Say where the links in a teacher's folder may lead: into the folder, or the repository's in the Hub's cache."""
    folder = folder.resolve()
    repository = folder.parent.parent
    return repository if folder.parent.name == "snapshots" and (repository / "blobs").is_dir() else folder


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
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def license_of(card: Path) -> dict[str, str]:
    """The licence fields of a model card; none where there is no card or it names none."""
    if not card.is_file():
        return {}
    data = ModelCard.load(card).data.to_dict()
    return {field: data[field] for field in ("license", "license_name", "license_link") if field in data}
