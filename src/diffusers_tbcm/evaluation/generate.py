"""What the command `generate` draws: its flags, and its pictures in a file, a folder or a table."""

from __future__ import annotations

import argparse
import os
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..command_line import CommandParser, finite_number, path_argument
from ..files import PICTURE_SUFFIXES, written_beside


if TYPE_CHECKING:  # what is heavy is imported when something is drawn
    from PIL import Image

    from .drawing import Drawing

DTYPES = ("float32", "bfloat16", "float16")
MAX_SEED = 2**64 - 1  # torch's
NAME_LENGTH = 48  # characters of a prompt in a file name
LABEL_LENGTH = 40  # and beside a grid's row
MAX_CELL_SIZE = 512  # pixels a side of a grid's pictures
SOFTWARE = 0x0131  # EXIF's entry for the program that made a picture
PROGRAM = "diffusers-tbcm"
FILE_SUFFIX = r"\.[a-z][a-z0-9]{2,4}"  # of a file; a folder may be named student-0.6b or run.v2


@dataclass(frozen=True)
class Generation:
    """What `generate` draws and where to.

    Args:
        model: pipeline folder or Hub id.
        lora: folder, file or Hub id of LoRA weights to load into it; None for none.
        variant: the half-precision weights to load of it; None for the ordinary ones.
        dtype: of weights and computation, by torch's name.
        device: where it runs; None for a GPU where there is one, else the CPU.
        prompts: what to draw, each with every number of steps and every seed.
        steps: numbers of inference steps.
        seeds: one a picture.
        options: arguments of `drawing.call_options`.
        out: a picture's file, or a folder.
        to_folder: whether `out` is a folder.
        grid: put all pictures into one.
    """

    model: str
    lora: str | None
    variant: str | None
    dtype: str
    device: str | None
    prompts: list[str]
    steps: list[int]
    seeds: list[int]
    options: dict[str, Any]
    out: Path
    to_folder: bool
    grid: bool


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `generate`, those of `read_generation`."""
    parser.add_argument("--model", required=True, help="pipeline folder or Hub id of a student")
    parser.add_argument("--lora", help="LoRA weights to load into it; --model may then be their teacher")
    parser.add_argument("--variant", help="load the half-precision weights of --model of this name, such as bf16")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", default=[], help="one or more prompts, each in quotes")
    prompts.add_argument(
        "--prompts_file", type=path_argument, help="text with one prompt a line, or csv, jsonl or parquet"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[2], help="numbers of inference steps")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one picture for each")
    parser.add_argument(
        "--guidance_scale",
        type=finite_number,
        help="the middle of the student's own by default; none where it was learned",
    )
    parser.add_argument("--height", type=int, help="pixels; the size of training by default")
    parser.add_argument("--width", type=int)
    parser.add_argument("--max_sequence_length", type=int, help="tokens of a prompt; as in training by default")
    parser.add_argument(
        "--complex_human_instruction",
        action=argparse.BooleanOptionalAction,
        help="put Sana's instruction before each prompt, or not; as in training by default",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--device", help="a GPU where there is one, else the CPU by default")
    parser.add_argument(
        "--out",
        type=path_argument,
        required=True,
        help="a picture's file, or a folder for many; only pictures that this program drew are replaced",
    )
    parser.add_argument("--grid", action="store_true", help="all pictures in one, a labelled table")


def read_generation(
    parser: CommandParser,
    *,
    prompt: list[str],
    prompts_file: Path | None,
    steps: list[int],
    seed: list[int],
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    max_sequence_length: int | None,
    complex_human_instruction: bool | None,
    out: Path,
    grid: bool,
    **loading: Any,
) -> Generation:
    """Refuse arguments of `generate` that do not fit together, and read the prompts.

    Args:
        parser: the command's.
        prompt, prompts_file, steps, seed, guidance_scale, height, width, max_sequence_length,
            complex_human_instruction, out, grid: its arguments.
        loading: those of its arguments that say which model is loaded, and how.

    Returns:
        What to draw.

    Raises:
        SystemExit: with the reason on stderr.
    """
    parser.check_at_least(1, steps=min(steps), height=height, width=width, max_sequence_length=max_sequence_length)
    for number in seed:
        if not 0 <= number <= MAX_SEED:
            parser.error(f"--seed is {number}: it takes 0 to {MAX_SEED}")
    given: tuple[tuple[str, list[int] | list[str]], ...] = (("steps", steps), ("seed", seed), ("prompt", prompt))
    for name, several in given:
        if len(set(several)) < len(several):
            parser.error(f"--{name} has a value twice, which would give the same picture twice")
    if not all(text.strip() for text in prompt):
        parser.error("--prompt is empty")

    to_folder = out.is_dir() or out.suffix.lower() not in PICTURE_SUFFIXES
    if to_folder and out.exists() and not out.is_dir():
        parser.error(f"--out {str(out)!r} is a file, and no picture's: {', '.join(PICTURE_SUFFIXES)}")
    if to_folder and not out.is_dir() and re.fullmatch(FILE_SUFFIX, out.suffix.lower()):
        parser.error(
            f"--out {str(out)!r} ends in {out.suffix}, but pictures are saved as {', '.join(PICTURE_SUFFIXES)}: name"
            " such a file, or a folder without a suffix"
        )
    above = next(path for path in (out if to_folder else out.parent, *out.parents) if path.exists())
    if not above.is_dir():
        parser.error(f"--out {str(out)!r} cannot be written, as {str(above)!r} is a file")
    if not os.access(above, os.W_OK):
        parser.error(f"--out {str(out)!r} cannot be written, as {str(above)!r} allows no writing")
    if to_folder and grid:
        parser.error(f"--grid is one picture, but --out {str(out)!r} is a folder: name a file such as grid.png")
    if prompts_file is not None:
        if not prompts_file.is_file():
            parser.error(f"--prompts_file {str(prompts_file)!r} does not exist")
        from ..data.prompts import load_prompts

        try:
            prompt = load_prompts(prompts_file).prompts
        except ValueError as error:
            parser.error(f"--prompts_file: {error}")
    pictures = len(prompt) * len(steps) * len(seed)
    if not to_folder and pictures > 1 and not grid:
        parser.error(f"--out {str(out)!r} is one file for {pictures} pictures: name a folder, or add --grid")
    files = [out / name for name in file_names(prompt, steps, seed)] if to_folder else [out]
    if foreign := [file for file in files if not is_replaceable(file)]:
        parser.error(
            f"--out: {str(foreign[0])!r} is there already and was not drawn by this program: move it, or name another"
        )
    options = {
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "max_sequence_length": max_sequence_length,
        "complex_human_instruction": complex_human_instruction,
    }
    return Generation(
        prompts=prompt, steps=steps, seeds=seed, options=options, out=out, to_folder=to_folder, grid=grid, **loading
    )


def run_generate(asked: Generation) -> None:
    """Draw every prompt at every number of steps with every seed."""
    import torch
    from tqdm.auto import tqdm

    from ..finite import NotFiniteWarning
    from .drawing import call_options, draw, load_pipeline

    warnings.simplefilter("ignore", NotFiniteWarning)  # `draw` makes an error of it
    pipeline = load_pipeline(
        asked.model, lora=asked.lora, variant=asked.variant, dtype=getattr(torch, asked.dtype), device=asked.device
    )
    (asked.out if asked.to_folder else asked.out.parent).mkdir(parents=True, exist_ok=True)

    in_grid = []
    seconds: dict[int, list[float]] = {steps: [] for steps in asked.steps}
    total = len(asked.prompts) * len(asked.steps) * len(asked.seeds)
    options = call_options(pipeline, **asked.options)
    drawings = draw(pipeline, asked.prompts, steps=asked.steps, seeds=asked.seeds, **options)
    for number, drawing in enumerate(tqdm(drawings, total=total, unit="picture")):
        if number:  # the first picture's time is that of warming up
            seconds[drawing.num_inference_steps].append(drawing.seconds)
        if asked.grid:
            in_grid.append(drawing)
        elif asked.to_folder:
            save(drawing.image, asked.out / file_name(drawing, asked.prompts.index(drawing.prompt)))
        else:
            save(drawing.image, asked.out)
    if asked.grid:
        save(grid(in_grid, columns=len(asked.steps) * len(asked.seeds)), asked.out)

    print(f"{total} picture{'s' * (total > 1)} in {asked.out}")
    for steps, taken in seconds.items():
        timed = f"{median(taken):.2f} s a picture" if taken else "not timed, as the first picture warms up"
        print(f"{_steps(steps)}: {timed}")


def file_name(drawing: Drawing, index: int) -> str:
    """Name a picture by its prompt, steps and seed.

    Args:
        drawing: the picture.
        index: of its prompt, as two prompts can begin alike.

    Returns:
        The name, such as `003-a-small-dog-2-steps-seed-7.png`.
    """
    return _name(index, drawing.prompt, drawing.num_inference_steps, drawing.seed)


def file_names(prompts: Sequence[str], steps: Sequence[int], seeds: Sequence[int]) -> list[str]:
    """Name every picture of a command as `file_name` does."""
    return [
        _name(index, prompt, number, seed)
        for index, prompt in enumerate(prompts)
        for number in steps
        for seed in seeds
    ]


def _name(index: int, prompt: str, steps: int, seed: int) -> str:
    words = re.sub(r"\W+", "-", prompt.lower())[:NAME_LENGTH].strip("-")
    return f"{index:03}-{words}-{steps}-steps-seed-{seed}.png"


def is_replaceable(path: Path) -> bool:
    """Say whether a picture may be put here: nothing is there, an empty file, or a picture that `save` wrote."""
    from PIL import Image

    if not os.path.lexists(path):
        return True
    try:
        if not path.is_symlink() and path.is_file() and path.stat().st_size == 0:
            return True
        with Image.open(path) as picture:
            return picture.getexif().get(SOFTWARE) == PROGRAM
    except Exception:  # Pillow has one for every way in which a file is no picture
        return False


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture that is known again as ours, whole or not at all.

    Args:
        picture: to write.
        path: of the file, with one of `PICTURE_SUFFIXES`.
    """
    from PIL import Image

    exif = picture.getexif()
    exif[SOFTWARE] = PROGRAM
    with written_beside(os.path.realpath(path)) as partial:
        picture.save(partial, format=Image.registered_extensions()[path.suffix.lower()], exif=exif)


def grid(drawings: Sequence[Drawing], columns: int) -> Image.Image:
    """Lay drawings out with a row a prompt and a column for each number of steps and seed.

    Args:
        drawings: in the order of `drawing.draw`.
        columns: how many belong to a prompt.

    Returns:
        The table.
    """
    from .grid import image_grid

    rows = [drawings[start : start + columns] for start in range(0, len(drawings), columns)]
    several_seeds = len({drawing.seed for drawing in drawings}) > 1
    return image_grid(
        [[drawing.image for drawing in row] for row in rows],
        [_steps(drawing.num_inference_steps) + f", seed {drawing.seed}" * several_seeds for drawing in rows[0]],
        [textwrap.shorten(row[0].prompt, LABEL_LENGTH, placeholder=" ...") for row in rows],
        cell_size=max(128, min(max(drawings[0].image.size), MAX_CELL_SIZE)),
    )


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number > 1)}"
