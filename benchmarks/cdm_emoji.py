#!/usr/bin/env python
"""CDM on the embedded emoji teacher, judged by the teacher's own pictures of the same prompts.

    python -m benchmarks.cdm_emoji few          # 24 named prompts, noises that no run has seen
    python -m benchmarks.cdm_emoji many         # the 5,179 prompts, measured on 500 evaluation prompts
    python -m benchmarks.cdm_emoji longer --max_train_steps 2400    # the 24 prompts at half the rate
    python -m benchmarks.cdm_emoji batches --max_train_steps 400    # the 24 prompts in larger batches
    python -m benchmarks.cdm_emoji ablations    # the 24 prompts without one idea of the method at a time

Students are drawn by the plain stock pipeline. Distances are to pictures that the teacher draws in 20 steps with
guidance from other noises: its own row at 20 steps is what another noise alone makes. Runs and features are kept in
--work_dir: the same command goes on where it was interrupted. Writes benchmarks/results/cdm_emoji_<table>.json, .md
and .png.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SanaPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_tbcm.components import MODEL_INDEX
from diffusers_tbcm.evaluation.evaluator import MobileNetFeatures, pictures_to_tensor
from diffusers_tbcm.evaluation.grid import image_grid
from diffusers_tbcm.evaluation.judge import TeacherJudge
from diffusers_tbcm.files import read_json, write_json
from diffusers_tbcm.owned import OwnedFolder
from diffusers_tbcm.pipeline_folder import LORA, list_checkpoints
from diffusers_tbcm.scheduling_flow import even_sigmas
from examples.tbcm.quickstart import (
    GUIDANCE_SCALE,
    MAX_SEQUENCE_LENGTH,
    REFERENCE_SEED,
    SEED,
    TEACHER_STEPS,
    Task,
    draw,
    few,
    many,
)

from .common import EMBEDDED_TEACHER, EXAMPLES, RESULTS, arguments, default_device, machine, made_folder, write_results


STEPS = (1, 2, 4)
GRID_ROWS = 8
COLOURS = 64  # of the sheet of pictures
UNTRAINED, TEACHER = "untrained", "teacher"
FLAGS_FILE = "cdm_emoji_flags.json"

FLAGS: Mapping[str, Any] = {
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
    "no-complex_human_instruction": True,
    "train_batch_size": 12,
    "max_rollout_steps": 4,
    "anchor_range": [0.02, 0.98],
    "augmentation_scale": 2.0,
    "student_every": 6,
    "learning_rate": 1.5e-4,
    "critic_learning_rate": 5e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "use_ema": True,
    "ema_decay": 0.99,
    "checkpointing_steps": 100,
    "checkpoints_total_limit": 1,
    "logging_steps": 20,
    "report_to": "none",
}
# A smaller alpha, as CA acts twice and at all times
EVERYWHERE = {"augment_everywhere": True, "augmentation_scale": 1.5}
LONGER = {"augment_everywhere": True, "augmentation_scale": 1.7, "learning_rate": 7e-5}
ADAPTERS = {"rank": 16, "learning_rate": 2e-3, "critic_learning_rate": 5e-3}


@dataclass(frozen=True)
class Setting:
    """What is trained: flags in which it differs from the others, a variant of `cdm_variants` or none."""

    flags: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""


CDM = Setting()
WHOLE = {
    "CDM": CDM,
    "CDM, CA everywhere": Setting(EVERYWHERE),
    "CDM, CA everywhere, timed critic": Setting({**EVERYWHERE, "timed_critic": True}),
    "CDM, CA everywhere, LoRA of rank 16": Setting({**EVERYWHERE, **ADAPTERS}),
}
TABLES = {
    "few": WHOLE,
    "longer": {"CDM, CA everywhere, longer": Setting(LONGER)},
    "batches": {
        f"CDM, CA everywhere, batch of {size}": Setting({**EVERYWHERE, "train_batch_size": size}) for size in (32, 64)
    },
    "many": WHOLE,
    "ablations": {
        "CDM": CDM,
        "without CA": Setting({"ca_weight": 0}),
        "without DM": Setting({"dm_weight": 0}),
        "without CDM": Setting({"cdm_weight": 0}),
        "fixed schedule": Setting(variant="fixed_schedule"),
        "on the trajectory": Setting(variant="on_trajectory"),
        "CDM, CA everywhere": Setting(EVERYWHERE),
        "timed critic": Setting({"timed_critic": True}),
        "student every second step": Setting({"student_every": 2}),
        "up to 8 steps": Setting({"max_rollout_steps": 8}),
    },
}


def train(setting: Setting, task: Task, steps: int, seed: int, work_dir: Path) -> Path:
    """Train a student, unless that has been done; one that was interrupted goes on. Gives its folder.

    Raises:
        ValueError: where the run's folder holds one with other flags.
    """
    flags = {**FLAGS, **setting.flags, "max_train_steps": steps, "seed": seed}
    changes = [setting.variant, *(f"{name}={value}" for name, value in setting.flags.items())]
    folder = work_dir / task.name / "-".join(filter(None, ["cdm", *changes, f"{steps}_steps", f"seed_{seed}"]))
    if not (folder / FLAGS_FILE).exists():
        OwnedFolder(folder, "work_dir").claim()
        write_json(folder / FLAGS_FILE, flags)
    elif read_json(folder / FLAGS_FILE) != flags:
        raise ValueError(f"work_dir {str(work_dir)!r} holds a {folder.name} with other flags: choose another folder")
    if (folder / MODEL_INDEX).exists() or (folder / LORA).exists():
        return folder
    named = {
        "pretrained_model_name_or_path": EMBEDDED_TEACHER,
        "prompts_file": task.prompts_file,
        "output_dir": folder,
        "resume_from_checkpoint": "latest" if list_checkpoints(folder) else False,
        **flags,
    }
    script = (
        ["-m", "benchmarks.cdm_variants", setting.variant] if setting.variant else [str(EXAMPLES / "train_cdm.py")]
    )
    subprocess.run([sys.executable, *script, *arguments(named)], check=True)
    return folder


def load(folder: Path | None) -> SanaPipeline:
    """The plain stock pipeline of a student's folder, or the teacher's."""
    if folder is not None and (folder / MODEL_INDEX).exists():
        pipeline = DiffusionPipeline.from_pretrained(folder)
    else:
        pipeline = DiffusionPipeline.from_pretrained(EMBEDDED_TEACHER)
        if folder is not None:
            pipeline.load_lora_weights(folder / LORA)
    assert type(pipeline) is SanaPipeline and type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(default_device())


@cache
def extractor() -> MobileNetFeatures:
    return MobileNetFeatures().to(default_device())


def measured(
    task: Task, folder: Path | None, steps: int, guidance_scale: float, kept: Path, seed: int = SEED
) -> dict[str, torch.Tensor]:
    """Features and tone of the pictures that a pipeline draws, drawn once; a sheet of the first round beside them."""
    file = kept / f"{steps}_steps_guidance_{guidance_scale:g}_seed_{seed}.safetensors"
    if not file.exists():
        kept.mkdir(parents=True, exist_ok=True)
        # The stock call that a student's card shows
        pictures = draw(
            load(folder), task.prompts, steps, guidance_scale=guidance_scale, seed=seed, sigmas=even_sigmas(steps)
        )
        pixels = pictures_to_tensor(pictures)
        tensors = {
            "features": extractor().extract(pictures),
            "brightness": pixels.mean((1, 2, 3)),
            "saturation": (pixels.amax(1) - pixels.amin(1)).mean((1, 2)),
            "shown": (pixels[:GRID_ROWS] * 255).round().to(torch.uint8),
        }
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file)
    return load_file(file)


def describe(judge: TeacherJudge, model: str, steps: int, drawn: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a table says of a model's pictures."""
    features = drawn["features"]
    distance = judge.distance(features)
    return {
        "model": model,
        "steps": steps,
        "FD to the teacher": round(distance.value, 1),
        "interval": f"{distance.low:.1f} to {distance.high:.1f}",
        "top-5 retrieval": round(judge.retrieval(features), 3),
        "diversity / teacher's": round(judge.diversity(features), 2),
        "brightness": round(drawn["brightness"].mean().item(), 3),
        "saturation": round(drawn["saturation"].mean().item(), 3),
    }


