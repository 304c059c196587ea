"""SIGTERM, SIGINT and SIGHUP as a request: the step that runs is finished, a checkpoint is written, the run ends."""

import os
import signal
import sys
from pathlib import Path
from threading import Event, Thread
from types import FrameType

from diffusers.utils import logging


logger = logging.get_logger(__name__)

# sysexits.h EX_TEMPFAIL: nothing is wrong, the same command goes on where it resumes from a checkpoint.
RESUMABLE_EXIT_CODE = 75
# Programs and modules that start a script as their child, and that a signal may end alone.
LAUNCHERS = {
    "accelerate", "accelerate-launch", "torchrun", "quickstart.py",
    "accelerate.commands.launch", "accelerate.commands.accelerate_cli", "torch.distributed.run",
}  # fmt: skip
LAUNCHED = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")  # what launchers tell their children, and only they
HANGUP = getattr(signal, "SIGHUP", None)  # of a terminal that was closed; Windows has none
INIT = 1  # the process that gets the children of those that are gone
POLL_SECONDS = 0.5


class StopRequest:
    """In its `with` block, the first SIGTERM or SIGINT is a request to stop; a second one acts as it always did.

    So is SIGHUP, as often as it comes (a terminal's shell sends it too), unless `nohup` has it ignored.

    Before training begins there is no step to finish: the first signal then ends the program at once, with code 75.
    From `finish_steps` on it only sets `received`. On Linux a launcher that is gone, killed alone, counts as SIGTERM.
    """

    def __init__(self) -> None:
        self.received = False
        self._finishes_steps = False
        self._over = Event()

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        self._hangup = None if HANGUP is None else signal.getsignal(HANGUP)
        if HANGUP is not None and self._hangup is not signal.SIG_IGN:
            signal.signal(HANGUP, self._note)
        launcher = find_launcher()
        if launcher is not None:
            Thread(target=self._watch, args=(launcher,), daemon=True).start()
        elif os.getppid() == INIT and any(name in os.environ for name in LAUNCHED):
            self._watch(launcher=None)  # it was gone before this was imported
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._restore()
        if HANGUP is not None:
            signal.signal(HANGUP, self._hangup)

    def finish_steps(self) -> None:
        """From now on a signal is only noted: training has begun, and asks `received` in every step."""
        self._finishes_steps = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == HANGUP:
            return
        self.received = True
        self._restore()
        name = signal.Signals(number).name
        if self._finishes_steps:
            logger.warning(f"{name}: finishing this step and writing a checkpoint")
            return
        print(f"{name} before training began: the same command goes on. Exit code {RESUMABLE_EXIT_CODE}.")
        sys.exit(RESUMABLE_EXIT_CODE)

    def _watch(self, launcher: int | None) -> None:
        while not self._over.wait(POLL_SECONDS):
            if os.getppid() != launcher:
                if not self.received:  # a signal to the whole group ends the launcher too
                    logger.warning("The launcher is gone")
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def find_launcher() -> int | None:
    """Say which process launched this one.

    Returns:
        The parent's id where that is accelerate's or torch's launcher; None for a shell or a scheduler, whose end is
        no reason to stop, and where there is no `/proc` to tell.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return None
    module_files = {f"{name.replace('.', '/')}.py" for name in LAUNCHERS if "." in name}
    launches = any(
        Path(part).name in LAUNCHERS or any(part.endswith(f"/{file}") for file in module_files) for part in command[:8]
    )
    return parent if launches else None
