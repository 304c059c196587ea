"""Errors in words: what failed without being a bug, and what libraries say of a file that they cannot load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike


MAX_LENGTH = 600  # characters of a message: some libraries list every weight of a network


class Failure(RuntimeError):
    """What ends a command that was given rightly, such as a Hub that refuses a push; the message says what to do."""


class EndedElsewhere(Failure):
    """What ends a process because another one has failed; that one's message says why."""


def in_a_line(error: BaseException) -> str:
    """Give the message of an error in one line, with its kind where the message alone would not tell.

    Args:
        error: any.

    Returns:
        The line, cut where it is very long.
    """
    words = " ".join(str(error).split())
    if not words or isinstance(error, LookupError):  # the message of a KeyError is a bare key
        words = f"{type(error).__name__} {words}".strip()
    return words if len(words) <= MAX_LENGTH else f"{words[:MAX_LENGTH]} ..."


@contextmanager
def loading(
    what: str, name: str | PathLike[str], *, but: type[Exception] | tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Name what libraries load in the block, whatever they raise for a file, folder or repository that is damaged.

    Args:
        what: it is to be, such as `"model"`.
        name: where it is.
        but: errors that pass as they are.

    Raises:
        ValueError: where it cannot be loaded, with the library's reason.
    """
    try:
        yield
    except Exception as error:  # a damaged config or file ends in nearly any
        if isinstance(error, but) or is_memory(error):
            raise
        raise ValueError(f"{what} {str(name)!r} cannot be loaded: {in_a_line(error)}") from error


@contextmanager
def loading_by_name(what: str, name: str | PathLike[str], kind: str) -> Iterator[None]:
    """Like `loading`, of a folder or a repository on the Hub: where there is none of that name, the message says so.

    Args:
        what, name: as `loading` takes them.
        kind: what is looked for, such as `"a pipeline folder"`.

    Raises:
        ValueError: where there is none of that name, or it cannot be loaded.
    """
    try:
        with loading(what, name, but=OSError):
            yield
    except OSError as error:
        raise ValueError(
            f"{what} {str(name)!r} is neither {kind} nor a model on the Hub that can be reached"
        ) from error


def is_memory(error: BaseException) -> bool:
    """Say whether memory ran out, on a GPU or in the machine."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))


def is_users(error: BaseException) -> bool:
    """Say whether an error is about what a command was given or met, and not a bug, which deserves a traceback.

    Args:
        error: what ended the command.

    Returns:
        True for arguments and files that do not fit, for what the system or the Hub refuses, for a package that is not
        installed, and where memory ran out.
    """
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError

    known = (ValueError, OSError, ImportError, Failure, HTTPError, SafetensorError)
    return isinstance(error, known) or is_memory(error) or is_lost_process(error)


def is_lost_process(error: BaseException) -> bool:
    """Say whether another process of the run is gone, which leaves this one without an answer."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__ in ("DistBackendError", "DistNetworkError")
        or ("gloo" in str(error) and any(words in str(error).lower() for words in ("connection", "broken pipe")))
    )
