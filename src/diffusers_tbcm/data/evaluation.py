"""What a model is evaluated on: prompts with the concepts they ask for, and real pictures with those they show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from huggingface_hub import hf_hub_download
from PIL import Image

from ..files import PICTURE_SUFFIXES
from .prompts import DATA_FILES


if TYPE_CHECKING:
    from datasets import Dataset

MJHQ_30K = "playgroundai/MJHQ-30K"  # 3,000 pictures of each of 10 categories; prompts in a file of their own
MJHQ_30K_PROMPTS = "meta_data.json"


@dataclass(frozen=True)
class EvaluationPrompts:
    """Prompts in a fixed order, repetitions and all: a picture is known by its prompt's place.

    Args:
        prompts: P texts, none empty.
        labels: the concept that each asks for, P names; empty where they are not known.
    """

    prompts: list[str]
    labels: list[str]


def load_evaluation_prompts(
    source: str | PathLike[str],
    *,
    config: str | None = None,
    split: str = "train",
    prompt_column: str = "text",
    label_column: str | None = None,
    max_prompts: int | None = None,
) -> EvaluationPrompts:
    """Read prompts to evaluate on.

    Args:
        source: a csv, json, jsonl or parquet file; any other file, as UTF-8 text with one prompt a line; or what
            `datasets.load_dataset` takes. `playgroundai/MJHQ-30K` needs no columns: its labels are its categories.
        config: the data set's configuration.
        split: the data set's split.
        prompt_column: the column of the prompts; a text file has none.
        label_column: the column of the concepts that they ask for.
        max_prompts: how many, the first ones; None for all.

    Returns:
        The prompts.

    Raises:
        ValueError: where a file or a column is missing, a prompt is empty, or a text file is asked for labels.
    """
    path = Path(source)
    if path.suffix in (*DATA_FILES, ".txt") and not path.is_file():
        raise ValueError(f"prompts file {str(source)!r} does not exist")
    labels: list[str] = []
    if str(source) == MJHQ_30K:
        entries = json.loads(Path(hf_hub_download(MJHQ_30K, MJHQ_30K_PROMPTS, repo_type="dataset")).read_bytes())
        prompts = [entry["prompt"] for entry in entries.values()]
        labels = [entry["category"] for entry in entries.values()]
    elif path.is_file() and path.suffix not in DATA_FILES:
        if label_column is not None:
            raise ValueError(f"label_column is {label_column!r}, but {str(source)!r} is text: it has no columns")
        prompts = path.read_text(encoding="utf-8-sig").splitlines()
    else:
        data = _load_dataset(str(source), config, split)
        prompts = _column(data, str(source), prompt_column)
        labels = [] if label_column is None else _column(data, str(source), label_column)
    prompts, labels = prompts[:max_prompts], labels[:max_prompts]
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt {place} of {str(source)!r} is {prompt!r}, which is no text to draw")
    if not prompts:
        raise ValueError(f"{str(source)!r} holds no prompt")
    return EvaluationPrompts(prompts, [str(label) for label in labels])


class FolderPictures(Sequence[Image.Image]):
    """The pictures in a folder and in those below it, opened when asked for; their folders' names are their labels.

    Args:
        folder: holds jpeg, png or webp files.

    Raises:
        ValueError: where there is no such folder, or no picture in it.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        if not self.paths:
            raise ValueError(f"folder {str(folder)!r} holds no picture: {', '.join(PICTURE_SUFFIXES)}")
        below = [path for path in self.paths if path.parent != Path(folder)]
        self.labels = [path.parent.name for path in self.paths] if len(below) == len(self.paths) else []

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with Image.open(self.paths[index]) as picture:
            return picture.convert("RGB")


class DatasetPictures(Sequence[Image.Image]):
    """The pictures of a `datasets` data set, decoded when asked for.

    Args:
        source: what `datasets.load_dataset` takes. `playgroundai/MJHQ-30K` needs no columns.
        config: the data set's configuration.
        split: the data set's split.
        image_column: the column of the pictures.
        label_column: the column of the concepts that they show.

    Raises:
        ValueError: where a column is missing or holds no pictures.
    """

    def __init__(
        self,
        source: str | PathLike[str],
        *,
        config: str | None = None,
        split: str = "train",
        image_column: str = "image",
        label_column: str | None = None,
    ) -> None:
        if str(source) == MJHQ_30K:
            split, image_column, label_column = "test", "image", "label"
        data = _load_dataset(str(source), config, split)
        self.labels = [] if label_column is None else [str(name) for name in _column(data, str(source), label_column)]
        _check_column(data, str(source), image_column)
        if type(data.features[image_column]).__name__ != "Image":
            raise ValueError(f"column {image_column!r} of {str(source)!r} holds no pictures: {data.features}")
        self.images = data.select_columns([image_column])
        self.image_column = image_column

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        return self.images[index][self.image_column]


def _load_dataset(source: str, config: str | None, split: str) -> Dataset:
    from datasets import load_dataset

    path = Path(source)
    if path.is_file():
        return load_dataset(DATA_FILES[path.suffix], data_files=source, split="train")
    return load_dataset(source, config, split=split)


def _check_column(data: Dataset, source: str, column: str) -> None:
    if column not in data.column_names:
        raise ValueError(f"{source!r} has no column {column!r}: it has {', '.join(data.column_names)}")


def _column(data: Dataset, source: str, column: str) -> list[Any]:
    """A column's values, classes by their names."""
    _check_column(data, source, column)
    values = list(data[column])
    names = getattr(data.features[column], "names", None)  # of a ClassLabel
    return values if names is None else [names[value] for value in values]
