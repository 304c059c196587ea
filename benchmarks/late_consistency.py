"""What the consistency loss adds to a student of the endpoint loss, on the embedded teacher, over seeds.

    python -m benchmarks.late_consistency few     # the quickstart's 24 prompts
    python -m benchmarks.late_consistency many    # all 5,179

A student learns its trajectories' ends at a constant learning rate. From its last checkpoint it goes on for the same
number of steps in each way of `WAYS`, at a rate that falls to 0: by the endpoint loss as before, which is the control,
and by the consistency loss. Averaged students are drawn from unseen noises and compared with the teacher's pictures.
Differences are between students of one seed, with a 95% interval over seeds. Runs and pictures are kept in --work_dir:
the same command goes on. Writes benchmarks/results/late_consistency_<prompts>_<endpoint_loss_type>.json and .md.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.components import MODEL_INDEX
from diffusers_tbcm.loss import ENDPOINT_LOSS_TYPES
from diffusers_tbcm.pipeline_folder import CHECKPOINT, list_checkpoints
from examples.tbcm.quickstart import Task, recipe

from . import emoji_student
from .common import EMBEDDED_TEACHER, EXAMPLES, arguments, default_device, machine
from .emoji_judge import TASKS, EmojiJudge, flat, study_parser, write_students


START, CONTROL, FOREVER = "endpoint student", "endpoint", 1_000_000
FLAGS: Mapping[str, Mapping[str, Any]] = {
    "few": {**emoji_student.FLAGS, **recipe(0), "ema_decay": 0.99},
    "many": emoji_student.FLAGS,
}
STEPS = {"few": (270, 90), "many": (400, 100)}  # of the endpoint loss, and then
WAYS: Mapping[str, Mapping[str, Any]] = {
    CONTROL: {"endpoint_warmup_steps": FOREVER},
    "consistency": {},
    "consistency, lower rate": {"learning_rate": 1e-4},
    "consistency, clip 0.1": {"max_grad_norm": 0.1},
}


def train(task: Task, folder: Path, **flags: Any) -> SanaTBCMPipeline:
    """Train a student, unless that has been done; one that was interrupted goes on. Gives the averaged student."""
    if not (folder / MODEL_INDEX).exists():
        if list_checkpoints(folder):
            flags["resume_from_checkpoint"] = "latest"
            flags.pop("resume_with_changed", None)
        named = {
            "pretrained_model_name_or_path": EMBEDDED_TEACHER,
            "prompts_file": task.prompts_file,
            "output_dir": folder,
            **FLAGS[task.name],
            "checkpointing_steps": STEPS[task.name][1],
            **flags,
        }
        command = [sys.executable, str(EXAMPLES / "train_tbcm_distill.py"), *arguments(named)]
        subprocess.run(command, check=True)
    return SanaTBCMPipeline.from_pretrained(folder).to(default_device())


def students_of(task: Task, work_dir: Path, seed: int, ways: Sequence[str], endpoint_loss_type: str) -> dict[str, Any]:
    """What trains the endpoint student of a seed, and those that go on from it, by name and in order."""
    first, more = STEPS[task.name]
    start = work_dir / f"seed_{seed}"
    students = {
        START: partial(
            train,
            task,
            start,
            max_train_steps=first,
            seed=seed,
            endpoint_loss_type=endpoint_loss_type,
            lr_scheduler="constant_with_warmup",
            endpoint_warmup_steps=first,
        )
    }
    for way in ways:
        told = {"endpoint_warmup_steps": first, **WAYS[way]}
        students[way] = partial(
            train,
            task,
            work_dir / f"seed_{seed}-{way.replace(' ', '_')}",
            max_train_steps=first + more,
            seed=seed,
            endpoint_loss_type=endpoint_loss_type,
            lr_scheduler="linear",
            resume_from_checkpoint=start / f"{CHECKPOINT}{first}",
            resume_with_changed=["lr_scheduler", *WAYS[way]],
            **told,
        )
    return students


def pairs_of(ways: Sequence[str]) -> list[tuple[str, str]]:
    """Every way with the endpoint student, and with the control."""
    return [(way, other) for way in ways for other in (START, CONTROL) if way != other]


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("late_consistency", __doc__, STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--endpoint_loss_type", choices=ENDPOINT_LOSS_TYPES, default=ENDPOINT_LOSS_TYPES[0])
    args = parser.parse_args(argv)
    if args.ways[0] != CONTROL:
        parser.error(f"--ways begins with {args.ways[0]}: the first is {CONTROL}, with which the others are compared")
    task = TASKS[args.prompts]()
    name, loss_type = f"{args.prompts}_{args.endpoint_loss_type}", args.endpoint_loss_type
    work_dir = args.work_dir / name
    judge = EmojiJudge(task, work_dir / "drawn")
    students = []
    for seed in args.seeds:
        for way, load in students_of(task, work_dir, seed, args.ways, loss_type).items():
            drawn = judge.draw(f"seed_{seed}_{way.replace(' ', '_')}", load)
            students += [{"seed": seed, **flat(judge.describe(way, *of_steps))} for of_steps in drawn.items()]
    details = {"pictures": len(task.prompts), "steps": STEPS[args.prompts], **machine(default_device())}
    flags = {**FLAGS[args.prompts], "endpoint_loss_type": loss_type}
    pairs = pairs_of(args.ways)
    write_students(f"late_consistency_{name}", students, pairs, judge, details, args.output_dir, flags=flags)


if __name__ == "__main__":
    main()
