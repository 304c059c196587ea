"""A folder of safetensors shards that were all made of one thing, each whole or not there: computed once, then read.

Every shard says in its metadata what it was made of, as a fingerprint: a short text for each thing that matters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.utils import logging
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..files import PARTIAL_SUFFIX, written_beside
from ..owned import OwnedFolder


logger = logging.get_logger(__name__)

SUFFIX = ".safetensors"
WRITING = f".shards{PARTIAL_SUFFIX}"  # the lock of who writes one
TORN = (OSError, SafetensorError)  # what reading a shard raises that is gone or cut short
ModelT = TypeVar("ModelT")
ShardT = TypeVar("ShardT", bound=Sized)


@dataclass(frozen=True)
class ShardFolder:
    """The shards of one fingerprint, and the words that messages about them use.

    Args:
        folder: where they are.
        fingerprint: what they have to be made of.
        entry: the metadata's one entry, which holds the fingerprint: safetensors writes several in varying order.
        items: what a shard holds, such as `"prompts"`.
        others: what the folder holds where the fingerprint is another, such as `"embeddings of another encoder"`.
        redo: what deleting the folder leads to, such as `"embed the prompts again"`.
    """

    folder: Path
    fingerprint: Mapping[str, str]
    entry: str
    items: str
    others: str
    redo: str

    def whole(self, tensors: Sequence[str] = ()) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
        """Go through the shards that are whole; the others are named in a warning.

        Args:
            tensors: names of tensors to read of each.

        Yields:
            A shard's file and those tensors, by name.

        Raises:
            ValueError: where a shard has another fingerprint; the message says what differs.
        """
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                with safe_open(path, framework="pt") as file:
                    self._check(_fingerprint((file.metadata() or {}).get(self.entry, "{}")))
                    found = {name: file.get_tensor(name) for name in tensors}
            except TORN as error:
                logger.warning(f"{str(path)!r} is torn, its {self.items} count as missing: {error}")
                continue
            yield path, found

    def fill(
        self,
        shards: Sequence[ShardT],
        load: Callable[[], ModelT],
        make: Callable[[ModelT, ShardT, Callable[[int], object]], tuple[str, Mapping[str, torch.Tensor]]],
        *,
        label: str,
        quiet: bool = False,
    ) -> int:
        """Make shards and write them, one after the other: what is written stays, wherever this is stopped.

        Args:
            shards: what each is to be made of.
            load: loads the model that makes them; called only where there is something to make.
            make: gives a shard's name and tensors, from the model and what the shard is made of; tells its third
                argument how many items it has finished, as it goes.
            label: of the progress bar.
            quiet: show none.

        Returns:
            How many items were made.

        Raises:
            ValueError: where the folder holds files that are no shards, or the model gives NaN or infinity; that shard
                is not written.
        """
        if not shards:
            return 0
        if next(self.whole(), None) is None:  # a folder with shards is theirs, whoever began it
            OwnedFolder(self.folder, "folder").claim()
        model = load()
        total = sum(map(len, shards))
        with tqdm(total=total, desc=label, unit=self.items.removesuffix("s"), disable=quiet) as progress:
            for shard in shards:
                name, tensors = make(model, shard, progress.update)
                if not all(tensor.isfinite().all() for tensor in tensors.values()):
                    raise ValueError(
                        f"{self.items} became NaN or infinity: the model's weights hold some, or its precision is too"
                        " low for it"
                    )
                with self._alone(), written_beside(self.path(name)) as partial:
                    save_file(dict(tensors), partial, metadata={self.entry: json.dumps(dict(self.fingerprint))})
        return total

    def path(self, name: str) -> Path:
        """Say where a shard is.

        Args:
            name: the shard's.

        Returns:
            Its file.
        """
        return self.folder / f"{name}{SUFFIX}"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other run write here meanwhile: one that makes the same shards writes them by the same names."""
        path = self.folder / WRITING
        lock = FileLock(path)
        with suppress(OSError, NotImplementedError):  # some network disks have no locks
            lock.acquire()
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)  # who waits for it takes the next
            lock.release()

    def _check(self, found: Mapping[str, str]) -> None:
        differences = [
            f"{name} is {found.get(name)}, not {value}"
            for name, value in self.fingerprint.items()
            if found.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"{str(self.folder)!r} holds {self.others}: {'; '.join(differences)}. Choose another folder, or delete"
                f" this one to {self.redo}"
            )


def _fingerprint(text: str) -> dict[str, str]:
    """What a shard says that it is made of; nothing, where that cannot be read."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def holds(path: Path, tensor: str) -> bool:
    """Say whether a shard has a tensor of some name.

    Args:
        path: the shard.
        tensor: the name.

    Returns:
        Whether it has.

    Raises:
        OSError, SafetensorError: those of `TORN`, where the shard is gone or torn.
    """
    with safe_open(path, framework="pt") as file:
        return tensor in file.keys()


def read_slice(path: Path, tensor: str, place: int | slice) -> torch.Tensor:
    """Read a part of a shard's tensor and nothing else of it.

    Args:
        path: the shard.
        tensor: its tensor's name.
        place: an index or a slice of the first dimension.

    Returns:
        The part.

    Raises:
        OSError, SafetensorError: those of `TORN`, where the shard is gone or torn.
        ValueError: where the part is not finite.
    """
    with safe_open(path, framework="pt") as file:
        part = file.get_slice(tensor)[place]
    if not part.isfinite().all():
        raise ValueError(f"shard {str(path)!r} holds NaN or infinity in its {tensor}: delete it, to have it made anew")
    return part


def own_shards(total: int, shard_size: int, *, process_index: int, num_processes: int) -> list[range]:
    """Say which shards a process makes: by their place alone, so that none is made twice however processes are timed.

    Args:
        total: items.
        shard_size: items a shard; the last may have fewer.
        process_index: this process among those that share the work.
        num_processes: how many share it.

    Returns:
        The numbers of each shard's items.
    """
    starts = range(process_index * shard_size, total, num_processes * shard_size)
    return [range(start, min(start + shard_size, total)) for start in starts]


def dtype_name(dtype: torch.dtype) -> str:
    """Name a precision in a fingerprint, such as `"float32"`."""
    return str(dtype).removeprefix("torch.")
