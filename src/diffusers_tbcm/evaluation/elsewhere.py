"""Scores of programs that need an environment of their own: what they read, and what they wrote read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..data.prompts import text_lines
from ..files import written_beside
from .metrics import Estimate, bootstrap
from .picture_folder import PictureFolder


logger = logging.get_logger(__name__)

LIST = "metadata.jsonl"  # as `datasets` reads a folder of pictures


@dataclass(frozen=True)
class Scores:
    """Values by name and, of those that have one, confidence intervals: the two of a `Measurement`."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    def add(self, name: str, estimate: Estimate) -> None:
        """Take a value with its interval in."""
        self.metrics[name] = estimate.value
        self.intervals[name] = (estimate.low, estimate.high)

    def add_mean(self, name: str, of_prompt: Tensor, resamples: int) -> None:
        """Take the mean of values (P,) of prompts in, with its interval where there are several prompts."""
        self.metrics[name] = float(of_prompt.mean())
        if len(of_prompt) > 1:
            self.add(
                name, bootstrap(lambda index: float(of_prompt[index].mean()), len(of_prompt), resamples=resamples)
            )

    def update(self, others: Scores) -> None:
        """Take others in."""
        self.metrics.update(others.metrics)
        self.intervals.update(others.intervals)


def write_list(pictures: PictureFolder) -> Path:
    """List a folder's pictures beside them, a line each: `{"file_name": "000000-00.png", "prompt": "a dog"}`.

    Args:
        pictures: of several prompts.

    Returns:
        The list's file.
    """
    file = pictures.folder / LIST
    with written_beside(file) as partial, partial.open("w", encoding="utf-8") as lines:
        for index in range(len(pictures)):
            prompt = pictures.prompts[index // pictures.pictures_per_prompt]
            lines.write(json.dumps({"file_name": pictures.path(index).name, "prompt": prompt}) + "\n")
    return file


def read_scores(pictures: PictureFolder, name: str, resamples: int) -> Scores | None:
    """Read the scores that another program wrote beside pictures, a line each: `{"file_name": ..., "score": 9.8}`.

    Args:
        pictures: of P prompts.
        name: of the score; the file is `NAME.jsonl`.
        resamples: of the bootstrap over prompts.

    Returns:
        The mean; None where nothing was scored since the pictures were drawn.

    Raises:
        ValueError: where the file holds something else, or not every picture.
    """
    file = pictures.folder / f"{name}.jsonl"
    if not file.is_file() or not is_current(file, pictures):
        return None
    lines = read_lines("scores", file, {"file_name": str, "score": (int, float)})
    found = {line["file_name"]: float(line["score"]) for line in lines}
    names = [pictures.path(index).name for index in range(len(pictures))]
    missing = [picture for picture in names if picture not in found]
    if missing:
        raise ValueError(
            f"scores {str(file)!r} lack {len(missing)} of {len(names)} pictures, such as {missing[0]}: score again"
        )
    endless = [picture for picture in names if not math.isfinite(found[picture])]
    if endless:
        raise ValueError(f"scores {str(file)!r}: that of {endless[0]} is {found[endless[0]]}: score again")
    of_picture = torch.tensor([found[picture] for picture in names]).double()
    scores = Scores({}, {})
    scores.add_mean(name, of_picture.view(len(pictures.prompts), -1).mean(dim=1), resamples)
    return scores


def is_current(file: Path, pictures: PictureFolder, made: Sequence[Path] = ()) -> bool:
    """Say whether scores are of the pictures that are there, and warn where some were drawn since.

    Args:
        file: of scores.
        pictures: what was scored.
        made: files that were made of them for that.

    Returns:
        Whether the file is no older than any picture, and any of those files.
    """
    times = [pictures.drawn_at(index) for index in range(len(pictures))] + [path.stat().st_mtime_ns for path in made]
    current = file.stat().st_mtime_ns >= max(times)
    if not current:
        logger.warning(f"{str(file)!r} is older than some of the pictures and left out: score them again.")
    return current


def read_lines(what: str, file: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line.

    Args:
        what: it is, for messages.
        file: there or not.
        fields: names that each has to have, and the type or types of their values.

    Returns:
        The objects, at least one.

    Raises:
        ValueError: naming the file and the line.
    """
    if not file.is_file():
        raise ValueError(f"{what} {str(file)!r} does not exist")
    found = []
    for number, line in enumerate(text_lines(file, what), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not all(isinstance(entry[name], types) for name, types in fields.items()):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{what} {str(file)!r} cannot be read: line {number} is no JSON object with {' and '.join(fields)}"
            ) from error
        found.append(entry)
    if not found:
        raise ValueError(f"{what} {str(file)!r} is empty")
    return found
