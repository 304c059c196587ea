"""A run's folder: what may be in it when a run begins, and what a run that goes back leaves behind."""

import json
from pathlib import Path

from diffusers.utils import logging

from ..components import MODEL_INDEX
from ..files import written_beside
from ..lora import LORA_FILE
from ..owned import SET_ASIDE, OwnedFolder
from ..pipeline_folder import LORA, VALIDATION, list_checkpoints
from .checkpoints import find_checkpoint, listed_files


logger = logging.get_logger(__name__)


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
    listed = folder.names
    ahead = [path for path in checkpoints if path.name in listed and _step_in_name(path) > step]
    folder.check_free(path.name for path in checkpoints if step < _step_in_name(path) <= max_train_steps)
    aside = folder.folder / SET_ASIDE
    if step > 0 and (aside.is_symlink() or (aside.exists() and not aside.is_dir())):
        raise ValueError(
            f"{str(aside)!r} is no folder, and what the run leaves behind is to go there: move it to another place"
        )
    for checkpoint in ahead:
        ours = listed_files(checkpoint)
        if ours is None:
            continue
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
    listed = folder.names
    for path in [*list_checkpoints(folder.folder), *folder.folder.glob(f"{VALIDATION}/step-*.png")]:
        name = path.relative_to(folder.folder).as_posix()
        if name in listed and _step_in_name(path) > step:
            logger.warning(f"{name} is not of the run that goes on: it is now {folder.set_aside(name)}")


def cut_log(path: Path, step: int) -> None:
    """Move the lines of later steps, and torn ones, from a run's log to that of what it has left.

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
    """Whether a line of a log is whole and of no later step."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _step_in_name(path: Path) -> int:
    """The step that a checkpoint or a validation picture is named by."""
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else 0
