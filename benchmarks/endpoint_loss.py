"""The distance to a trajectory's end against its square, as the endpoint loss, on the embedded teacher, over seeds.

    python -m benchmarks.endpoint_loss few     # the quickstart's recipe, 360 steps
    python -m benchmarks.endpoint_loss many    # the first steps of a student of all 5,179 prompts

Averaged students are drawn from unseen noises and compared with the teacher's pictures. Differences are between
students of one seed, with a 95% interval over seeds. Runs and pictures are kept in --work_dir: the same command goes
on, and seeds may be added. Writes benchmarks/results/endpoint_loss_<prompts>.json and .md.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from diffusers_tbcm.loss import ENDPOINT_LOSS_TYPES
from examples.tbcm.quickstart import recipe

from .common import default_device, machine
from .emoji_judge import TASKS, EmojiJudge, flat, study_parser, write_students
from .late_consistency import FLAGS, train


TRAININGS: Mapping[str, Mapping[str, Any]] = {
    "few": {**recipe(360), "max_train_steps": 360},
    "many": {"max_train_steps": 100, "endpoint_warmup_steps": 100, "lr_scheduler": "constant_with_warmup"},
}
NORM, SQUARE = ENDPOINT_LOSS_TYPES


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("endpoint_loss", __doc__, TRAININGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    task, flags = TASKS[args.prompts](), TRAININGS[args.prompts]
    work_dir = args.work_dir / args.prompts
    judge = EmojiJudge(task, work_dir / "drawn")
    students = []
    for seed in args.seeds:
        for loss_type in ENDPOINT_LOSS_TYPES:
            name = f"{loss_type}-seed_{seed}"
            load = partial(train, task, work_dir / name, **flags, seed=seed, endpoint_loss_type=loss_type)
            drawn = judge.draw(name, load)
            students += [{"seed": seed, **flat(judge.describe(loss_type, *of_steps))} for of_steps in drawn.items()]
    details = {"pictures": len(task.prompts), "seeds": args.seeds, **machine(default_device())}
    common = {name: value for name, value in FLAGS[args.prompts].items() if name != "endpoint_loss_type"} | {**flags}
    name, pairs = f"endpoint_loss_{args.prompts}", [(NORM, SQUARE)]
    write_students(name, students, pairs, judge, details, args.output_dir, flags=common)


if __name__ == "__main__":
    main()
