"""Training checkpoints that are whole or not there: written beside, renamed when complete, checked before loading."""

import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import logging

from ..files import WRITE_ERRORS, beside, read_json, write_json, written_beside
from ..lora import LORA_FILE
from ..owned import SET_ASIDE, OwnedFolder
from ..pipeline_folder import LORA, MODEL_INDEX, VALIDATION, list_checkpoints


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
    failure: Exception | None = None
    try:
        accelerator.save_state(str(partial))
    except WRITE_ERRORS as error:
        failure = error
    if accelerator.reduce(torch.tensor(int(failure is not None), device=accelerator.device)) == 0:
        try:
            if accelerator.is_main_process:
                counts = {"model": len(accelerator._models), "optimizer": len(accelerator._optimizers)}
                _complete(partial, final, step, total_limit, counts)
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


def _complete(partial: Path, final: Path, step: int, total_limit: int | None, counts: dict[str, int]) -> None:
    sizes = {f.relative_to(partial).as_posix(): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
    if reason := _lacking(sizes, counts):
        raise ValueError(reason)
    write_json(partial / MANIFEST, {"step": step, "files": sizes})
    folder = OwnedFolder(final.parent)
    folder.own(final.name)
    if final.exists():  # of the same step, which was left behind
        folder.set_aside(final.name)
    partial.rename(final)
    if total_limit is not None:
        others = [other for other in list_checkpoints(final.parent) if other != final and other.name in folder.names]
        for other in others[: max(0, len(others) - total_limit + 1)]:
            discard_checkpoint(other)


def discard_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; whatever else lies in its folder stays, and one without manifest is set aside.

    Args:
        checkpoint: its folder, in a run's.
    """
    folder = OwnedFolder(checkpoint.parent)
    try:
        ours = {*read_json(checkpoint / MANIFEST)["files"], MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
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


def _lacking(sizes: dict[str, int], counts: dict[str, int]) -> str | None:
    """Say what a checkpoint lacks of so many models' weights and optimisers' states."""
    for kind, count in counts.items():
        found = {name.partition("/")[0] for name, size in sizes.items() if kind in name.partition("/")[0] and size}
        if len(found) < count:
            return f"it has files of {len(found)} {kind}s, not of {count}"
    return None


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
        " to start"
    )


def check_place(output_dir: str, resume_from_checkpoint: str | None) -> None:
    """Refuse a folder that a run would do harm in; nothing is written.

    Args:
        output_dir: the run's folder.
        resume_from_checkpoint: as `find_checkpoint` takes it; None starts a run.

    Raises:
        ValueError: where the folder is nameless or holds what is not ours or another run, or there is nothing to
            resume from.
    """
    folder = Path(output_dir)
    if not output_dir.strip() or folder == Path():
        raise ValueError(f"`output_dir` is {output_dir!r}, the working directory: name a folder of its own")
    if resume_from_checkpoint is not None and not resume_from_checkpoint.strip():
        raise ValueError(
            f"`resume_from_checkpoint` is {resume_from_checkpoint!r}: give 'latest' or a checkpoint, or leave it out"
        )
    OwnedFolder(folder).check()
    holds_run = list_checkpoints(folder) or any(
        (folder / name).exists() for name in (MODEL_INDEX, f"{LORA}/{LORA_FILE}")
    )
    if holds_run and resume_from_checkpoint is None:
        raise ValueError(
            f"`output_dir` {output_dir!r} holds another run: continue it with `resume_from_checkpoint` latest, or"
            " choose another folder"
        )
    if resume_from_checkpoint == "latest" and not list_checkpoints(folder):
        find_checkpoint(folder, resume_from_checkpoint)
    if holds_run and resume_from_checkpoint not in (None, "latest"):
        checkpoint, _ = find_checkpoint(folder, resume_from_checkpoint)
        if not checkpoint.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"`output_dir` {output_dir!r} holds another run than that of `resume_from_checkpoint`"
                f" {resume_from_checkpoint!r}: choose another folder"
            )


def last_kept(folder: OwnedFolder, resumed: Path | None, step: int) -> int:
    """Say up to which step what is in a folder belongs to the run that goes on there.

    Args:
        folder: the run's.
        resumed: the checkpoint that it goes on from.
        step: of that checkpoint.

    Returns:
        That step; 0 where the checkpoint is of another place, such as `abandoned/`.
    """
    return step if resumed is not None and resumed.resolve().parent == folder.folder.resolve() else 0


def check_way(folder: OwnedFolder, step: int, max_train_steps: int) -> None:
    """Make sure that what a run will write, and set aside, is ours.

    Args:
        folder: the run's.
        step: the last that is kept.
        max_train_steps: that it goes to.

    Raises:
        ValueError: where something else is in the way.
    """
    checkpoints = list_checkpoints(folder.folder)
    ahead = [path for path in checkpoints if path.name in folder.names and _step_in_name(path) > step]
    folder.check_free(path.name for path in checkpoints if step < _step_in_name(path) <= max_train_steps)
    for checkpoint in ahead:
        try:
            ours = {*read_json(checkpoint / MANIFEST)["files"], MANIFEST}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # torn: nobody knows what was in it
        for path in checkpoint.rglob("*"):
            if path.is_file() and path.relative_to(checkpoint).as_posix() not in ours:
                raise ValueError(
                    f"{str(checkpoint)!r} is to be set aside, but holds {path.name}, which this package did not write:"
                    " move it to another place"
                )


def set_aside_later(folder: OwnedFolder, step: int) -> None:
    """Move what a run has left that goes back: the checkpoints and validation pictures of later steps.

    Args:
        folder: the run's.
        step: the last that is kept.
    """
    for path in [*list_checkpoints(folder.folder), *folder.folder.glob(f"{VALIDATION}/step-*.png")]:
        name = path.relative_to(folder.folder).as_posix()
        if name in folder.names and _step_in_name(path) > step:
            logger.warning(f"{name} is not of the run that goes on: it is now {folder.set_aside(name)}")


def cut_log(path: Path, step: int) -> None:
    """Move the lines of later steps, and one that was cut short, from a run's log to that of what it has left.

    Args:
        path: of JSON lines with a `step`; there or not.
        step: the last that stays.
    """
    if not path.exists():
        return
    kept: list[str] = []
    cut: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        (kept if _stays(line, step) else cut).append(line)
    if not cut:
        return
    left = path.parent / SET_ASIDE / path.name
    left.parent.mkdir(exist_ok=True)
    with left.open("a", encoding="utf-8") as file:
        file.writelines(line.rstrip("\n") + "\n" for line in cut)
    with written_beside(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def _stays(line: str, step: int) -> bool:
    """Whether a line of a log is whole and of no later step, or none that a run wrote."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return True


def _step_in_name(path: Path) -> int:
    """The step that a checkpoint or a validation picture is named by."""
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
