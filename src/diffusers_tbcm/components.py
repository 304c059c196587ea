"""The files that a pipeline's components consist of, by the libraries' own names, and whether they are whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


WEIGHT_NAMES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # by the library that loads them
MODEL_INDEX = "model_index.json"  # what makes a folder a pipeline to diffusers
MODEL_CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
PROCESSOR_CONFIGS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip
TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
VOCABULARIES = (  # one of these sets makes a tokenizer
    ("tokenizer.json",), ("tokenizer.model",), ("spiece.model",), ("vocab.json", "merges.txt"), ("vocab.txt",),
)  # fmt: skip
VOCABULARY_FILES = {name for names in VOCABULARIES for name in names} | {"added_tokens.json"}  # words, and no settings


def stored_precision(folder: Path, variant: str | None) -> str:
    """Say which weights of a component to load.

    Args:
        folder: the component's.
        variant: the half-precision ones to prefer, such as `"bf16"`; None for those in full precision.

    Returns:
        The variant where there are weights of it, otherwise `""`, full precision.
    """
    return variant if variant and any(folder.glob(f"*.{variant}[.-]*")) else ""


def plain_name(name: str, precision: str) -> str:
    """Name a file of half-precision weights as that of full ones is named.

    Args:
        name: such as `"model.bf16-00001-of-00002.safetensors"`.
        precision: from `stored_precision`.

    Returns:
        Such as `"model-00001-of-00002.safetensors"`; other names as they are.
    """
    return re.sub(rf"\.{precision}(?=[.-])", "", name, count=1) if precision else name


def model_files(
    folder: Path, library: str, home: Path | None = None, variants: Sequence[str] = (), precision: str = ""
) -> list[Path]:
    """List the files of a component with weights, checked to be whole.

    Args:
        folder: the component's.
        library: `"diffusers"` or `"transformers"`, which loads it.
        home: as in `check_file`.
        variants: half-precision copies to list too, such as `"fp16"`, where they are there.
        precision: of the weights, from `stored_precision`.

    Returns:
        Config and weights; nothing else that the folder holds.

    Raises:
        ValueError: naming the file that is missing, torn, empty, or none of the folder's own.
    """
    files = [folder / MODEL_CONFIG]
    read_object(check_file(files[0], home))
    files += _optional(folder, [GENERATION_CONFIG], home)
    weights = _weights(folder, WEIGHT_NAMES[library], precision, home)
    if not weights:
        raise ValueError(f"no safetensors weights of its {folder.name} in {precision or 'full'} precision")
    return (
        files + weights + [file for name in variants for file in _weights(folder, WEIGHT_NAMES[library], name, home)]
    )


def tokenizer_files(folder: Path, home: Path | None = None) -> list[Path]:
    """List the files of a tokenizer, as `model_files` does.

    Raises:
        ValueError: where none of the files that hold a vocabulary is there and whole.
    """
    read_object(check_file(folder / TOKENIZER_CONFIG, home))
    found = [[folder / name for name in names] for names in VOCABULARIES]
    found = [paths for paths in found if all(_is_there(path) for path in paths)]
    if not found:
        raise ValueError(f"no vocabulary of its {folder.name}: {', '.join(names[0] for names in VOCABULARIES)}")
    vocabularies = [check_file(path, home) for paths in found for path in paths]
    for path in vocabularies:
        if path.suffix == ".json" and not read_object(path):
            raise ValueError(f"{folder.name}/{path.name} holds no vocabulary")
    return [folder / TOKENIZER_CONFIG, *vocabularies, *_optional(folder, TOKENIZER_EXTRAS, home)]


def processor_files(folder: Path, home: Path | None = None) -> list[Path]:
    """List the files of a processor, a tokenizer and what prepares pictures, as `model_files` does."""
    found = [folder / name for name in PROCESSOR_CONFIGS if _is_there(folder / name)]
    if not found:
        raise ValueError(f"no {PROCESSOR_CONFIGS[0]} of its {folder.name}")
    for path in found:
        read_object(check_file(path, home))
    return [*found, *tokenizer_files(folder, home)]


def scheduler_files(folder: Path, home: Path | None = None) -> list[Path]:
    """List the file of a scheduler, as `model_files` does."""
    read_object(check_file(folder / SCHEDULER_CONFIG, home))
    return [folder / SCHEDULER_CONFIG]


def check_file(path: Path, home: Path | None = None) -> Path:
    """Make sure that a file is a folder's own: no link, no pipe, and not empty.

    Args:
        path: the file; above its component's folder there is no link.
        home: where links may lead, as a Hub cache keeps its files behind links; None for no links at all.

    Returns:
        `path`.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    name = f"{path.parent.name}/{path.name}"
    if not _is_there(path):
        raise ValueError(f"{name} is missing")
    target = Path(os.path.realpath(path))
    if target != path and (home is None or not target.is_relative_to(home)):
        raise ValueError(f"{name} is a link to elsewhere, which is not followed: put the file itself there")
    if not target.is_file():
        raise ValueError(f"{name} is no regular file")
    if target.stat().st_size == 0:
        raise ValueError(f"{name} is empty")
    return path


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object in which no name stands twice.

    Args:
        path: of the file.

    Returns:
        What it holds.

    Raises:
        ValueError: naming the file, where it holds something else.
    """
    name = f"{path.parent.name}/{path.name}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON file, or a torn one: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no JSON object")
    return content


def check_weights(path: Path, home: Path | None = None) -> set[str]:
    """Make sure that a safetensors file is whole.

    Args:
        path: of the file.
        home: as in `check_file`.

    Returns:
        The names of its tensors.

    Raises:
        ValueError: naming the file, where it is torn, empty or none of the folder's own.
    """
    name = f"{path.parent.name}/{path.name}"
    check_file(path, home)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} is no safetensors file, or a torn one: {error}") from error
    if not tensors:
        raise ValueError(f"{name} holds no tensors")
    return tensors


def _weights(folder: Path, name: str, variant: str, home: Path | None) -> list[Path]:
    """The files of one precision, one or sharded; none where it is not there."""
    variant = variant and f".{variant}"
    single, index = folder / f"{name}{variant}.safetensors", folder / f"{name}.safetensors.index{variant}.json"
    files = []
    if _is_there(single):
        check_weights(single, home)
        files.append(single)
    if _is_there(index):
        shards = _shards(index, home)
        shard_name = re.compile(rf"{name}{variant}-\d+-of-\d+\.safetensors|{name}-\d+-of-\d+{variant}\.safetensors")
        for shard, tensors in shards.items():
            if not shard_name.fullmatch(shard):
                raise ValueError(f"{folder.name}/{index.name} names {shard!r}, which is no shard of its weights")
            missing = tensors - check_weights(folder / shard, home)
            if missing:
                raise ValueError(f"{folder.name}/{shard} lacks {min(missing)}, which {index.name} says it has")
        files += [index, *(folder / shard for shard in sorted(shards))]
    return files


def _shards(index: Path, home: Path | None) -> dict[str, set[str]]:
    """The tensors of each shard."""
    shards: dict[str, set[str]] = {}
    weight_map = read_object(check_file(index, home)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index.parent.name}/{index.name} names no shards")
    for tensor, shard in weight_map.items():
        shards.setdefault(str(shard), set()).add(tensor)
    return shards


def _optional(folder: Path, names: Sequence[str], home: Path | None) -> list[Path]:
    """Those of some files that are there; a link or an empty one is an error."""
    return [check_file(folder / name, home) for name in names if _is_there(folder / name)]


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands in it twice")
    return content
