"""Prompts: where they come from, to train on and to evaluate on."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from huggingface_hub import hf_hub_download

from .columns import DATA_FILES, MJHQ_30K, column_values, load_data


MJHQ_30K_PROMPTS = "meta_data.json"


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
        source: a csv, json, jsonl or parquet file; any other file, as UTF-8 text with one prompt a line; or what
            `datasets.load_dataset` takes, a folder or a Hub id. Its images, if any, are never decoded.
        config: the data set's configuration.
        split: the data set's split.
        column: the column that holds the captions; a text file has none.
        streaming: read a data set as it comes instead of downloading and converting all of it first.
        max_prompts: stop reading once there are this many different ones; None reads all.

    Returns:
        The prompts in the source's order, each where it comes first, and the counts up to where reading stopped.

    Raises:
        ValueError: where a file is missing or not UTF-8, the column is missing or not text, or there is no prompt.
    """
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"max_prompts is {max_prompts}: it takes at least 1")
    path = _existing(source)
    captions: Iterable[object]
    if path.is_file() and path.suffix not in DATA_FILES:
        captions = _read_lines(path)
    elif path.is_file() and path.stat().st_size == 0:
        captions = ()
    else:
        captions = column_values(load_data(source, column, config=config, split=split, streaming=streaming), column)

    prompts: dict[str, None] = {}  # a set that keeps the order
    empty = duplicates = 0
    for caption in captions:
        if caption is not None and not isinstance(caption, str):
            raise ValueError(f"column {column!r} of {str(source)!r} is not text: it holds {caption!r}")
        prompt = (caption or "").strip()
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
    path = _existing(source)
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
        columns = (prompt_column,) if label_column is None else (prompt_column, label_column)
        data = load_data(source, *columns, config=config, split="train" if path.is_file() else split)
        prompts = list(column_values(data, prompt_column))
        labels = [] if label_column is None else list(column_values(data, label_column))
    prompts, labels = prompts[:max_prompts], labels[:max_prompts]
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt {place} of {str(source)!r} is {prompt!r}, which is no text to draw")
    if not prompts:
        raise ValueError(f"{str(source)!r} holds no prompt")
    return EvaluationPrompts(prompts, [str(label) for label in labels])


def _existing(source: str | PathLike[str]) -> Path:
    """The path of prompts, which may be a Hub id, but where it is named like a file, is one."""
    path = Path(source)
    if path.suffix in (*DATA_FILES, ".txt") and not path.is_file():
        raise ValueError(f"prompts file {str(source)!r} does not exist")
    return path


def _read_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"prompts file {str(path)!r} is not UTF-8: line {number} cannot be read") from error