def grid(columns: Mapping[str, Mapping[str, torch.Tensor]], prompts: Sequence[str]) -> Image.Image:
    """A picture of every shown prompt by every model."""
    pictures = [
        [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in drawn["shown"][:GRID_ROWS]]
        for drawn in columns.values()
    ]
    return image_grid(list(zip(*pictures, strict=True)), list(columns), prompts[:GRID_ROWS])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--settings", nargs="+", help="part of the table, by name; default: all of it")
    parser.add_argument("--max_train_steps", type=int, default=800, help="of the critic; the student takes one in six")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/cdm_emoji"))
    parser.add_argument("--output_dir", type=made_folder, default=RESULTS)
    args = parser.parse_args(argv)
    names = args.settings or list(TABLES[args.table])
    if unknown := {*names} - {*TABLES[args.table]}:
        parser.error(f"--settings names {', '.join(unknown)}: {args.table} has {', '.join(TABLES[args.table])}")
    task = many() if args.table == "many" else few()
    (args.work_dir / task.name).mkdir(parents=True, exist_ok=True)

    at_teacher = args.work_dir / task.name / TEACHER
    reference = measured(task, None, TEACHER_STEPS, GUIDANCE_SCALE, at_teacher, REFERENCE_SEED)
    judge = task.judge(reference["features"])
    drawn = {(TEACHER, steps): measured(task, None, steps, GUIDANCE_SCALE, at_teacher) for steps in (4, TEACHER_STEPS)}
    drawn |= {(UNTRAINED, steps): measured(task, None, steps, 1.0, at_teacher) for steps in STEPS}
    for name in names:
        folder = train(TABLES[args.table][name], task, args.max_train_steps, args.seed, args.work_dir)
        drawn |= {(name, steps): measured(task, folder, steps, 1.0, folder / "drawn") for steps in STEPS}

    rows = []
    for (model, steps), of_model in drawn.items():
        row = describe(judge, model, steps, of_model)
        if model not in (TEACHER, UNTRAINED):
            others = {"untrained": drawn[UNTRAINED, steps], "teacher at 4": drawn[TEACHER, 4]}
            control = judge.distance(others["untrained"]["features"])
            row["/ untrained"] = round(row["FD to the teacher"] / control.value, 3)
            for other, of_other in others.items():
                difference = judge.distance(of_model["features"], of_other["features"])
                row[f"less {other}"] = "{:+.1f} ({:+.1f} to {:+.1f})".format(*difference)
        rows.append(row)
    details = {
        "prompts": len({*task.prompts}),
        "pictures": len(task.prompts),
        "max_train_steps": args.max_train_steps,
        "seed": args.seed,
        **machine(default_device()),
    }
    flags = {name: {**FLAGS, **TABLES[args.table][name].flags} for name in names}
    table = pandas.DataFrame(rows).dropna(axis="columns", how="all")
    write_results(f"cdm_emoji_{args.table}", table, details, args.output_dir, flags=flags)
    shown = STEPS if len(names) < 3 else STEPS[-1:]
    columns = {
        f"{model.rpartition(', ')[2]}, {steps}": drawn[model, steps]
        for model, steps in drawn
        if model == TEACHER or steps in shown
    }
    sheet = grid(columns, task.prompts).quantize(COLOURS)  # a third of the size
    sheet.save(args.output_dir / f"cdm_emoji_{args.table}.png", optimize=True)


if __name__ == "__main__":
    main()
