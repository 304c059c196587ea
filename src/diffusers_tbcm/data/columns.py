"""The columns of a `datasets` data set or of a data file: found, checked to be there, and read without the others."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # `datasets` is an extra, and heavy
    from datasets import Dataset, IterableDataset

DATA_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}  # suffix: `datasets` builder
READ_BATCH = 1000  # values taken together from a data set on disk; a stream gives one at a time
MJHQ_30K = "playgroundai/MJHQ-30K"  # 3,000 pictures of each of 10 categories; prompts in a file of their own


def load_data(
    source: str | PathLike[str],
    *columns: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load a data set that has certain columns.

    Args:
        source: a csv, json, jsonl or parquet file, or what `datasets.load_dataset` takes: a folder or a Hub id.
        columns: names that it has to have.
        config: the data set's configuration.
        split: the data set's split; a file is one split, `"train"`.
        streaming: read it as it comes instead of downloading and converting all of it first; its pictures are then
            not decoded.

    Returns:
        The data set, with all its columns.

    Raises:
        ValueError: where a column is missing; the message says which there are.
    """
    from datasets import load_dataset

    path = Path(source)
    if path.is_file():
        data = load_dataset(DATA_FILES[path.suffix], data_files=str(source), split=split, streaming=streaming)
    else:
        data = load_dataset(str(source), config, split=split, streaming=streaming)
    if streaming and data.features is not None:
        data = data.decode(False)  # a remote stream decodes every image in threads, whatever is selected later
    found = data.column_names or list(next(iter(data), {}))  # unknown to a stream of csv or json until it is read
    for column in columns:
        if column not in found:
            raise ValueError(f"{str(source)!r} has no column {column!r}: it has {', '.join(found)}")
    return data


def column_values(data: Dataset | IterableDataset, column: str) -> Iterator[Any]:
    """Read a column from beginning to end, and no other.

    Args:
        data: from `load_data`.
        column: its name.

    Yields:
        The values; of classes, their names.
    """
    names = getattr((data.features or {}).get(column), "names", None)  # of a ClassLabel
    streaming = not hasattr(data, "__len__")
    for batch in data.select_columns([column]).iter(batch_size=1 if streaming else READ_BATCH):
        for value in batch[column]:
            yield value if names is None or value is None else names[value]
