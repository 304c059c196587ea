"""Training checkpoints that are whole or not there: written beside, renamed when complete, checked before loading."""

import json
import shutil
from pathlib import Path

from accelerate import Accelerator
from diffusers.utils import logging


logger = logging.get_logger(__name__)

# Written last into a checkpoint: its step, and the size of every other file.
MANIFEST = "checkpoint.json"


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, total_limit: int | None = None) -> Path:
    """Save everything that `accelerator` prepared or registered as `output_dir/checkpoint-{step}`.

    Args:
        accelerator: holds the training state; every process calls this.
        output_dir: the run's folder.
        step: optimiser steps done.
        total_limit: older checkpoints are deleted down to this many, after the new one is complete; None keeps all.

    Returns:
        The checkpoint's folder.
    """
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f"{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sizes = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": sizes}, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Find the checkpoints of a run.

    Args:
        output_dir: the run's folder.

    Returns:
        The folders `checkpoint-{step}`, by step; those still being written are not among them.
    """
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_step(checkpoint: Path) -> int:
    """Check that a checkpoint is whole.

    Args:
        checkpoint: its folder.

    Returns:
        The optimiser steps it was saved after.

    Raises:
        ValueError: where the folder is missing, or a file of it is missing or cut short.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        step, sizes = int(manifest["step"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {str(checkpoint)!r} is not complete: no readable {MANIFEST}") from error
    for name, size in sizes.items():
        file = checkpoint / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            state = "missing" if actual is None else f"{actual} bytes instead of {size}"
            raise ValueError(f"checkpoint {str(checkpoint)!r} is corrupt: {name} is {state}")
    return step


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> tuple[Path, int] | None:
    """Choose the checkpoint to resume from.

    Args:
        output_dir: the run's folder.
        resume_from_checkpoint: `"latest"`, or a checkpoint by path or by name in `output_dir`.

    Returns:
        Its folder and step; with `"latest"` the newest that is whole (torn ones are named in a warning), or None where
        there is no checkpoint at all.

    Raises:
        ValueError: where a checkpoint that was asked for is not whole, or every one that `"latest"` finds is torn.
    """
    if resume_from_checkpoint != "latest":
        path = Path(resume_from_checkpoint)
        path = path if path.is_dir() else output_dir / resume_from_checkpoint
        return path, checkpoint_step(path)
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in reversed(checkpoints):
        try:
            return checkpoint, checkpoint_step(checkpoint)
        except ValueError as error:
            logger.warning(f"{error}. Trying the one before it.")
    if checkpoints:
        raise ValueError(f"no checkpoint in {str(output_dir)!r} is whole: start again with another --output_dir")
    return None
