"""What the command lines of package and scripts share: how they read flags, what they say, and how they end."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from argparse import (
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from .errors import EndedElsewhere, in_a_line, is_lost_process, is_users
from .redaction import hide_secrets


USERS_MISTAKE = 2  # the exit code, argparse's own
NAMED_LENGTH = 60  # characters of a path that is too long
INTERRUPTED = 130  # a shell's, of SIGINT
LOST_PROCESS = "another process of the run is gone, and its message says why"
DEBUG_HELP = "end an error with its traceback"


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, but for those that are nothing, and a description in its own lines."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.nargs == 0 and action.const is False:
            return f"do not: {action.help}"
        is_switch = action.nargs == 0 and action.const is True
        return action.help if action.default is None or is_switch else super()._get_help_string(action)


class CommandParser(ArgumentParser):
    """Shows defaults, and ends what does not fit in one line, without secrets or the usage with its many flags."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # the first process of the machine says the same
            self.exit(USERS_MISTAKE)
        self.exit(USERS_MISTAKE, f"{self.prog}: error: {hide_secrets(message)}\n")

    def check_at_least(self, minimum: int, **values: int | None) -> None:
        """End the program where a value of a flag is too small; None passes."""
        for name, value in values.items():
            if value is not None and value < minimum:
                self.error(f"--{name} is {value}: it takes at least {minimum}")


def finite_number(text: str) -> float:
    """Read a number, and neither infinity nor what is none: the `type` of an argument."""
    number = float(text)
    if not math.isfinite(number):
        raise ArgumentTypeError(f"{text} is no finite number")
    return number


def path_argument(text: str) -> Path:
    """Read a path, and neither nothing, which would be the working directory, nor a name that no disk takes.

    `-` is refused too: what is written is no stream.
    """
    if not text.strip() or text == "-":
        raise ArgumentTypeError(f"{text!r} names no file or folder")
    try:
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # whoever reads or writes there says it
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArgumentTypeError(f"{text[:NAMED_LENGTH]!r} names no file or folder: {reason}") from error
    return Path(text)


def name_flags(message: str, flags: Mapping[str, str]) -> str:
    """Put flags into a message in place of the arguments that it names in backticks.

    Args:
        message: of the library.
        flags: by argument.

    Returns:
        The message for who gave flags.
    """
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), message)


@contextmanager
def ending_in_words(flags: Mapping[str, str], *, debug: bool, program: str | None = None) -> Iterator[None]:
    """End the program in one line where what runs in the block fails by its user's mistake; a bug keeps its traceback.

    Args:
        flags: by the argument that they set.
        debug: a user's mistake ends in its traceback too.
        program: its name in the line; the script's by default.

    Raises:
        SystemExit: with code 2 for a mistake, 130 where the user interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug or not is_users(error):
            raise
        if isinstance(error, EndedElsewhere):
            sys.exit(USERS_MISTAKE)
        rank = int(os.environ.get("RANK", "0"))
        where = f"rank {rank}: " if rank else ""
        words = LOST_PROCESS if is_lost_process(error) else in_a_line(error)
        message = hide_secrets(name_flags(words, flags))
        line = f"{program or Path(sys.argv[0]).name}: error: {where}{message}"
        print(line, file=sys.stderr)
        ended = SystemExit(line)
        ended.code = USERS_MISTAKE
        raise ended from error


class _Outlived:
    """A stream whose end the program outlives: a closed terminal or pipe, a log on a full disk, a narrow encoding."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def leave(self) -> None:
        """Let what cannot be written go: the interpreter would end with another exit code."""
        try:
            self._stream.flush()
        except OSError:
            with suppress(OSError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def outliving_streams() -> Iterator[None]:
    """Let nothing that is printed in the block end the program, whatever has become of its output."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is None:  # the program was started without
                stream = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            outlived = _Outlived(stream)
            stack.enter_context(redirect(cast(TextIO, outlived)))
            stack.callback(outlived.leave)
        yield


def show_information() -> None:
    """Make the package's own lines of information visible, in one process of all; other libraries stay as they are."""
    ours = logging.getLogger(__package__)
    ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    if not ours.hasHandlers():
        ours.addHandler(logging.StreamHandler())
