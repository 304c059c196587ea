"""Pictures, opened when they are asked for: captioned ones to train on, those of a folder or a data set to measure."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch
from diffusers.utils import logging
from PIL import Image

from ..files import PICTURE_SUFFIXES
from .columns import MJHQ_30K, column_values, load_data


logger = logging.get_logger(__name__)


class CaptionedImages:
    """The pictures of a `datasets` data set, decoded when they are asked for, and their captions.

    Args:
        source: what `datasets.load_dataset` takes: a Hub id, or a folder of pictures with a metadata.jsonl.
        config: the data set's configuration.
        split: the data set's split.
        image_column: the column of pictures.
        caption_column: the column of captions; each a text, or a list of texts that all fit.
        max_images: use no more pictures than this; None uses all.

    Raises:
        ValueError: where a column is missing or a caption is not text, or no picture has a caption.
    """

    def __init__(
        self,
        source: str | PathLike[str],
        *,
        config: str | None = None,
        split: str = "train",
        image_column: str = "image",
        caption_column: str = "text",
        max_images: int | None = None,
    ) -> None:
        data = load_data(source, image_column, caption_column, config=config, split=split)
        captions = [_captions(entry, caption_column) for entry in column_values(data, caption_column)]
        chosen = [index for index, found in enumerate(captions) if found][:max_images]
        if not chosen:
            raise ValueError(f"none of the {len(data)} pictures of {str(source)!r} has a caption")
        if not all(captions):
            logger.warning(f"{captions.count(())} pictures of {str(source)!r} have no caption and are left out.")
        self.captions = [captions[index] for index in chosen]
        self._images = data.select(chosen).select_columns([image_column])
        self._column = image_column

    def __len__(self) -> int:
        return len(self.captions)

    def __str__(self) -> str:
        return f"{len(self)} pictures with {len(self.prompts)} different captions"

    def __getitem__(self, index: int) -> Image.Image:
        return self._images[index][self._column]

    @property
    def prompts(self) -> list[str]:
        """The different captions, in the order they come in."""
        return list(dict.fromkeys(caption for captions in self.captions for caption in captions))

    def pick_caption(self, index: int, generator: torch.Generator) -> str:
        """Choose one of a picture's captions at random.

        Args:
            index: the picture's number.
            generator: on the CPU; left alone where there is only one.

        Returns:
            The caption.
        """
        captions = self.captions[index]
        if len(captions) == 1:
            return captions[0]
        return captions[int(torch.randint(len(captions), (), generator=generator))]


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
        columns = (image_column,) if label_column is None else (image_column, label_column)
        data = load_data(source, *columns, config=config, split=split)
        self.labels = [] if label_column is None else [str(name) for name in column_values(data, label_column)]
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


def _captions(entry: Any, column: str) -> tuple[str, ...]:
    """What is written of one picture, without the empty ones."""
    captions = [entry] if entry is None or isinstance(entry, str) else entry
    if not isinstance(captions, list) or not all(caption is None or isinstance(caption, str) for caption in captions):
        raise ValueError(f"column {column!r} is neither text nor a list of texts: it holds {entry!r}")
    return tuple(caption.strip() for caption in captions if caption and caption.strip())
