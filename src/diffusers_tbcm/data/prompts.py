"""Prompts: where they come from, and the order and randomness they are drawn with."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path


DATA_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}  # suffix: `datasets` builder
READ_BATCH = 1000  # captions taken together from a data set on disk; a stream gives one at a time


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
    path = Path(source)
    if path.suffix in (*DATA_FILES, ".txt") and not path.is_file():
        raise ValueError(f"prompts file {str(source)!r} does not exist")
    captions: Iterable[object]
    if path.is_file() and path.suffix not in DATA_FILES:
        captions = _read_lines(path)
    elif path.is_file() and path.stat().st_size == 0:
        captions = ()
    else:
        captions = _read_column(str(source), config, split, column, streaming)

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


def _read_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"prompts file {str(path)!r} is not UTF-8: line {number} cannot be read") from error


def _read_column(source: str, config: str | None, split: str, column: str, streaming: bool) -> Iterator[object]:
    from datasets import load_dataset

    path = Path(source)
    if path.is_file():
        data = load_dataset(DATA_FILES[path.suffix], data_files=source, split=split, streaming=streaming)
    else:
        data = load_dataset(source, config, split=split, streaming=streaming)
    if streaming and data.features is not None:
        data = data.decode(False)  # a remote stream decodes every image in threads, whatever is selected later
    columns = data.column_names or list(next(iter(data), {}))  # unknown to a stream of csv or json until it is read
    if column not in columns:
        raise ValueError(f"{source!r} has no column {column!r}: it has {', '.join(columns)}")
    for batch in data.select_columns([column]).iter(batch_size=1 if streaming else READ_BATCH):
        yield from batch[column]
