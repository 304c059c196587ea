"""How a training script is started: signals, the dry run, exit codes."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from diffusers.utils import logging

from ..command_line import ending_in_words, outliving_streams, show_information
from ..files import PARTIAL_SUFFIX
from ..owned import OwnedFolder
from ..pipeline_folder import CARD, CHECKPOINT, LORA, METRICS, METRICS_LOG, SAMPLE_GRID, VALIDATION
from .accelerators import ending_together
from .interruption import RESUMABLE_EXIT_CODE, StopRequest
from .run import Run
from .settings import RunSettings, flags_of


logger = logging.get_logger(__name__)
S = TypeVar("S", bound=RunSettings)
GROUP_SECONDS = 0.2  # in which the threads of a process group come to letting go
# What has the first steps differ from those that follow; rows are of several recordings only after `replay_steps`.
PHASES = ("endpoint_warmup_steps", "replay_steps")


def launch(train: Callable[[S, StopRequest], Run], settings: S) -> None:
    """Train, or try everything once.

    Args:
        train: the script's; gives back its run.
        settings: the script's.

    Raises:
        SystemExit: with code 75 where a signal ended the run after a checkpoint, 1 where a push failed, 2 where the
            run could not go on for a reason that is no bug; a line says it.
    """
    show_information()
    with outliving_streams():
        with ending_in_words(flags_of(type(settings)), debug=settings.debug), StopRequest() as stop:
            run = dry_run(train, settings, stop) if settings.dry_run else train(settings, stop)
        accelerator, stopped, pushed = run.accelerator, run.stopped, run.pushed
        del run
        _close(accelerator)
        if stopped:
            print(f"Stopped on request; --resume_from_checkpoint latest goes on. Exit code {RESUMABLE_EXIT_CODE}.")
            sys.exit(RESUMABLE_EXIT_CODE)
        if not pushed:
            sys.exit(1)  # a warning has said what to do


def _close(accelerator: Accelerator) -> None:
    """Close trackers and process group: where its threads let go of tensors while the interpreter ends, it aborts.

    The group's end waits for its threads, if no model holds it; of FSDP2's group, caches of DTensor do.
    """
    accelerator.free_memory()
    try:
        accelerator.end_training()
    except OSError as error:  # of a tracker that has more to write
        logger.warning(f"The trackers could not be closed: {error}")
    if accelerator.is_fsdp2:
        time.sleep(GROUP_SECONDS)


def dry_run(train: Callable[[S, StopRequest], Run], settings: S, stop: StopRequest) -> Run:
    """Take one step with checkpoint, validation and export, resume until each model was updated, and print it all.

    The first step is the only one of `PHASES` that the run itself leaves: the second is of the kind that follows.

    Args:
        train: the script's.
        settings: the script's; nothing is written to their `output_dir`, or pushed.
        stop: notes the signals.

    Returns:
        The second run.

    Raises:
        ValueError: where the run itself would find something in its way in `output_dir`.
    """
    at_home: dict[str, Any] = {"push_to_hub": False, "hub_strategy": "end"}
    at_home |= dict.fromkeys(("hub_model_id", "hub_token", "hub_private_repo", "hub_license"))
    often: dict[str, Any] = dict.fromkeys(("checkpointing_steps", "validation_steps", "logging_steps"), 1)
    left = [name for name in PHASES if 1 < getattr(settings, name, 0) < settings.max_train_steps]
    often |= dict.fromkeys(left, 1)
    with _scratch_folder(Path(settings.output_dir)) as folder:
        once = replace(
            settings, output_dir=str(folder), max_train_steps=1, resume_from_checkpoint=None, **at_home, **often
        )
        steps = max(2, train(once, stop).round_steps)
        run = train(replace(once, max_train_steps=steps, resume_from_checkpoint="latest"), stop)
        with ending_together(run.accelerator):
            if run.accelerator.is_main_process:
                _check_places(folder, Path(settings.output_dir))
                lines = (folder / METRICS_LOG).read_text(encoding="utf-8").splitlines()
                print("\nDry run: everything ran once, in a folder that is now deleted. Its steps:")
                print("\n".join(lines))
    return run


def _check_places(scratch: Path, output_dir: Path) -> None:
    """Refuse a folder in which something is in the way of what the dry run wrote; steps will be others."""
    for written, target in ((scratch, output_dir), (scratch / LORA, output_dir / LORA)):
        names = [name for name in OwnedFolder(written).names if not name.startswith((CHECKPOINT, VALIDATION))]
        if CARD in names:  # a student, of which these would tell something else
            names += [METRICS, SAMPLE_GRID]
        if names:
            OwnedFolder(target).check()
            OwnedFolder(target).check_free(names)


@contextmanager
def _scratch_folder(output_dir: Path) -> Iterator[Path]:
    """A folder on the disk of a run's, the same in all processes, that is not there before and afterwards."""
    scratch = OwnedFolder(output_dir).disk() / f".{output_dir.resolve().name}.dry_run{PARTIAL_SUFFIX}"
    shutil.rmtree(scratch, ignore_errors=True)  # of a dry run that was killed; no process writes before all are here
    try:
        yield scratch / output_dir.resolve().name
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
