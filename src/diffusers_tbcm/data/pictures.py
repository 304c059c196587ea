"""Pictures, opened when they are asked for: captioned ones to train on, those of a folder or a data set to measure."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Sequence
from copy import copy
from hashlib import blake2b
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from diffusers.utils import logging
from PIL import Image
from tqdm.auto import tqdm

from ..files import PICTURE_SUFFIXES
from ..images import to_rgb
from .columns import MJHQ_30K, column_values, load_data
from .prompts import prompt_text


if TYPE_CHECKING:  # `datasets` is an extra, and heavy
    from datasets import Dataset

logger = logging.get_logger(__name__)

SUFFIXES = (*PICTURE_SUFFIXES, ".bmp", ".gif", ".tif", ".tiff")  # of the pictures that a folder is searched for
LOSSY = ("JPEG", "MPO")  # as Pillow names the format of photographs


class Pictures(Sequence[Image.Image]):
    """Pictures that are read when they are asked for: `images.to_rgb` of each."""

    def open(self, index: int) -> Image.Image:
        """Open a picture as it is stored.

        Args:
            index: its number.

        Returns:
            The picture, of its own mode and format.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Say where a picture is, for messages.

        Args:
            index: its number.

        Returns:
            The file, or the place in a data set.
        """
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[Image.Image, str | None]:
        """A picture, and the format of its file."""
        try:
            with self.open(index) as picture:
                return to_rgb(picture), picture.format
        except Exception as error:  # Pillow has one for every way in which a file can be broken
            raise ValueError(f"picture {self.name(index)} cannot be read: {error}") from error

    def check(self, size: tuple[int, int] | None = None) -> None:
        """Read every picture before others are drawn to be measured against them; say what would skew distances.

        Args:
            size: width and height of the pictures that are to be drawn, in pixels; None where it is not known.

        Raises:
            ValueError: where some cannot be read, naming the first.
        """
        unreadable: list[str] = []
        formats: Counter[str | None] = Counter()
        sizes: Counter[tuple[int, int]] = Counter()
        for index in tqdm(range(len(self)), desc="Checking real pictures", unit="picture", leave=False):
            try:
                picture, format = self._read(index)
            except ValueError as error:
                unreadable.append(str(error))
            else:
                formats[format] += 1
                sizes[picture.size] += 1
        if unreadable:
            raise ValueError(f"{len(unreadable)} of {len(self)} real pictures cannot be read: {unreadable[0]}")
        if lossy := sum(formats[format] for format in LOSSY):
            logger.warning(
                f"{lossy} of {len(self)} real pictures are JPEG files: compression alone sets them apart from drawn"
                " pictures, which have none."
            )
        if size is not None and (others := len(self) - sizes.pop(size, 0)):
            (width, height), _ = sizes.most_common(1)[0]
            logger.warning(
                f"{others} of {len(self)} real pictures, most of them {width} x {height}, have not the {size[0]} x"
                f" {size[1]} pixels of the drawn ones: resizing alone sets them apart."
            )


class ColumnPictures(Pictures):
    """The pictures in a column of a `datasets` data set.

    Args:
        data: the data set.
        column: the column's name.
        source: what the data set is called in messages.

    Raises:
        ValueError: where the column holds no pictures.
    """

    def __init__(self, data: Dataset, column: str, source: str | PathLike[str]) -> None:
        feature = data.features[column]
        if type(feature).__name__ != "Image":
            raise ValueError(f"column {column!r} of {str(source)!r} holds no pictures: {data.features}")
        self._data = data.select_columns([column]).cast_column(column, type(feature)(decode=False))
        self._column, self._source = column, source
        self._rows: Sequence[int] = range(len(data))

    def select(self, rows: Sequence[int]) -> ColumnPictures:
        """Take some of the pictures, by number, in that order."""
        chosen = copy(self)
        chosen._rows = [self._rows[row] for row in rows]
        return chosen

    def __len__(self) -> int:
        return len(self._rows)

    def open(self, index: int) -> Image.Image:
        stored = self._stored(index)
        return Image.open(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"]))

    def name(self, index: int) -> str:
        return f"{self._rows[index]} of {str(self._source)!r}"

    def digest(self) -> str:
        """Digest the pictures' files, in order.

        Returns:
            16 hexadecimal digits, which any other picture changes.
        """
        digest = blake2b(digest_size=8)
        for index in tqdm(range(len(self)), desc="Digesting pictures", unit="picture", leave=False):
            try:
                stored = self._stored(index)
                content = Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]
            except (OSError, ValueError) as error:
                raise ValueError(f"picture {self.name(index)} cannot be read: {error}") from error
            digest.update(f"{len(content)}\n".encode() + content)
        return digest.hexdigest()

    def _stored(self, index: int) -> dict[str, Any]:
        """A picture's file: its `bytes`, or where they are None its `path`."""
        stored = self._data[self._rows[index]][self._column]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise ValueError("there is none")
        return stored


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
        pictures = ColumnPictures(data, image_column, source)
        captions = [_captions(entry, caption_column) for entry in column_values(data, caption_column)]
        chosen = [index for index, found in enumerate(captions) if found][:max_images]
        if not chosen:
            raise ValueError(f"none of the {len(data)} pictures of {str(source)!r} has a caption")
        if not all(captions):
            logger.warning(f"{captions.count(())} pictures of {str(source)!r} have no caption and are left out.")
        self.captions = [captions[index] for index in chosen]
        self._images = pictures.select(chosen)

    def __len__(self) -> int:
        return len(self.captions)

    def __str__(self) -> str:
        return f"{len(self)} pictures with {len(self.prompts)} different captions"

    def __getitem__(self, index: int) -> Image.Image:
        return self._images[index]

    def digest(self) -> str:
        """Digest the pictures, in order: 16 hexadecimal digits, which any other picture changes."""
        return self._images.digest()

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


