"""Training checkpoints that are whole or not there: written beside, renamed when complete, checked before loading.

Nothing in them is read in a way that could run code: our own state is JSON and safetensors, and accelerate reads its
files as tensors and plain values only.
"""

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils import logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import WRITE_ERRORS, beside, read_json, write_json
from ..owned import OwnedFolder
from ..pipeline_folder import MANIFEST, list_checkpoints
from .resumption import BATCH, LENGTH


logger = logging.get_logger(__name__)

RUN_STATE = "run.json"  # what the run was told, and where it stands
RUN_STATE_ENTRIES = {"told": dict, "content": dict, "changes": list, "averaged_steps": dict, "health": dict}
AVERAGES = "ema.safetensors"


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    *,
    state: Mapping[str, Any],
    averages: Mapping[str, torch.Tensor],
) -> Path | None:
    """Save everything that `accelerator` prepared, and a run's own state, as `output_dir/checkpoint-{step}`.

    A checkpoint that cannot be written (a full disk, a folder without permission) is named in a warning and leaves
    nothing behind: the run and its earlier checkpoints are worth more.

    Args:
        accelerator: holds the training state; every process calls this.
        output_dir: the run's folder.
        step: optimiser steps done.
        state: the run's own, JSON values by name.
        averages: averaged weights by name, whole.

    Returns:
        The checkpoint's folder; None where it could not be written.
    """
    final = output_dir / f"checkpoint-{step}"
    partial = beside(final)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    failure: Exception | None = None
    fresh = [optimizer for optimizer in accelerator._optimizers if not optimizer.state]
    try:
        accelerator.save_state(str(partial))
        for optimizer in fresh:  # to which FSDP2's saving gives the state that a step of gradients of 0 leaves
            optimizer.state.clear()
        if accelerator.is_main_process:
            write_json(partial / RUN_STATE, state)
            if averages:
                save_file({name: weight.contiguous() for name, weight in averages.items()}, partial / AVERAGES)
    except WRITE_ERRORS as error:
        failure = error
    if accelerator.reduce(torch.tensor(int(failure is not None), device=accelerator.device)) == 0:
        try:
            if accelerator.is_main_process:
                counts = {"model": len(accelerator._models), "optimizer": len(accelerator._optimizers)}
                _complete(partial, final, step, counts)
        except (OSError, ValueError) as error:
            failure = error
        if accelerator.reduce(torch.tensor(int(failure is not None), device=accelerator.device)) == 0:
            return final
    if failure is not None:
        logger.warning(f"{final} could not be written, training goes on without it: {failure}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    return None


def _complete(partial: Path, final: Path, step: int, counts: dict[str, int]) -> None:
    sizes = {f.relative_to(partial).as_posix(): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
    if reason := _lacking(sizes, counts):
        raise ValueError(reason)
    write_json(partial / MANIFEST, {"step": step, "files": sizes})
    folder = OwnedFolder(final.parent)
    folder.own(final.name)
    if final.exists():  # of the same step, which was left behind
        folder.set_aside(final.name)
    partial.rename(final)


def rotate_checkpoints(output_dir: Path, newest: str, total_limit: int, *, sound: str | None = None) -> None:
    """Delete the oldest checkpoints.

    Args:
        output_dir: the run's folder.
        newest: name of the one that was written last; it stays, wherever its step stands among the others.
        total_limit: how many stay in all.
        sound: name of one that stays beside them.
    """
    listed = OwnedFolder(output_dir).names
    others = [other for other in list_checkpoints(output_dir) if other.name != newest and other.name in listed]
    for other in others[: max(0, len(others) - total_limit + 1)]:
        if other.name != sound:
            try:
                discard_checkpoint(other)
            except OSError as error:
                logger.warning(f"{other} could not be deleted: {error}")


def discard_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; whatever else lies in its folder stays, and one without manifest is set aside.

    Args:
        checkpoint: its folder, in a run's.
    """
    folder = OwnedFolder(checkpoint.parent)
    ours = listed_files(checkpoint)
    if ours is None:
        folder.set_aside(checkpoint.name)
        return
    for path in sorted(checkpoint.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.relative_to(checkpoint).as_posix() in ours:
            path.unlink()
        elif path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
    if not any(checkpoint.iterdir()):
        checkpoint.rmdir()
    folder.disown(checkpoint.name)


def listed_files(checkpoint: Path) -> set[str] | None:
    """Give what is ours of a checkpoint, the files of its manifest; None where that is torn and nobody knows."""
    try:
        return {*read_json(checkpoint / MANIFEST)["files"], MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lacking(sizes: dict[str, int], counts: dict[str, int]) -> str | None:
    """Say what a checkpoint lacks of so many models' weights and optimisers' states."""
    for kind, count in counts.items():
        found = {name.partition("/")[0] for name, size in sizes.items() if kind in name.partition("/")[0] and size}
        if len(found) < count:
            return f"it has files of {len(found)} {kind}s, not of {count}"
    return None


def load_run_state(checkpoint: Path) -> dict[str, Any]:
    """Read the run's own state.

    Args:
        checkpoint: its folder, which is whole.

    Returns:
        JSON values by name, as `save_checkpoint` took them.

    Raises:
        ValueError: where the checkpoint has none, as those of versions that kept it in pickles.
    """
    try:
        state = read_json(checkpoint / RUN_STATE)
        if not all(isinstance(state[name], kind) for name, kind in RUN_STATE_ENTRIES.items()):
            raise TypeError("an entry is of another kind")
        if not (all(map(_is_change, state["changes"])) and all(map(_is_count, state["averaged_steps"].values()))):
            raise TypeError("a change or a number of steps is none")
        if not (_is_count(state["health"]["recovering"]) and isinstance(state["health"]["sound"], str | None)):
            raise TypeError("the health is of another kind")
        if not all(_is_count(state["told"][name]) for name in (LENGTH, *BATCH)):
            raise TypeError("a number of steps or rows is none")
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} has no readable {RUN_STATE}, as those of earlier versions, which kept a"
            " run's state in pickles: go on with the version that wrote it, or train in another `output_dir`"
        ) from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_change(change: object) -> bool:
    return (
        isinstance(change, dict)
        and all(
            _is_count(values) if name == "step" else isinstance(values, list) and len(values) == 2
            for name, values in change.items()
        )
        and "step" in change
    )


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, *, partial: bool) -> dict[str, torch.Tensor]:
    """Load what `save_checkpoint` saved, without running anything that a file may hold.

    Args:
        accelerator: holds the training state; every process calls this.
        checkpoint: its folder.
        partial: whether frozen weights were left out of it.

    Returns:
        The averaged weights by name; none where nothing was averaged.

    Raises:
        ValueError: where a file does not fit what is trained, or holds more than tensors and plain values.
    """
    try:
        accelerator.load_state(str(checkpoint), strict=not partial)
        file = checkpoint / AVERAGES
        averages = load_file(file) if file.is_file() else {}
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} holds a file with more than tensors and plain values. It is not loaded,"
            " as that could run code: resume from another one"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"checkpoint {str(checkpoint)!r} does not fit this run: {first_line}") from error
    # Steps are counted by the run; a micro-step may have another number now.
    accelerator.step = 0
    return averages


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
        step, sizes = manifest["step"], dict(manifest["files"])
        if not _is_count(step):
            raise TypeError("the step is no number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {str(checkpoint)!r} is not complete: no readable {MANIFEST}") from error
    for name, size in sizes.items():
        file = checkpoint / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            state = "missing" if actual is None else f"{actual} bytes instead of {size}"
            raise ValueError(f"checkpoint {str(checkpoint)!r} is corrupt: {name} is {state}")
    if reason := _lacking(sizes, {"model": 1}):
        raise ValueError(f"checkpoint {str(checkpoint)!r} is corrupt: {reason}")
    return step


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> tuple[Path, int]:
    """Choose the checkpoint to resume from.

    Args:
        output_dir: the run's folder.
        resume_from_checkpoint: `"latest"`, or a checkpoint by path or by name in `output_dir`.

    Returns:
        Its folder and step; with `"latest"` the newest that is whole (torn ones are named in a warning).

    Raises:
        ValueError: where a checkpoint that was asked for is not whole, or `"latest"` finds none that is.
    """
    if resume_from_checkpoint != "latest":
        path = output_dir / resume_from_checkpoint
        path = path if path.is_dir() else Path(resume_from_checkpoint)
        if not path.is_dir():
            names = ", ".join(checkpoint.name for checkpoint in list_checkpoints(output_dir)) or "none"
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, but there is no such folder; those in"
                f" `output_dir`: {names}"
            )
        return path, checkpoint_step(path)
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in reversed(checkpoints):
        try:
            return checkpoint, checkpoint_step(checkpoint)
        except ValueError as error:
            logger.warning(f"{error}. Trying the one before it.")
    if checkpoints:
        raise ValueError(f"no checkpoint in `output_dir` {str(output_dir)!r} is whole: start again in another folder")
    raise ValueError(
        f"`resume_from_checkpoint` is 'latest', but `output_dir` {str(output_dir)!r} holds no checkpoint: leave it out"
        " to start, in a folder without a student"
    )
