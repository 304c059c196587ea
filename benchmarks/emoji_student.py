"""The student of the embedded teacher that this repository holds, and how it learns: distance over trained rows.

    python -m benchmarks.emoji_student            # trains, measures, goes on where it stopped; hours on a CPU
    python -m benchmarks.emoji_student --save     # and writes examples/tbcm/sana_emoji_mini_tbcm

One run of `train_tbcm_distill.py` on all 5,179 prompts, every row to its trajectory's end at a constant learning rate,
and two that go on from its last checkpoint at a falling one: by the same loss, and by the consistency loss. Then
`train_dmd.py` finishes the former. The averaged student at the end of each stage draws the quickstart's 500 evaluation
prompts. Distances are to what the teacher draws of them in 20 steps from other noises. Writes
benchmarks/results/emoji_student.json, .md and .png.

The student that is saved has weights between those of the finished one and those of the one before it, which is better
in two and four steps.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy
import pandas
from diffusers.pipelines.pipeline_loading_utils import CUSTOM_PIPELINE_FILE_NAME
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from scipy.stats import linregress

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.export.model_card import render_model_card
from diffusers_tbcm.export.record import Measurement, save_metrics
from diffusers_tbcm.export.selection import select_files
from diffusers_tbcm.pipeline_folder import CARD, CHECKPOINT, TRANSFORMER, list_checkpoints
from examples.tbcm.quickstart import (
    EVALUATION_PROMPTS,
    GRID_PROMPTS,
    MAX_SEQUENCE_LENGTH,
    SEED,
    many,
)

from .common import (
    EMBEDDED_TEACHER,
    EXAMPLES,
    RESULTS,
    ROOT,
    arguments,
    default_device,
    machine,
    made_folder,
    write_results,
)
from .emoji_judge import DISTANCE, EmojiJudge, Tensors, flat


SHIPPED = EXAMPLES / "sana_emoji_mini_tbcm"
STAGES = (100, 200, 400, 800)  # steps at the end of each, by the endpoint loss
FINAL_STEPS = 200  # then at a falling rate
FINAL_LOSSES = ("consistency", "endpoint")
AVERAGED = "DMD, averaged"
MARKERS = {"endpoint": "v", "consistency": "*", "DMD": "D", AVERAGED: "s"}
FINISHED = "endpoint"  # the nearer one
DMD_STEPS = 8400  # of the critic
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)  # of the student that DMD began with, in the weights of one between
SHARES_SEED = 777  # of the noises that they are compared on
SAVED_SHARE = 0.2  # the greatest that costs nothing in one step
FLAGS: Mapping[str, Any] = {
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
    "no-complex_human_instruction": True,
    "train_batch_size": 8,
    "route_steps": 16,
    "learning_rate": 5e-4,
    "lr_warmup_steps": 20,
    "max_grad_norm": 1.0,
    "replay_buffer_size": 480,
    "teacher_batch_size": 48,
    "endpoint_loss_type": "l2",
    "loss_weighting": "uniform",
    "tangent_warmup_steps": 0,
    "tangent_cooldown_start_step": -1,
    "use_ema": True,
    "ema_decay": 0.998,
    "checkpointing_steps": 100,
    "checkpoints_total_limit": 1,
    "logging_steps": 20,
    "report_to": "none",
}
DMD_FLAGS: Mapping[str, Any] = {
    **{name: FLAGS[name] for name in ("max_sequence_length", "no-complex_human_instruction", "route_steps")},
    "guidance_scales": 4.5,
    "train_batch_size": 2,
    "replay_buffer_size": 480,
    "replay_steps": 2,
    "teacher_batch_size": 48,
    "student_every": 3,
    "learning_rate": 1e-4,
    "critic_learning_rate": 3e-4,
    "lr_warmup_steps": 20,
    "endpoint_weight": 0.1,
    **{name: FLAGS[name] for name in ("use_ema", "checkpoints_total_limit", "logging_steps", "report_to")},
    "ema_decay": 0.995,
    "checkpointing_steps": 600,
}
ROWS_A_STEP, DMD_ROWS_A_STEP = (flags["train_batch_size"] * (flags["route_steps"] - 1) for flags in (FLAGS, DMD_FLAGS))


def run_script(script: str, flags: Mapping[str, Any]) -> SanaTBCMPipeline:
    """Run a training script with flags, in a process of its own; the student in its `output_dir`."""
    subprocess.run([sys.executable, str(EXAMPLES / script), *arguments(flags)], check=True)
    return SanaTBCMPipeline.from_pretrained(flags["output_dir"]).to(default_device())


def train(folder: Path, steps: int, endpoint_steps: int, *, start: Path | None = None) -> SanaTBCMPipeline:
    """Train to a number of steps, from where the run stands, or at a falling rate from a start; the averaged student.

    Args:
        folder: of the run.
        steps: at the end.
        endpoint_steps: how many of them by the endpoint loss.
        start: a checkpoint of another run; None for a run of its own.

    Returns:
        The student.
    """
    flags = {
        "pretrained_model_name_or_path": EMBEDDED_TEACHER,
        "prompts_file": many().prompts_file,
        "output_dir": folder,
        "max_train_steps": steps,
        "endpoint_warmup_steps": endpoint_steps,
        "lr_scheduler": "constant_with_warmup" if start is None else "linear",
        "validation_prompts": GRID_PROMPTS,  # drawn for the card
        "validation_steps": steps,
        **FLAGS,
    }
    if start is not None or list_checkpoints(folder):
        flags |= {
            "resume_from_checkpoint": "latest" if list_checkpoints(folder) else start,
            "resume_with_changed": ["lr_scheduler", "endpoint_warmup_steps"],  # stages may be added
        }
    return run_script("train_tbcm_distill.py", flags)


def finish(
    folder: Path, start: Path, steps: int, *, start_share: float = 0.0, after: Path | None = None
) -> SanaTBCMPipeline:
    """Let distribution matching finish a student, or go on with that; the averaged student.

    Args:
        folder: of the run.
        start: the student's folder.
        steps: of the critic.
        start_share: of the student's weights, in those that are saved.
        after: a checkpoint of another run to go on from; None for none.

    Returns:
        The student.
    """
    flags = {
        "pretrained_model_name_or_path": EMBEDDED_TEACHER,
        "student_model_name_or_path": start,
        "start_share": start_share,
        "prompts_file": many().prompts_file,
        "output_dir": folder,
        "max_train_steps": steps,
        "validation_prompts": GRID_PROMPTS,
        "validation_steps": steps,
        **DMD_FLAGS,
        "resume_from_checkpoint": "latest" if list_checkpoints(folder) else after or False,
    }
    return run_script("train_dmd.py", flags)


def between(finished: Path, start: Path, share: float) -> SanaTBCMPipeline:
    """Give the student between two (weights as in arXiv 2109.01903).

    Args:
        finished: folder of the student that training ended with.
        start: of the one that it began with.
        share: of the latter's weights, in 0 to 1; the rest is the former's.

    Returns:
        The student.
    """
    pipeline, other = (SanaTBCMPipeline.from_pretrained(folder) for folder in (finished, start))
    beginning = other.transformer.state_dict()
    for name, weight in pipeline.transformer.state_dict().items():
        weight.lerp_(beginning[name], share)
    return pipeline.to(default_device())


def compare_shares(judge: EmojiJudge, finished: Path, start: Path) -> list[dict[str, Any]]:
    """Say how near the students of `SHARES` are to the teacher, from noises that nothing else is measured on.

    Args:
        judge: what draws and measures.
        finished, start: as `between` takes them.

    Returns:
        A row for each share and number of steps.
    """
    rows: list[dict[str, Any]] = []
    first: dict[int, Tensors] = {}
    for share in SHARES:
        drawn = judge.draw(f"share_{share}", partial(between, finished, start, share), seed=SHARES_SEED)
        first = first or drawn
        for steps, each in drawn.items():
            distance = judge.judge.distance(each["features"])
            row: dict[str, Any] = {"share": share, "steps": steps, DISTANCE: round(distance.value, 2)}
            if drawn is not first:
                less = judge.judge.distance(each["features"], first[steps]["features"])
                row["less share 0"] = f"{less.value:+.1f} ({less.low:+.1f} to {less.high:+.1f})"
            rows.append(row)
    return rows


def power_law(rows: Sequence[float], excess: Sequence[float]) -> tuple[float, float]:
    """Fit excess = scale rows^exponent by least squares of the logarithms; gives scale and exponent."""
    line = linregress(numpy.log(rows), numpy.log(excess))
    return float(numpy.exp(line.intercept)), float(line.slope)


def at_constant_rate(table: pandas.DataFrame) -> pandas.Series:
    """Say which rows are stages of the endpoint loss."""
    return (table["loss"] == "endpoint") & (table["rate"] == "constant")


def extrapolate(table: pandas.DataFrame, floor: float) -> dict[int, dict[str, float]]:
    """By number of steps: the power law of the distance above the floor over the endpoint stages, and the rows that it
    says bring the distance to 1.1 times the floor."""
    laws = {}
    for steps, points in table[at_constant_rate(table)].groupby("steps"):
        scale, exponent = power_law(points["rows"], (points[DISTANCE] - floor).clip(lower=0.01))
        needed = (0.1 * floor / scale) ** (1 / exponent)
        rows = float(f"{needed:.2g}")
        laws[int(steps)] = {"scale": scale, "exponent": round(exponent, 3), "rows to 1.1 floor": rows}
    return laws


def plot(table: pandas.DataFrame, untrained: Mapping[int, float], floor: float, file: Path) -> None:
    """Distance over trained rows, the untrained student's dotted."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (steps, points), colour in zip(table.groupby("steps"), ("C0", "C1", "C2"), strict=True):
        label = "1 step" if steps == 1 else f"{steps} steps"
        stages, others = points[at_constant_rate(points)], points[~at_constant_rate(points)]
        axes.plot(stages["rows"], stages[DISTANCE], "o-", color=colour, label=label)
        for loss, marker in MARKERS.items():
            then = others[others["loss"] == loss]
            axes.plot(then["rows"], then[DISTANCE], f"{marker}-", color=colour)
        axes.axhline(untrained[steps], color=colour, linestyle=":", linewidth=1)
    axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="the teacher, other noises")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="trained rows\n(v: endpoint, falling rate; *: consistency; D: DMD; s: averaged)",
        ylabel=DISTANCE,
    )
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def save(folder: Path, target: Path) -> None:
    """Copy what a push would publish of a student's folder, its transformer's weights in float16.

    The pipeline in one file is left out: who has this repository has the package.
    """
    for name, content in select_files(folder).files.items():
        if name != CUSTOM_PIPELINE_FILE_NAME:
            file = target / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    weights = target / TRANSFORMER / SAFETENSORS_WEIGHTS_NAME
    halves = {name: weight.half() for name, weight in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    render_model_card(target, model_id=SHIPPED.relative_to(ROOT).as_posix()).save(target / CARD)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES, help="steps at the end of each")
    parser.add_argument("--final_steps", type=int, default=FINAL_STEPS, help="at a falling rate")
    parser.add_argument("--dmd_steps", type=int, default=DMD_STEPS, help="then, of the critic")
    parser.add_argument("--prompts", type=int, default=EVALUATION_PROMPTS)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/emoji_student"))
    parser.add_argument("--output_dir", type=made_folder, default=RESULTS)
    parser.add_argument("--save", action="store_true", help="write examples/tbcm/sana_emoji_mini_tbcm")
    args = parser.parse_args(argv)
    judge, run = EmojiJudge(many(args.prompts), args.work_dir / "drawn"), args.work_dir / "run"

    rows: list[dict[str, Any]] = []

    def measure(name: str, trained: int, load: Callable[[], SanaTBCMPipeline], **labels: str) -> list[Measurement]:
        drawn = judge.draw(name, load)
        described = [judge.describe("student", *of_steps) for of_steps in drawn.items()]
        rows.extend({"rows": trained, **labels, **flat(each)} for each in described)
        return described

    for stage in args.stages:
        load = partial(train, run, stage, args.stages[-1])
        measure(f"stage_{stage}", ROWS_A_STEP * stage, load, loss="endpoint", rate="constant")
    steps = args.stages[-1] + args.final_steps
    for loss in FINAL_LOSSES:
        endpoint_steps = steps if loss == "endpoint" else args.stages[-1]
        start = run / f"{CHECKPOINT}{args.stages[-1]}"
        load = partial(train, args.work_dir / loss, steps, endpoint_steps, start=start)
        measure(f"stage_{steps}_{loss}", ROWS_A_STEP * steps, load, loss=loss, rate="falling")
    start, finished = args.work_dir / FINISHED, args.work_dir / "dmd"
    load = partial(finish, finished, start, args.dmd_steps)
    trained = ROWS_A_STEP * steps + DMD_ROWS_A_STEP * (args.dmd_steps // DMD_FLAGS["student_every"])
    name = f"stage_{steps}_dmd_{args.dmd_steps}"
    measure(name, trained, load, loss="DMD", rate="falling")
    saved = args.work_dir / "saved"
    shares = compare_shares(judge, finished, start)
    after = finished / f"{CHECKPOINT}{args.dmd_steps}"
    load = partial(finish, saved, start, args.dmd_steps, start_share=SAVED_SHARE, after=after)
    final = measure(f"{name}_averaged", trained, load, loss=AVERAGED, rate="")

    table = pandas.DataFrame(rows)
    details = {"prompts": args.prompts, "batch": ROWS_A_STEP, **machine(default_device())}
    more = {
        "controls": [flat(each) for each in judge.controls],
        "laws": extrapolate(table, judge.floor),
        "shares": shares,
        "flags": {"tbcm": FLAGS, "dmd": DMD_FLAGS},
    }
    write_results("emoji_student", table, details, args.output_dir, **more)
    untrained = {each.num_inference_steps: each.metrics[DISTANCE] for each in judge.controls[1:]}
    plot(table, untrained, judge.floor, args.output_dir / "emoji_student.png")
    if args.save:
        save_metrics(
            saved,
            [*judge.controls, *final],
            dataset=f"{args.prompts} evaluation prompts of the embedded emoji teacher",
            command="python -m benchmarks.emoji_student",
            details={
                "seed": SEED,
                "rows": trained,
                "loss": f"endpoint, then {AVERAGED}",
                **machine(default_device()),
            },
        )
        save(saved, SHIPPED)


if __name__ == "__main__":
    main()
