"""A student on disk: a pipeline folder of stock diffusers classes that loads anywhere, with its card and record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from diffusers import __version__ as diffusers_version

from .model_card import render_model_card
from .pipeline_folder import (
    CARD,
    COPIED_COMPONENTS,
    LEGAL_FILES,
    MODEL_INDEX,
    SKIPPED_FILES,
    TRAINING_RECORD,
    TRANSFORMER,
    license_of,
    read_json,
    resolve_teacher,
    vae_scale_factor,
    write_json,
)
from .scheduling_tbcm import TBCMScheduler
from .versions import tokenizer_class


def save_student_pipeline(
    student: SanaTransformer2DModel,
    teacher: str | PathLike[str],
    output_dir: str | PathLike[str],
    *,
    prompt: str,
    training: Mapping[str, Any],
    resolution: int | None = None,
    scheduler: TBCMScheduler | None = None,
    model_id: str | None = None,
) -> Path:
    """Save a student as a folder that plain `DiffusionPipeline.from_pretrained` loads, with card and training record.

    The folder is written beside `output_dir` and moved into it, `model_index.json` last: a half-written export is
    never a pipeline. Whatever else `output_dir` holds, such as checkpoints, stays.

    Args:
        student: the distilled transformer in flow-matching form, with a guidance embedder.
        teacher: pipeline folder or Hub id that the text encoder, tokenizer and autoencoder are copied from.
        output_dir: where the pipeline is to be.
        prompt: what the card's examples draw.
        training: the card's training table, JSON values by name.
        resolution: what the student was distilled at, in pixels a side; by default its own size.
        scheduler: carries the checkpoint's own timesteps; `TBCMScheduler()` by default.
        model_id: what the card's examples load; the folder's name by default.

    Returns:
        `output_dir`.

    Raises:
        ValueError: where the student has no guidance embedder, or the teacher is no complete Sana pipeline or lies in
            `output_dir`.
    """
    if not student.config.guidance_embeds:
        raise ValueError(
            "student has guidance_embeds=False, but Sana-Sprint pipelines give guidance to the transformer"
        )
    teacher_folder = resolve_teacher(teacher)
    output_dir = Path(output_dir)
    if output_dir.resolve() == teacher_folder.resolve():
        raise ValueError(f"output_dir {str(output_dir)!r} is the teacher's own folder: the export would replace it")
    scheduler = TBCMScheduler() if scheduler is None else scheduler

    partial = output_dir.resolve().with_name(f"{output_dir.resolve().name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of an export that was interrupted
    for component in COPIED_COMPONENTS:
        shutil.copytree(teacher_folder / component, partial / component, ignore=shutil.ignore_patterns(*SKIPPED_FILES))
    for name in LEGAL_FILES:
        if (teacher_folder / name).is_file():
            shutil.copy(teacher_folder / name, partial / name)
    student.save_pretrained(partial / TRANSFORMER)
    student_config = read_json(partial / TRANSFORMER / "config.json")
    student_config.pop("_name_or_path", None)  # where its maker keeps the teacher
    write_json(partial / TRANSFORMER / "config.json", student_config)
    scheduler_config = {**json.loads(scheduler.to_json_string()), "_class_name": SCMScheduler.__name__}
    write_json(partial / "scheduler" / "scheduler_config.json", scheduler_config)

    teacher_classes = read_json(teacher_folder / MODEL_INDEX)
    model_index = {
        "_class_name": SanaSprintPipeline.__name__,
        "_diffusers_version": diffusers_version,
        **{component: teacher_classes[component] for component in COPIED_COMPONENTS},
        TRANSFORMER: ["diffusers", SanaTransformer2DModel.__name__],
        "scheduler": ["diffusers", SCMScheduler.__name__],
    }
    if (partial / "tokenizer" / "tokenizer.json").is_file():
        library, name = model_index["tokenizer"]
        model_index["tokenizer"] = [library, tokenizer_class(name)]
    write_json(partial / MODEL_INDEX, model_index)

    if resolution is None:
        resolution = student.config.sample_size * vae_scale_factor(teacher_folder)
    is_local = Path(teacher).is_dir()
    record = {
        "model_id": model_id or output_dir.resolve().name,
        "teacher": Path(teacher).resolve().name if is_local else str(teacher),
        "base_model": None if is_local else str(teacher),
        "license": license_of(teacher_folder / CARD),
        "resolution": resolution,
        "prompt": prompt,
        "training": dict(training),
    }
    write_json(partial / TRAINING_RECORD, record)
    render_model_card(partial).save(partial / CARD)

    _move_pipeline(partial, output_dir)
    return output_dir


def _move_pipeline(partial: Path, output_dir: Path) -> None:
    """Put a written pipeline into its place; until `model_index.json`, which goes last, there is no pipeline there."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / MODEL_INDEX).unlink(missing_ok=True)
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == MODEL_INDEX):
        target = output_dir / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    partial.rmdir()
