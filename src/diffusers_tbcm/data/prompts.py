"""Prompts: where they come from, to train on and to evaluate on."""

import json
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import hf_hub_download

from .columns import DATA_FILES, MJHQ_30K, column_values, load_data


logger = logging.get_logger(__name__)

MJHQ_30K_PROMPTS = "meta_data.json"
MAX_CHARACTERS = 100_000  # of a prompt: what is longer is a file with other line ends, or no text
# Files whose lines are no prompts though they are text, and those that are packed.
NOT_A_PROMPT_A_LINE = (
    ".yaml", ".yml", ".toml", ".ini", ".xml", ".html", ".htm", ".tab", ".psv", ".xls", ".xlsx", ".ods", ".arrow",
    ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z",
)  # fmt: skip


@dataclass(frozen=True)
class PromptList:
    """Prompts to train on, and what was left out on the way to them.

    Args:
        prompts: the prompts, none empty, none twice.
        empty: empty lines or captions that were read.
        duplicates: repetitions of an earlier prompt that were read.
    """

    prompts: list[str]
    empty: int
    duplicates: int

    def __str__(self) -> str:
        return (
            f"{len(self.prompts)} prompts, after leaving out {self.empty} empty and {self.duplicates} duplicate ones"
        )


def load_prompts(
    source: str | PathLike[str],
    *,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
    max_prompts: int | None = None,
) -> PromptList:
    """Read prompts from a file or a `datasets` data set; empty ones and repetitions are left out and counted.

    Args:
        source: a csv, tsv, json, jsonl, ndjson or parquet file; any other file, as UTF-8 text with one prompt a line;
            or what `datasets.load_dataset` takes, a folder or a Hub id. Its images, if any, are never decoded.
        config: the data set's configuration.
        split: the data set's split.
        column: the column that holds the captions; a text file has none.
        streaming: read a data set as it comes instead of downloading and converting all of it first.
        max_prompts: stop reading once there are this many different ones; None reads all.

    Returns:
        The prompts in the source's order, each where it comes first, and the counts up to where reading stopped.

    Raises:
        ValueError: where the source cannot be read, a file is not UTF-8, the column is missing or not text, or there
            is no prompt.
    """
    _check_max_prompts(max_prompts)
    prompts: dict[str, None] = {}  # a set that keeps the order
    empty = duplicates = 0
    for prompt, _ in _read(source, column, config=config, split=split, streaming=streaming):
        if not prompt:
            empty += 1
        elif prompt in prompts:
            duplicates += 1
        else:
            prompts[prompt] = None
            if len(prompts) == max_prompts:
                break
    if not prompts:
        raise ValueError(f"{str(source)!r} holds no prompt: {empty} lines or captions, all of them empty")
    return PromptList(list(prompts), empty, duplicates)


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
    """Read prompts to evaluate on; empty ones are left out with a warning, repetitions stay.

    Args:
        source: as in `load_prompts`. `playgroundai/MJHQ-30K` needs no columns: its labels are its categories.
        config: the data set's configuration.
        split: the data set's split.
        prompt_column: the column of the prompts; a text file has none.
        label_column: the column of the concepts that they ask for.
        max_prompts: how many, the first ones; None for all.

    Returns:
        The prompts.

    Raises:
        ValueError: as `load_prompts`, and where a text file is asked for labels or a prompt has none.
    """
    _check_max_prompts(max_prompts)
    rows: Iterable[tuple[str, Any]]
    if str(source) == MJHQ_30K:
        label_column = "category"
        entries = json.loads(Path(hf_hub_download(MJHQ_30K, MJHQ_30K_PROMPTS, repo_type="dataset")).read_bytes())
        rows = [(entry["prompt"].strip(), entry[label_column]) for entry in entries.values()]
    else:
        rows = _read(source, prompt_column, label_column, config=config, split=split)
    prompts, labels, empty = [], [], 0
    for prompt, label in rows:
        if not prompt:
            empty += 1
            continue
        if label_column is not None and label is None:
            raise ValueError(f"label_column is {label_column!r}: prompt {prompt!r} of {str(source)!r} has none")
        prompts.append(prompt)
        labels.append(str(label))
        if len(prompts) == max_prompts:
            break
    if empty:
        logger.warning(f"{empty} empty prompts of {str(source)!r} are left out.")
    if not prompts:
        raise ValueError(f"{str(source)!r} holds no prompt: {empty} lines or captions, all of them empty")
    return EvaluationPrompts(prompts, [] if label_column is None else labels)


