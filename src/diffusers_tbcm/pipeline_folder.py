"""A pipeline folder: where it is, whether it is complete, and what its configs say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import lru_cache, partial
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .backbones import find_backbone
from .components import (
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    WEIGHT_NAMES,
    check_file,
    model_files,
    processor_files,
    read_object,
    scheduler_files,
    stored_precision,
    tokenizer_files,
)
from .files import read_json


CARD = "README.md"
TRAINING_RECORD = "training.json"  # what the card says about the training
TRAINING_CONFIG = "training_config.json"  # every flag, the versions, the revision
METRICS = "metrics.json"
CHECKPOINT = "checkpoint-"  # and its step: a folder in the run's
MANIFEST = "checkpoint.json"  # written last into a checkpoint: its step, and the size of every other file
METRICS_LOG = "metrics.jsonl"  # of a run: every logged step
VALIDATION = "validation"
LORA = "lora"  # the adapters' folder, in the run's
SAMPLES = "images"
SAMPLE_GRID = "grid.png"  # shown on top of the card where it is there
LEGAL_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")  # the teacher's terms hold for its student

TRANSFORMER = "transformer"
SCHEDULER = "scheduler"
TOKENIZER, PROCESSOR = "tokenizer", "text_processor"  # components of these names hold no weights
ABSENT = [None, None]  # of a component that model_index.json has and the folder has not
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}  # second copies of weights, by diffusers' name
PART_BYTES = 1 << 24  # of a file, digested by a thread
SKIPPED_FILES = ("*.bin", *(f"*.{variant}*" for variant in VARIANTS))  # pickles are none of ours


def resolve_teacher(teacher: str | PathLike[str], variant: str | None = None) -> Path:
    """Give the local folder of a teacher's pipeline, downloaded first where `teacher` is a Hub id.

    Args:
        teacher: pipeline folder or Hub id.
        variant: the half-precision weights to use of the components that have them, one of `VARIANTS`; None for the
            ordinary ones.

    Returns:
        The folder, its components checked to be there and to hold safetensors weights.

    Raises:
        ValueError: where it is neither a folder nor a Hub id, is of no known family, or lacks a component or the
            weights asked for.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"`variant` is {variant!r}: choose from {', '.join(VARIANTS)}")
    folder = Path(teacher)
    on_hub = not folder.is_dir()
    if on_hub:
        folder = _download(teacher, [MODEL_INDEX, CARD, *LEGAL_FILES])
    if not (folder / MODEL_INDEX).is_file():
        raise ValueError(f"teacher {str(teacher)!r} is no pipeline folder: it has no {MODEL_INDEX}")
    components = [TRANSFORMER, *copied_components(folder)]
    if on_hub:
        folder = _download_components(teacher, folder, [*components, SCHEDULER], variant)
    classes = read_json(folder / MODEL_INDEX)
    for component in components:
        if component not in classes or not (folder / component).is_dir():
            raise ValueError(f"teacher {str(teacher)!r} lacks its {component}")
    _check_precision(teacher, folder, holding_weights(components), variant)
    _check_copied(teacher, folder, classes, variant)
    return folder


def _check_precision(
    teacher: str | PathLike[str], folder: Path, components: Sequence[str], variant: str | None
) -> None:
    """Make sure that the weights asked for are there; of components without the variant, the ordinary ones."""
    found = {component: stored_precision(folder / component, variant) for component in components}
    if variant is not None and not any(found.values()):
        raise ValueError(f"teacher {str(teacher)!r} has no weights of `variant` {variant}")
    for component, precision in found.items():
        weights = [path.name for path in (folder / component).glob("*.safetensors")]
        if not precision and all(any(fnmatch(name, pattern) for pattern in SKIPPED_FILES) for name in weights):
            others = [name for name in VARIANTS if stored_precision(folder / component, name)]
            hint = f", but those of a variant: give `variant` {others[0]}" if others else ""
            raise ValueError(
                f"teacher {str(teacher)!r} has no full-precision safetensors weights of its {component}{hint}"
            )


