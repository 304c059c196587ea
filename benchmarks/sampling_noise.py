"""Fresh noise between a student's steps against the noise that it predicts, on the embedded teacher.

    python -m benchmarks.sampling_noise few     # three students of the quickstart's recipe, 360 steps
    python -m benchmarks.sampling_noise many    # the shipped student of all 5,179 prompts

Each is drawn in 2 and 4 steps in every way of `WAYS`, from the same first noises, and compared with the teacher's
pictures. Differences are between the pictures of one student, with a 95% interval over students where there are
several; rows of students have one over pictures. A picture and its mirror image drawn at once differ little from their
own mirror image: *asymmetry* is the mean square of that difference, over the teacher's. Students and pictures are kept
in --work_dir, which may be that of benchmarks.endpoint_loss: the same command goes on. Writes
benchmarks/results/sampling_noise_<prompts>.json and .md.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.scheduling_tbcm import MAX_TIMESTEP, TIMESTEPS_BY_STEPS

from .common import default_device, machine
from .emoji_judge import DISTANCE, TASKS, EmojiJudge, Tensors, flat, study_parser, write_students
from .emoji_student import SHIPPED
from .endpoint_loss import NORM, TRAININGS
from .late_consistency import train
from .seeds import seeds_in_words


SEEDS = {"few": (0, 1, 2), "many": (0,)}
ALL_STEPS = (2, 4)
FRESH, PREDICTED = "fresh noise", "predicted noise"
LOWER = ", lower times"
ASYMMETRY = "asymmetry / teacher's"
LOWER_TIMES = {"2": [MAX_TIMESTEP, 0.7, 0.0], "4": [MAX_TIMESTEP, 1.0, 0.2, 0.05, 0.0]}
WAYS: Mapping[str, Mapping[str, Any]] = {
    name + times: {"stochastic_sampling": name == FRESH, "timesteps_by_steps": by_steps}
    for name in (FRESH, PREDICTED)
    for times, by_steps in (("", TIMESTEPS_BY_STEPS), (LOWER, LOWER_TIMES))
}
PAIRS = ((PREDICTED, FRESH), (FRESH + LOWER, FRESH), (PREDICTED + LOWER, PREDICTED), (PREDICTED + LOWER, FRESH))


def load(prompts: str, work_dir: Path, seed: int, way: str) -> SanaTBCMPipeline:
    """A student, trained unless that has been done, that is drawn in a way."""
    if prompts == "many":
        pipeline = SanaTBCMPipeline.from_pretrained(SHIPPED).to(default_device())
    else:
        folder, flags = work_dir / f"{NORM}-seed_{seed}", TRAININGS[prompts]
        pipeline = train(TASKS[prompts](), folder, **flags, seed=seed, endpoint_loss_type=NORM)
    pipeline.scheduler = TBCMScheduler.from_config(pipeline.scheduler.config, **WAYS[way])
    return pipeline


def asymmetry(pictures: Tensors) -> float:
    """The mean square of what pictures and their mirror images differ by; of both in one it is small."""
    pixels = pictures["pixels"].double()
    return (pixels - pixels.flip(-1)).square().mean().item()


def less_two_steps(students: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The distance of 4 steps less that of 2, by way: the mean over students, and its interval where it has one."""
    table = pandas.DataFrame(students).pivot(index=["model", "seed"], columns="steps", values=DISTANCE)
    differences = (table[4] - table[2]).groupby("model", sort=False)
    return {way: seeds_in_words(each, "+.2f") for way, each in differences}


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("sampling_noise", __doc__, SEEDS)
    args = parser.parse_args(argv)
    task, work_dir = TASKS[args.prompts](), args.work_dir / args.prompts
    judge = EmojiJudge(task, work_dir / "drawn")
    teachers = asymmetry(judge.teachers)
    students: list[dict[str, Any]] = []
    fresh: dict[int, Tensors] = {}
    for seed in SEEDS[args.prompts]:
        for way in WAYS:
            name = f"{way.replace(' ', '_')}-seed_{seed}"
            drawn = judge.draw(name, partial(load, args.prompts, work_dir, seed, way), ALL_STEPS)
            fresh = drawn if way == FRESH else fresh
            for steps, pictures in drawn.items():
                less = judge.judge.distance(pictures["features"], fresh[steps]["features"])
                row = {"seed": seed, **flat(judge.describe(way, steps, pictures))}
                row[ASYMMETRY] = round(asymmetry(pictures) / teachers, 3)
                row["less fresh noise"] = (
                    "" if way == FRESH else f"{less.value:+.2f} ({less.low:+.1f} to {less.high:+.1f})"
                )
                students.append(row)
    details = {"pictures": len(task.prompts), "seeds": SEEDS[args.prompts], **machine(default_device())}
    means = pandas.DataFrame(students).groupby(["model", "steps"], sort=False)[ASYMMETRY].mean().round(3)
    more: dict[str, Any] = {"less_two_steps": less_two_steps(students), "lower_times": LOWER_TIMES}
    more["asymmetry"] = {way: means[way].to_dict() for way in WAYS}
    write_students(f"sampling_noise_{args.prompts}", students, PAIRS, judge, details, args.output_dir, **more)


if __name__ == "__main__":
    main()
