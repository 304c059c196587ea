"""SIGTERM and SIGINT as a request: the step that runs is finished, a checkpoint is written, then the run ends."""

import signal
from types import FrameType

from diffusers.utils import logging


logger = logging.get_logger(__name__)

# sysexits.h EX_TEMPFAIL: nothing is wrong, the same command goes on where it resumes from a checkpoint.
RESUMABLE_EXIT_CODE = 75


class StopRequest:
    """In its `with` block, the first SIGTERM or SIGINT only sets `received`; a second one acts as it always did."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()
        logger.warning(f"{signal.Signals(number).name}: finishing this step and writing a checkpoint")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