def copied_components(folder: Path) -> list[str]:
    """Name what a student takes over of a teacher's components.

    Args:
        folder: the teacher's pipeline.

    Returns:
        Those that its family needs, and those of the optional ones that it has.
    """
    backbone, classes = find_backbone(folder), read_json(folder / MODEL_INDEX)
    return [
        *backbone.COPIED_COMPONENTS,
        *(name for name in backbone.OPTIONAL_COMPONENTS if classes.get(name, ABSENT) != ABSENT),
    ]


def flow_shift(teacher_folder: Path, image_tokens: int) -> float:
    """Read how far a pipeline's scheduler shifts times towards noise.

    A dynamic shift, which the number of tokens sets, is a static one for pictures of one size: by exp(mu), or by mu
    where its type is linear, with mu linear in the number of tokens.

    Args:
        teacher_folder: the pipeline's.
        image_tokens: of a picture, as the family's `image_tokens` counts them.

    Returns:
        k of s -> k s / (1 + (k - 1) s); 1 where the scheduler has none.

    Raises:
        ValueError: where the pipeline has no scheduler.
    """
    if not (teacher_folder / SCHEDULER / SCHEDULER_CONFIG).is_file():
        raise ValueError(f"teacher {str(teacher_folder)!r} lacks its {SCHEDULER}")
    config = read_json(teacher_folder / SCHEDULER / SCHEDULER_CONFIG)
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (image_tokens - fewest) / (most - fewest)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _check_copied(teacher: str | PathLike[str], folder: Path, classes: Mapping[str, Any], variant: str | None) -> None:
    """Make sure, before anything is trained, that what a student takes over from its teacher is whole and its own."""
    home = home_of(folder)
    try:
        anywhere = Path(folder.resolve().anchor)
        component_files(folder, TRANSFORMER, classes, home=anywhere, variant=variant)  # loaded, and not copied
        for component in copied_components(folder):
            component_files(folder, component, classes, home=home, variant=variant)
        for name in LEGAL_FILES:
            if (folder / name).exists():
                check_file(folder / name, home)
        license_of(folder / CARD)
    except ValueError as error:
        raise ValueError(f"teacher {str(teacher)!r} cannot be used: {error}") from error


def _download_components(
    teacher: str | PathLike[str], folder: Path, components: Sequence[str], variant: str | None
) -> Path:
    """The folder of a snapshot with these components, their weights in one precision only."""
    if variant is not None:
        patterns = [f"{component}/*.{variant}[.-]*" for component in holding_weights(components)]
        folder = _download(teacher, patterns, ignored=SKIPPED_FILES[:1])
    halved = [component for component in components if stored_precision(folder / component, variant)]
    return _download(teacher, [f"{name}/*.json" if name in halved else f"{name}/*" for name in components])


def _download(teacher: str | PathLike[str], patterns: Sequence[str], ignored: Sequence[str] = SKIPPED_FILES) -> Path:
    """The folder of a snapshot with these files."""
    try:
        return Path(snapshot_download(str(teacher), allow_patterns=[*patterns], ignore_patterns=[*ignored]))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"teacher {str(teacher)!r} is neither a folder nor a model on the Hub that can be reached"
        ) from error


