"""The command line: distil a student, draw with it, push it to the Hub, write its card again."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .command_line import DEBUG_HELP, CommandParser, ending_in_words, path_argument
from .evaluation.generate import PROGRAM, add_generate_flags, read_generation, run_generate


FLAGS = {
    name: f"--{name}" for name in ("device", "dtype", "guidance_scale", "height", "license", "tag", "token", "width")
}
FLAGS["num_inference_steps"] = "--steps"
TRAINING_SCRIPTS = {  # of examples/tbcm, by the name that `train` knows them by
    **{name: f"train_{name}" for name in ("tbcm_distill", "dmd", "cdm", "scm", "sana_sprint", "lcm")},
    "prepare_teacher": "prepare_teacher",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: the arguments; the program's own by default.

    Raises:
        SystemExit: with code 2 for arguments that do not fit, or that the command cannot be carried out with.
    """
    command, debug, run = parse_args(argv)
    with ending_in_words(FLAGS, debug=debug, program=f"{PROGRAM} {command}"):
        run()


def parse_args(argv: Sequence[str] | None = None) -> tuple[str, bool, Callable[[], None]]:
    """Read the arguments and check what can be checked before anything is loaded.

    Args:
        argv: the arguments; the program's own by default.

    Returns:
        The command's name, whether its errors are to end in a traceback, and what runs it.

    Raises:
        SystemExit: for arguments that do not fit, with the reason on stderr.
    """
    parser = CommandParser(PROGRAM, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="draw pictures")
    add_generate_flags(generate)

    train = commands.add_parser("train", help="distil a student: `accelerate launch` of a training script")
    train.add_argument("script", choices=TRAINING_SCRIPTS, help="of the repository's examples/tbcm")
    train.add_argument("flags", nargs=argparse.REMAINDER, help="the script's own; --help shows them")

    push = commands.add_parser("push", help="publish a student's folder on the Hub")
    push.add_argument("folder", type=path_argument, help="what training or export wrote")
    push.add_argument("repo_id", help="owner/name; made where there is none")
    push.add_argument("--private", action="store_true", default=None, help="where the repository is made")
    push.add_argument("--license", help="where the card has none, such as apache-2.0")
    push.add_argument("--tag", help="of the pushed revision; the step it was trained to by default")
    push.add_argument("--include_training_state", action="store_true", help="checkpoints and optimiser states too")
    push.add_argument("--token", help="better: HF_TOKEN or `hf auth login`, which no process list shows")

    card = commands.add_parser("card", help="write a student's README.md again, from what its folder holds")
    card.add_argument("folder", type=path_argument, help="what training or export wrote")
    card.add_argument("--license", help="the student's, such as apache-2.0; the recorded one by default")
    card.add_argument("--model_id", help="what the examples load; the recorded one by default")

    for part in (generate, push, card):
        part.add_argument("--debug", action="store_true", help=DEBUG_HELP)

    values = vars(parser.parse_args(argv))
    command, debug = values.pop("command"), values.pop("debug", False)
    if command == "train":
        return command, debug, partial(run_train, **values)
    if command == "generate":
        return command, debug, partial(run_generate, read_generation(generate, **values))
    if not values["folder"].is_dir():
        (push if command == "push" else card).error(f"folder {str(values['folder'])!r} does not exist")
    return command, debug, partial(run_push if command == "push" else run_card, **values)


def run_train(script: str, flags: Sequence[str]) -> None:
    """Do as `accelerate launch` of a training script, as `accelerate config` has set it up, and end as the script.

    A token moves into the environment, as process lists show command lines: this program starts itself again.

    Args:
        script: one of `TRAINING_SCRIPTS`.
        flags: the script's.

    Raises:
        SystemExit: with the exit code of the script; the launcher's own traceback would hide what the script has said.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags, token = _without_token(flags)
    if token is not None:
        os.environ["HF_TOKEN"] = token
        os.execv(sys.executable, [sys.executable, "-m", __package__, "train", script, *flags])
    module = f"{__package__}.scripts.{TRAINING_SCRIPTS[script]}"
    before = signal.signal(signal.SIGINT, lambda number, frame: None)  # it reaches the script too, which is waited for
    try:
        launch_command(launch_command_parser().parse_args(["-m", module, *flags]))
    except subprocess.CalledProcessError as error:  # one process
        sys.exit(error.returncode)
    except ChildFailedError as error:  # several
        sys.exit(error.get_first_failure()[1].exitcode)
    finally:
        signal.signal(signal.SIGINT, before)


def run_push(
    folder: Path,
    repo_id: str,
    *,
    token: str | None,
    private: bool | None,
    license: str | None,
    tag: str | None,
    include_training_state: bool,
) -> None:
    """Push a folder to the Hub; the arguments are those of `export.hub.push_pipeline_to_hub`."""
    from .export.hub import push_pipeline_to_hub

    address = push_pipeline_to_hub(
        folder,
        repo_id,
        token=token,
        private=private,
        license=license,
        tag=tag,
        include_training_state=include_training_state,
    )
    print(address)


def run_card(folder: Path, *, license: str | None, model_id: str | None) -> None:
    """Write a folder's card; the arguments are those of `export.model_card.save_model_card`."""
    from .export.model_card import save_model_card
    from .pipeline_folder import TRAINING_RECORD

    if not (folder / TRAINING_RECORD).is_file():
        raise ValueError(f"folder {str(folder)!r} has no {TRAINING_RECORD}, which training writes for the card")
    print(save_model_card(folder, license=license, model_id=model_id))


def _without_token(flags: Sequence[str]) -> tuple[list[str], str | None]:
    """A training script's flags without `--hub_token`, spelt in any way that argparse understands, and its value."""
    left, token, words = [], None, iter(flags)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name.startswith("hub_t") and "hub_token".startswith(name):
            token = value if equals else next(words, None)
            if token is None:  # its parser says what is missing
                left.append(word)
        else:
            left.append(word)
    return left, token


if __name__ == "__main__":
    main()