class FolderPictures(Pictures):
    """The pictures in a folder and in those below it; their folders' names are their labels.

    Args:
        folder: holds jpeg, png, webp, tiff, gif or bmp files. What is hidden in it, by a dot before its name, is not
            looked at.
        labelled: its labels are needed: either all pictures have one, or none.

    Raises:
        ValueError: where there is no such folder, or no picture in it, or only some have labels that are needed.
    """

    def __init__(self, folder: str | PathLike[str], *, labelled: bool = False) -> None:
        self.paths = sorted(
            path
            for path in Path(folder).rglob("*")
            if path.suffix.lower() in SUFFIXES and not _is_hidden(path.relative_to(folder)) and path.is_file()
        )
        if not self.paths:
            raise ValueError(f"folder {str(folder)!r} holds no picture: {', '.join(SUFFIXES)}")
        stray = [path for path in self.paths if path.parent == Path(folder)]
        if labelled and 0 < len(stray) < len(self.paths):
            raise ValueError(
                f"folder {str(folder)!r} holds pictures, such as {stray[0].name!r}, beside folders of"
                " pictures, whose names are labels: move them into folders or away"
            )
        self.labels = [] if stray else [path.parent.name for path in self.paths]
        self.prompts: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def name(self, index: int) -> str:
        return repr(str(self.paths[index]))


class DatasetPictures(ColumnPictures):
    """The pictures of a `datasets` data set.

    Args:
        source: what `datasets.load_dataset` takes. `playgroundai/MJHQ-30K` needs no columns.
        config: the data set's configuration.
        split: the data set's split.
        image_column: the column of the pictures.
        label_column: the column of the concepts that they show.
        prompt_column: the column of their prompts.

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
        prompt_column: str | None = None,
    ) -> None:
        if str(source) == MJHQ_30K:
            split, image_column, label_column, prompt_column = "test", "image", "label", None
        columns = (image_column, *(name for name in (label_column, prompt_column) if name is not None))
        data = load_data(source, *columns, config=config, split=split)
        self.labels = [] if label_column is None else [str(name) for name in column_values(data, label_column)]
        prompts = [] if prompt_column is None else column_values(data, prompt_column)
        self.prompts = [prompt_text(prompt, f"column {prompt_column}").strip() for prompt in prompts]
        super().__init__(data, image_column, source)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _captions(entry: Any, column: str) -> tuple[str, ...]:
    """What is written of one picture, without the empty ones."""
    captions = [entry] if entry is None or isinstance(entry, str) else entry
    if not isinstance(captions, list) or not all(caption is None or isinstance(caption, str) for caption in captions):
        raise ValueError(f"column {column!r} is neither text nor a list of texts: it holds {reprlib.repr(entry)}")
    texts = (prompt_text(caption, f"column {column}").strip() for caption in captions)
    return tuple(text for text in texts if text)