def component_files(
    folder: Path,
    name: str,
    model_index: Mapping[str, Any],
    home: Path | None = None,
    variants: Sequence[str] = (),
    variant: str | None = None,
) -> list[Path]:
    """List the files of a pipeline's component, checked to be whole.

    Args:
        folder: the pipeline's.
        name: of the component.
        model_index: the content of its model_index.json.
        home: where links may lead, as `check_file` takes it.
        variants: as `model_files` takes them.
        variant: as `resolve_teacher` takes it.

    Returns:
        The files; nothing else that the component's folder holds.

    Raises:
        ValueError: where one is missing, torn or none of the folder's own, or the component is no library's own.
    """
    entry = model_index.get(name)
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise ValueError(f"{MODEL_INDEX} names no {name}, which the pipeline needs")
    if entry[0] not in WEIGHT_NAMES:
        raise ValueError(f"{MODEL_INDEX} has {name} {entry}: its code would be {entry[0]}, and not a library's")
    if not (folder / name).is_dir():
        raise ValueError(f"its {name} is missing")
    if name == PROCESSOR:
        return processor_files(folder / name, home)
    if name.startswith(TOKENIZER):
        return tokenizer_files(folder / name, home)
    if name == SCHEDULER:
        files = scheduler_files(folder / name, home)
    else:
        files = model_files(folder / name, entry[0], home, variants, stored_precision(folder / name, variant))
    config = read_object(files[0])
    if config.get("_class_name") != entry[1] if entry[0] == "diffusers" else "model_type" not in config:
        raise ValueError(f"{name}/{files[0].name} is no config of {entry[1]}, which {MODEL_INDEX} has there")
    return files


def digest_component(teacher_folder: str | PathLike[str], name: str, variant: str | None = None) -> str:
    """Digest all that a component is loaded from; a gigabyte takes a thread about a second.

    Args:
        teacher_folder: a pipeline's folder.
        name: of the component.
        variant: the half-precision weights that are loaded where there are some; None for the ordinary ones.

    Returns:
        16 hexadecimal digits.
    """
    folder = Path(teacher_folder)
    files = component_files(
        folder, name, read_json(folder / MODEL_INDEX), home=Path(folder.resolve().anchor), variant=variant
    )
    found = ((path, path.stat()) for path in sorted(files))
    return _digest_files(tuple((path, state.st_size, state.st_mtime_ns) for path, state in found))


@lru_cache
def _digest_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Digest files, each with its size and time: a start asks for those of the text encoder several times."""
    digest = blake2b(digest_size=8)
    for path, size, _ in files:
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":  # what wrote it, its metadata, changes nothing
                tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                tensors.pop("__metadata__", None)
                digest.update(json.dumps(tensors, sort_keys=True).encode())
            start = file.tell()
        with ThreadPoolExecutor() as pool:
            for part in pool.map(partial(_digest_part, path), range(start, size, PART_BYTES)):
                digest.update(part)
    return digest.hexdigest()


def _digest_part(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return blake2b(file.read(PART_BYTES), digest_size=8).digest()


def home_of(folder: Path) -> Path:
    """Say where the links in a teacher's folder may lead: into the folder, or the repository's in the Hub's cache."""
    folder = folder.resolve()
    repository = folder.parent.parent
    return repository if folder.parent.name == "snapshots" and (repository / "blobs").is_dir() else folder


def holding_weights(components: Iterable[str]) -> list[str]:
    """Say which of a pipeline's components have weights; tokenizers and schedulers have none."""
    return [name for name in components if not name.startswith((TOKENIZER, PROCESSOR)) and name != SCHEDULER]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Find the checkpoints of a run.

    Args:
        output_dir: the run's folder.

    Returns:
        The folders `checkpoint-{step}`, by step; those still being written are not among them.
    """
    steps = {path: path.name.removeprefix(CHECKPOINT) for path in output_dir.glob(f"{CHECKPOINT}*")}
    found = [path for path, step in steps.items() if step.isascii() and step.isdigit()]
    return sorted(found, key=lambda path: int(steps[path]))


def license_of(card: Path) -> dict[str, str]:
    """The licence fields of a model card; none where there is no card or it names none.

    Raises:
        ValueError: where the card cannot be read.
    """
    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card).data.to_dict()
    except Exception as error:  # the client's own, or its YAML reader's
        reason = " ".join(str(error).split())
        raise ValueError(f"{card.parent.name}/{card.name} cannot be read as a model card: {reason}") from error
    return {field: data[field] for field in ("license", "license_name", "license_link") if field in data}
