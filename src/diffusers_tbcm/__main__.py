"""The command line: draw with a student, push it to the Hub, write its card again."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from .files import PICTURE_SUFFIXES


if TYPE_CHECKING:  # what is heavy is imported by the command that needs it
    from PIL import Image

    from .evaluation.drawing import Drawing

PROG = "diffusers-tbcm"
DTYPES = ("float32", "bfloat16", "float16")
MAX_SEED = 2**64 - 1  # torch's
NAME_LENGTH = 48  # characters of a prompt in a file name
LABEL_LENGTH = 40  # and beside a grid's row
MAX_CELL_SIZE = 512  # pixels a side of a grid's pictures


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: the arguments; the program's own by default.

    Raises:
        SystemExit: with code 2 for arguments that do not fit, 1 where the command cannot be carried out.
    """
    args = parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:  # ours, which say what to do
        sys.exit(f"{PROG} {args.command}: error: {error}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments and check what can be checked before anything is loaded.

    Args:
        argv: the arguments; the program's own by default.

    Returns:
        The arguments; `run` is the command's function.

    Raises:
        SystemExit: for arguments that do not fit, with the reason on stderr.
    """
    parser = argparse.ArgumentParser(PROG, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="draw pictures")
    generate.set_defaults(run=run_generate)
    generate.add_argument("--model", required=True, help="pipeline folder or Hub id of a student")
    generate.add_argument("--lora", help="LoRA weights to load into it; --model may then be their teacher")
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", help="one or more prompts, each in quotes")
    prompts.add_argument("--prompts_file", type=Path, help="text with one prompt a line, or csv, jsonl or parquet")
    generate.add_argument("--steps", type=int, nargs="+", default=[2], help="numbers of inference steps")
    generate.add_argument("--seed", type=int, nargs="+", default=[0], help="one picture for each")
    generate.add_argument("--guidance_scale", type=float, default=4.5)
    generate.add_argument("--height", type=int, help="pixels; the size of training by default")
    generate.add_argument("--width", type=int)
    generate.add_argument(
        "--complex_human_instruction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put Sana's instruction before each prompt; --no- for a student that was distilled without it",
    )
    generate.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    generate.add_argument("--device", help="a GPU where there is one, else the CPU by default")
    generate.add_argument("--out", type=Path, required=True, help="a picture's file, or a folder for many")
    generate.add_argument("--grid", action="store_true", help="all pictures in one, a labelled table")

    push = commands.add_parser("push", help="publish a student's folder on the Hub")
    push.set_defaults(run=run_push)
    push.add_argument("folder", type=Path, help="what training or export wrote")
    push.add_argument("repo_id", help="owner/name; made where there is none")
    push.add_argument("--private", action="store_true", default=None, help="where the repository is made")
    push.add_argument("--license", help="where the card has none, such as apache-2.0")
    push.add_argument("--tag", help="of the pushed revision; the step it was trained to by default")
    push.add_argument("--include_training_state", action="store_true", help="checkpoints and optimiser states too")
    push.add_argument("--token", help="better: HF_TOKEN or `hf auth login`, which no process list shows")

    card = commands.add_parser("card", help="write a student's README.md again, from what its folder holds")
    card.set_defaults(run=run_card)
    card.add_argument("folder", type=Path, help="what training or export wrote")
    card.add_argument("--license", help="the student's, such as apache-2.0; the recorded one by default")
    card.add_argument("--model_id", help="what the examples load; the recorded one by default")

    args = parser.parse_args(argv)
    if args.command == "generate":
        check_generate(generate, args)
    elif not args.folder.is_dir():
        (push if args.command == "push" else card).error(f"folder {str(args.folder)!r} does not exist")
    return args


def check_generate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse arguments of `generate` that do not fit together.

    Args:
        parser: the command's.
        args: its arguments; gets the file's prompts as `prompt`, and whether `out` is a folder as `to_folder`.

    Raises:
        SystemExit: with the reason on stderr.
    """
    for name, values in (("steps", args.steps), ("height", [args.height]), ("width", [args.width])):
        for value in values:
            if value is not None and value < 1:
                parser.error(f"--{name} is {value}: it takes at least 1")
    for seed in args.seed:
        if not 0 <= seed <= MAX_SEED:
            parser.error(f"--seed is {seed}: it takes 0 to {MAX_SEED}")
    for name, values in (("steps", args.steps), ("seed", args.seed), ("prompt", args.prompt or [])):
        if len(set(values)) < len(values):
            parser.error(f"--{name} has a value twice, which would give the same picture twice")
    if not all(prompt.strip() for prompt in args.prompt or ()):
        parser.error("--prompt is empty")

    args.to_folder = args.out.is_dir() or args.out.suffix.lower() not in PICTURE_SUFFIXES
    if args.to_folder and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {str(args.out)!r} is a file, and no picture's: {', '.join(PICTURE_SUFFIXES)}")
    if args.to_folder and args.grid:
        parser.error(f"--grid is one picture, but --out {str(args.out)!r} is a folder: name a file such as grid.png")
    if args.prompts_file is not None:
        if not args.prompts_file.is_file():
            parser.error(f"--prompts_file {str(args.prompts_file)!r} does not exist")
        from .data.prompts import load_prompts

        try:
            args.prompt = load_prompts(args.prompts_file).prompts
        except ValueError as error:
            parser.error(f"--prompts_file: {error}")
    pictures = len(args.prompt) * len(args.steps) * len(args.seed)
    if not args.to_folder and pictures > 1 and not args.grid:
        parser.error(f"--out {str(args.out)!r} is one file for {pictures} pictures: name a folder, or add --grid")


def run_generate(args: argparse.Namespace) -> None:
    """Draw every prompt at every number of steps with every seed."""
    import torch
    from tqdm.auto import tqdm

    from .evaluation.drawing import draw, load_pipeline

    pipeline = load_pipeline(args.model, lora=args.lora, dtype=getattr(torch, args.dtype), device=args.device)
    options = {name: getattr(args, name) for name in ("guidance_scale", "height", "width")}
    if not args.complex_human_instruction:
        options["complex_human_instruction"] = None
    (args.out if args.to_folder else args.out.parent).mkdir(parents=True, exist_ok=True)

    in_grid = []
    seconds: dict[int, list[float]] = {steps: [] for steps in args.steps}
    total = len(args.prompt) * len(args.steps) * len(args.seed)
    drawings = draw(pipeline, args.prompt, steps=args.steps, seeds=args.seed, **options)
    for drawing in tqdm(drawings, total=total, unit="picture"):
        seconds[drawing.num_inference_steps].append(drawing.seconds)
        if args.grid:
            in_grid.append(drawing)
        elif args.to_folder:
            drawing.image.save(args.out / file_name(drawing, args.prompt.index(drawing.prompt)))
        else:
            drawing.image.save(args.out)
    if args.grid:
        grid(in_grid, columns=len(args.steps) * len(args.seed)).save(args.out)

    print(f"{total} picture{'s' * (total > 1)} in {args.out}")
    for steps, taken in seconds.items():
        print(f"{_steps(steps)}: {median(taken):.2f} s a picture")


def file_name(drawing: Drawing, index: int) -> str:
    """Name a picture by its prompt, steps and seed.

    Args:
        drawing: the picture.
        index: of its prompt, as two prompts can begin alike.

    Returns:
        The name, such as `003-a-small-dog-2-steps-seed-7.png`.
    """
    words = re.sub(r"\W+", "-", drawing.prompt.lower())[:NAME_LENGTH].strip("-")
    return f"{index:03}-{words}-{drawing.num_inference_steps}-steps-seed-{drawing.seed}.png"


def grid(drawings: Sequence[Drawing], columns: int) -> Image.Image:
    """Lay drawings out with a row a prompt and a column for each number of steps and seed.

    Args:
        drawings: in the order of `generation.draw`.
        columns: how many belong to a prompt.

    Returns:
        The table.
    """
    from .evaluation.grid import image_grid

    rows = [drawings[start : start + columns] for start in range(0, len(drawings), columns)]
    several_seeds = len({drawing.seed for drawing in drawings}) > 1
    return image_grid(
        [[drawing.image for drawing in row] for row in rows],
        [_steps(drawing.num_inference_steps) + f", seed {drawing.seed}" * several_seeds for drawing in rows[0]],
        [textwrap.shorten(row[0].prompt, LABEL_LENGTH, placeholder=" ...") for row in rows],
        cell_size=max(128, min(max(drawings[0].image.size), MAX_CELL_SIZE)),
    )


def run_push(args: argparse.Namespace) -> None:
    """Push a folder to the Hub."""
    from .export.hub import push_pipeline_to_hub

    options = {name: getattr(args, name) for name in ("token", "private", "license", "tag", "include_training_state")}
    try:
        print(push_pipeline_to_hub(args.folder, args.repo_id, **options))
    except RuntimeError as error:  # the Hub's, in words
        raise ValueError(error) from error


def run_card(args: argparse.Namespace) -> None:
    """Write a folder's card."""
    from .export.model_card import render_model_card
    from .pipeline_folder import CARD, TRAINING_RECORD

    if not (args.folder / TRAINING_RECORD).is_file():
        raise ValueError(f"folder {str(args.folder)!r} has no {TRAINING_RECORD}, which training writes for the card")
    card = render_model_card(args.folder, license=args.license, model_id=args.model_id)
    card.save(args.folder / CARD)
    print(args.folder / CARD)


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number > 1)}"


if __name__ == "__main__":
    main()
