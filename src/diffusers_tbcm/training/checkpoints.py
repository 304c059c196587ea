"""Training checkpoints that are whole or not there: written beside, renamed when complete, checked before loading."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import logging
from safetensors import SafetensorError

from ..files import beside, read_json, replace, write_json
from ..pipeline_folder import list_checkpoints


logger = logging.get_logger(__name__)

# Written last into a checkpoint: its step, and the size of every other file.
MANIFEST = "checkpoint.json"


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, total_limit: int | None = None
) -> Path | None:
    """Save everything that `accelerator` prepared or registered as `output_dir/checkpoint-{step}`.

    A checkpoint that cannot be written (a full disk, a folder without permission) is named in a warning and leaves
    nothing behind: the run and its earlier checkpoints are worth more.

    Args:
        accelerator: holds the training state; every process calls this.
        output_dir: the run's folder.
        step: optimiser steps done.
        total_limit: other checkpoints are deleted down to this many in all, after the new one is complete; None keeps
            all.

    Returns:
        The checkpoint's folder; None where it could not be written.
    """
    final = output_dir / f"checkpoint-{step}"
    partial = beside(final)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    failure = None
    try:
        accelerator.save_state(str(partial))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's error
        failure = error
    if accelerator.reduce(torch.tensor(int(failure is not None), device=accelerator.device)) == 0:
        try:
            if accelerator.is_main_process:
                _complete(partial, final, step, total_limit)
        except OSError as error:
            failure = error
        if accelerator.reduce(torch.tensor(int(failure is not None), device=accelerator.device)) == 0:
            return final
    if failure is not None:
        logger.warning(f"{final} could not be written, training goes on without it: {failure}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    return None


def _complete(partial: Path, final: Path, step: int, total_limit: int | None) -> None:
    sizes = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
    write_json(partial / MANIFEST, {"step": step, "files": sizes})
    replace(partial, final)
    if total_limit is not None:
        others = [checkpoint for checkpoint in list_checkpoints(final.parent) if checkpoint != final]
        for other in others[: max(0, len(others) - total_limit + 1)]:
            shutil.rmtree(other)


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
        manifest = read_json(checkpoint / MANIFEST)
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
        raise ValueError(f"no checkpoint in {str(output_dir)!r} is whole: start again in another folder")
    return None
