"""The columns of a `datasets` data set or of a data file: found, checked to be there, and read without the others."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # `datasets` is an extra, and heavy
    from datasets import Dataset, IterableDataset

AS_WRITTEN = {"keep_default_na": False, "na_values": [""]}  # pandas takes None, null and NA for nothing
DATA_FILES: dict[str, tuple[str, dict[str, Any]]] = {  # by suffix: the builder of `datasets` and its options
    ".csv": ("csv", AS_WRITTEN),
    ".tsv": ("csv", {"sep": "\t", **AS_WRITTEN}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
}
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
        source: a file of one of the kinds in `DATA_FILES`, or what `datasets.load_dataset` takes: a folder or a Hub
            id.
        columns: names that it has to have.
        config: the data set's configuration.
        split: the data set's split; a file has none.
        streaming: read it as it comes instead of downloading and converting all of it first; its pictures are then
            not decoded.

    Returns:
        The data set, with all its columns.

    Raises:
        ValueError: where it cannot be read, or a column is missing; the message says which there are.
    """
    from datasets import load_dataset

    path = Path(source)
    with _readable(repr(str(source))):
        if path.is_file():
            builder, options = DATA_FILES[path.suffix.lower()]
            files = glob.escape(str(source))  # `datasets` takes a pattern
            data = load_dataset(builder, data_files=files, split="train", streaming=streaming, **options)
        else:
            data = load_dataset(str(source), config, split=split, streaming=streaming)
        if streaming and data.features is not None:
            data = data.decode(False)  # a remote stream decodes every image in threads, whatever is selected later
        found = data.column_names or list(next(iter(data), {}))  # unknown to a stream of csv or json until it is read
    if not found:
        raise ValueError(f"{str(source)!r} has no rows")
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

    Raises:
        ValueError: where a stream breaks off.
    """
    feature = (data.features or {}).get(column)
    names = getattr(feature, "names", None)  # of a ClassLabel
    streaming = not hasattr(data, "__len__")
    with _readable(f"column {column!r}"):
        for batch in data.select_columns([column]).iter(batch_size=1 if streaming else READ_BATCH):
            for value in batch[column]:
                if value is not None and names is not None:
                    yield names[value]
                elif streaming and type(feature).__name__ == "Json" and isinstance(value, str):
                    yield json.loads(value)  # values of several types, as `decode(False)` leaves them
                else:
                    yield value


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn whatever `datasets` and the readers below it raise into one line, which gives the first cause."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).splitlines() or [""])[0] or type(cause).__name__
        if "corresponds to no data" in reason:  # of the split, in the words of `datasets`
            reason = "it has no rows"
        raise ValueError(f"{what} cannot be read: {reason}") from error
