"""Files and folders that are whole or not there: written beside their place, renamed when complete. JSON, pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


PARTIAL_SUFFIX = ".tbcm-partial"  # nobody else's: such a file may be deleted wherever it is found
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors wrap the system's error
PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


def beside(path: Path) -> Path:
    """Say where something is written before it is renamed: in the same folder, under a name that is certainly ours.

    Args:
        path: its place.

    Returns:
        The path of the unfinished one.
    """
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there.

    Args:
        path: of either.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """Rename a file or a folder; what has that name goes.

    Args:
        source: on the same disk as `target`.
        target: its new name. One file takes another's place at once; a folder there is deleted first.
    """
    if target.is_dir():
        remove(target)
    source.replace(target)


@contextmanager
def written_beside(path: str | PathLike[str], *, place: Callable[[Path, Path], None] = replace) -> Iterator[Path]:
    """Give a path to write a file or a folder at, and put that into its place when the block has succeeded.

    A block that fails changes nothing: what it wrote is deleted. What a killed process left there is deleted first.

    Args:
        path: the place of the finished file or folder.
        place: puts what was written (the first argument) into its place (the second).

    Yields:
        The path to write at; there is nothing there yet.
    """
    target = Path(path)
    partial = beside(target)
    remove(partial)
    try:
        yield partial
        place(partial, target)
    except BaseException:
        remove(partial)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"file {str(path)!r} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"file {str(path)!r} holds no JSON object, but a {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, its folder made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial:
        partial.write_text(json_text(content), encoding="utf-8")


def json_text(content: Mapping[str, Any]) -> str:
    """Give the text of a JSON file."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