def _check_max_prompts(max_prompts: int | None) -> None:
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"max_prompts is {max_prompts}: it takes at least 1")


def _read(
    source: str | PathLike[str],
    prompt_column: str,
    label_column: str | None = None,
    *,
    config: str | None,
    split: str,
    streaming: bool = False,
) -> Iterator[tuple[str, Any]]:
    """The prompts of a source without the space around them, empty ones too, and their labels."""
    path = Path(source)
    suffix = path.suffix.lower()
    _check_file(path, suffix)
    prompts: Iterable[Any]
    labels: Iterable[Any] = repeat(None)
    if path.is_file() and suffix not in DATA_FILES:
        if label_column is not None:
            raise ValueError(f"label_column is {label_column!r}, but {str(source)!r} is text: it has no columns")
        prompts = _prompt_lines(path)
    elif path.is_file() and path.stat().st_size == 0:
        prompts = ()
    else:
        if path.is_file() and suffix != ".parquet":
            for _ in text_lines(path):  # `datasets` would replace or refuse what is not UTF-8, each reader in its way
                pass
        columns = (prompt_column,) if label_column is None else (prompt_column, label_column)
        data = load_data(source, *columns, config=config, split=split, streaming=streaming)
        prompts = column_values(data, prompt_column)
        if label_column is not None:
            labels = column_values(data, label_column)
    place = str(source) if suffix not in DATA_FILES and path.is_file() else f"{source}, column {prompt_column}"
    for prompt, label in zip(prompts, labels, strict=False):
        yield prompt_text(prompt, place).strip(), label


def is_text(words: str) -> bool:
    """Say whether every character is one, and none a NUL: a tokenizer, and a file, can take them."""
    return "\0" not in words and not any("\ud800" <= character <= "\udfff" for character in words)


def prompt_text(prompt: object, place: str) -> str:
    """Refuse what no tokenizer can read; what is missing is empty.

    Args:
        prompt: as it was read.
        place: where, for messages.

    Returns:
        The prompt.

    Raises:
        ValueError: where it is no text, or not that of one prompt.
    """
    if prompt is None:
        return ""
    if not isinstance(prompt, str):
        raise ValueError(f"{place!r} is not text: it holds {reprlib.repr(prompt)}")
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"{place!r} holds a prompt of {len(prompt):,} characters: is it one prompt a line?")
    if not is_text(prompt):
        raise ValueError(f"{place!r} holds {reprlib.repr(prompt)}, which is no text: it has a NUL or half a character")
    return prompt


def _check_file(path: Path, suffix: str) -> None:
    """Refuse what is named like a file of prompts and is none."""
    if suffix in (*DATA_FILES, ".txt") and not path.exists():
        raise ValueError(f"prompts file {str(path)!r} does not exist")
    if suffix in (*DATA_FILES, ".txt") and path.is_dir():
        raise ValueError(f"prompts file {str(path)!r} is a folder")
    if suffix in NOT_A_PROMPT_A_LINE and path.is_file():
        raise ValueError(
            f"prompts file {str(path)!r} is of a kind that is not read: give {', '.join(DATA_FILES)}, or text with one"
            " prompt a line"
        )


def _prompt_lines(path: Path) -> Iterator[str]:
    """The lines of a text file; those of a table or of JSON are refused, where they can be told from prompts."""
    first = next(text_lines(path), "").strip()
    if first in ("[", "{") or (first.startswith(("[", "{")) and _is_json(first)):
        raise ValueError(f"prompts file {str(path)!r} holds JSON: name it .json, or .jsonl for JSON line by line")
    yield from text_lines(path)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):  # a prompt in brackets
        return False
    return True


def text_lines(path: Path, what: str = "prompts file") -> Iterator[str]:
    """Read the lines of a file of UTF-8 text, whichever system's line ends it has, without byte order marks.

    Args:
        path: of the file.
        what: it is, for messages.

    Yields:
        The lines.

    Raises:
        ValueError: naming the file and the line, where it is not UTF-8 or holds a NUL.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{what} {str(path)!r} is not UTF-8: line {number} cannot be read. Save it as UTF-8"
                ) from error
            if "\0" in text:
                raise ValueError(
                    f"{what} {str(path)!r} is not UTF-8 text: line {number} holds a NUL, as UTF-16 and packed"
                    " files do. Save it as UTF-8"
                )
            for part in text.removesuffix("\n").removesuffix("\r").split("\r"):
                yield part.lstrip("\ufeff")
