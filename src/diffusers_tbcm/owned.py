"""A folder of ours: a marker in it lists what we wrote, and nothing else in it is ever replaced or deleted.

A folder becomes ours where it is empty or missing. The marker is its first file; every other one is listed before it
gets its name. A file that somebody changed is theirs from then on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b, file_digest
from os import PathLike
from pathlib import Path
from typing import TypedDict

from diffusers.utils import logging
from filelock import FileLock, Timeout

from .files import PARTIAL_SUFFIX, read_json, remove, write_json, written_beside


logger = logging.get_logger(__name__)

MARKER = ".diffusers_tbcm"
LOCK = f"{MARKER}.lock"
SET_ASIDE = "abandoned"  # what a run that went back has left
NEUTRAL = {"lost+found"}  # what a new volume holds
NAMED = 3  # so many files are named in a message


class Written(TypedDict):
    """What a file was when it was written; where size and time still hold, it is not read again."""

    size: int
    mtime_ns: int
    digest: str


class OwnedFolder:
    """A folder that only we write to, as far as it is listed in its marker.

    Args:
        folder: there or not.
        argument: what it is called where it was given, for messages.
    """

    def __init__(self, folder: str | PathLike[str], argument: str = "output_dir") -> None:
        self.folder = Path(folder)
        self._argument = argument

    def check(self) -> None:
        """Refuse a folder that is neither empty nor ours.

        Raises:
            ValueError: naming what it holds; also where it is a file, or cannot be looked into.
        """
        try:
            if self.disk() != self.folder:
                return
            names = sorted(path.name for path in self.folder.iterdir() if not _is_neutral(path))
            claimed = (self.folder / MARKER).is_file()  # looked for last: it is there before anything else
        except OSError as error:
            raise ValueError(f"{self._named} cannot be read: {error}") from error
        if names and not claimed:
            raise ValueError(
                f"{self._named} holds files that are not this package's ({_listed(names)}): choose an empty or a new"
                " folder"
            )

    def disk(self) -> Path:
        """Give the folder itself or, where it is not there, the nearest one above that is.

        Raises:
            ValueError: where that is a file.
        """
        found = next(path for path in (self.folder, *self.folder.parents) if os.path.lexists(path))
        if not found.is_dir():
            kind = "a link that leads nowhere" if found.is_symlink() else "a file"
            raise ValueError(f"{self._named} cannot be a folder, as {str(found)!r} is {kind}: name another")
        return found

    def claim(self) -> None:
        """Make the folder ours, where it is not: it is made, and gets its marker.

        Raises:
            ValueError: as `check`, or where the folder cannot be written to.
        """
        self.check()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / MARKER).is_file():
                (self.folder / MARKER).open("x").close()
        except FileExistsError:
            pass  # another process was first
        except OSError as error:
            raise ValueError(f"{self._named} cannot be written to: {error}") from error

    def hold(self) -> FileLock:
        """Keep other processes from running in the folder.

        Returns:
            The lock: it is held as long as this object lives, and goes with the process however that ends.

        Raises:
            ValueError: where another process holds it.
        """
        lock = FileLock(self.folder / LOCK, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"{self._named} belongs to a run that still goes on: choose another folder") from error
        except (OSError, NotImplementedError) as error:  # some network disks have no locks
            logger.warning(f"{self._named} cannot be locked, take care that no other run uses it: {error}")
        return lock

    def check_renaming(self) -> None:
        """Clear away what a killed process left half-written, and try what the export will do.

        Raises:
            ValueError: where folders cannot be made and files renamed, as on some network disks.
        """
        staged, moved = (self.folder / f".{name}{PARTIAL_SUFFIX}" for name in ("try", "tried"))
        try:
            for left in self.folder.glob(f".*{PARTIAL_SUFFIX}"):
                remove(left)
            for folder in (staged, moved):
                folder.mkdir()
            (staged / "file").write_text("renamed\n", encoding="utf-8")
            (staged / "file").replace(moved / "file")
            moved.replace(staged)
        except OSError as error:
            raise ValueError(f"{self._named} takes no student, as files cannot be renamed in it: {error}") from error
        finally:
            remove(staged)
            remove(moved)

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Say which files are in the way of ours.

        Args:
            names: paths in the folder that are to be written.

        Returns:
            Those that are there and not ours, or would be reached through a link or a file.
        """
        written = self._written()
        return sorted({name for name in names if not self._is_free(name, written)})

    def check_free(self, names: Iterable[str]) -> None:
        """Refuse to write where something is that is not ours.

        Args:
            names: paths in the folder.

        Raises:
            ValueError: naming what is in the way.
        """
        if found := self.foreign(names):
            raise ValueError(
                f"{self._named} holds what this package did not write, or what was changed since"
                f" ({_listed(found)}): move it to another place"
            )

    def own(self, *names: str) -> None:
        """List files or folders that we are going to write and to change.

        Args:
            names: paths in the folder; nothing foreign may be there.

        Raises:
            ValueError: where something is.
        """
        self.check_free(names)
        self._note({name: [] for name in names})

    @contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """Give a path to write a file at, which then takes its place, as `files.written_beside` does.

        Args:
            name: of the file, in the folder.

        Yields:
            The path to write at.

        Raises:
            ValueError: where the folder has such a file that is not ours.
        """
        self.check_free([name])
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)

        def place(partial: Path, target: Path) -> None:
            self.check_free([name])
            new = _state(partial)
            self._note({name: [*self._current([name])[name], new]})
            partial.replace(target)
            self._note({name: [new]})

        with written_beside(path, place=place) as partial:
            yield partial

    @contextmanager
    def replaced(self, *, last: str, absent: Iterable[str], stale: Iterable[str]) -> Iterator[Path]:
        """Give a folder to write in, whose files then take their places here, those of an earlier time going.

        Until all is written nothing here changes.

        Args:
            last: the file that makes the folder what it is: it goes first and comes last.
            absent: files that must not outlive what they were about.
            stale: further files and folders of ours that go even if nothing of that name comes.

        Yields:
            The folder to write in, on the same disk.

        Raises:
            ValueError: where something in the way is not ours; nothing has changed then.
        """
        absent = set(absent)
        old_roots = absent | set(stale)

        def place(staged: Path, target: Path) -> None:
            files = {path.relative_to(staged).as_posix(): path for path in staged.rglob("*") if path.is_file()}
            self.check_free([*files, *absent])
            roots = old_roots | {name.partition("/")[0] for name in files}
            old = {name for name in self._written() if name.partition("/")[0] in roots} - files.keys()
            new = {name: _state(path) for name, path in files.items()}
            self._note({name: [*found, new[name]] for name, found in self._current(files).items()})
            for name in [last, *sorted(old - set(self.foreign(old)))]:
                (self.folder / name).unlink(missing_ok=True)
                _drop_empty((self.folder / name).parent, self.folder)
            for name in sorted(files, key=lambda name: (name == last, name)):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                files[name].replace(self.folder / name)
            remove(staged)
            with suppress(OSError):  # a full disk: the longer list holds as well
                self._note({name: [state] for name, state in new.items()}, gone=old)

        with written_beside(self.folder / "student", place=place) as partial:
            partial.mkdir()
            yield partial

    def set_aside(self, name: str) -> Path:
        """Move something of ours to `abandoned/`, where it is the user's.

        Args:
            name: path in the folder.

        Returns:
            Where it is; a number is added where something of that name is there.
        """
        target = first = self.folder / SET_ASIDE / name
        number = 1
        while os.path.lexists(target):
            number += 1
            target = first.with_name(f"{first.stem}-{number}{first.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).rename(target)
        self.disown(name)
        return target

    def disown(self, name: str) -> None:
        """Take something from the list: what is left of it is the user's.

        Args:
            name: path in the folder.
        """
        self._note({}, gone={name})

    @property
    def names(self) -> list[str]:
        """What is listed, as paths in the folder; the marker is read for it."""
        return list(self._written())

    @property
    def _named(self) -> str:
        return f"`{self._argument}` {str(self.folder)!r}"

    def _is_free(self, name: str, written: dict[str, list[Written]]) -> bool:
        path = self.folder / name
        for parent in path.relative_to(self.folder).parents[:-1]:
            above = self.folder / parent
            if above.is_symlink() or (above.exists() and not above.is_dir()):
                return False
        if not os.path.lexists(path):
            return True
        if name not in written or path.is_symlink():
            return False
        states = written[name]
        return not states or (path.is_file() and _is_one_of(path, states))

    def _current(self, names: Iterable[str]) -> dict[str, list[Written]]:
        """What the marker says of files as they are now, and the state itself where it takes any."""
        written, found = self._written(), {}
        for name in names:
            path, states = self.folder / name, written.get(name, [])
            if name in written and not states and path.is_file():
                states = [_state(path)]
            found[name] = [state for state in states if _is_one_of(path, [state])]
        return found

    def _written(self) -> dict[str, list[Written]]:
        """What the marker lists, by path: the states that we know, none where any is ours.

        A marker may have been edited, or come from others: an entry that leads out of the folder is none.
        """
        try:
            listed = dict(read_json(self.folder / MARKER)["files"])
        except (OSError, ValueError, KeyError, TypeError):  # a new marker is empty
            return {}
        return {name: states for name, states in listed.items() if _leads_inside(name) and _are_states(states)}

    def _note(self, states: dict[str, list[Written]], gone: Iterable[str] = ()) -> None:
        written = {**self._written(), **states}
        for name in gone:
            written.pop(name, None)
        write_json(self.folder / MARKER, {"written by": "diffusers_tbcm", "files": written})


def _is_neutral(path: Path) -> bool:
    name = path.name
    if name in (MARKER, LOCK):
        return not path.is_dir()
    return name in NEUTRAL or (name.startswith(".") and name.endswith(PARTIAL_SUFFIX))


def _leads_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and path != Path() and ".." not in path.parts


def _are_states(states: object) -> bool:
    return isinstance(states, list) and all(
        isinstance(state, dict) and state.keys() >= Written.__required_keys__ for state in states
    )


def _state(path: Path) -> Written:
    found = path.stat()
    with path.open("rb") as file:
        digest = file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "digest": digest}


def _is_one_of(path: Path, states: list[Written]) -> bool:
    if not path.is_file():
        return False
    found = path.stat()
    alike = [state for state in states if state["size"] == found.st_size]
    if any(state["mtime_ns"] == found.st_mtime_ns for state in alike):
        return True
    return bool(alike) and _state(path)["digest"] in [state["digest"] for state in alike]


def _drop_empty(folder: Path, top: Path) -> None:
    """Delete a folder and those above it, as far as they are empty and below `top`."""
    while folder != top and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
