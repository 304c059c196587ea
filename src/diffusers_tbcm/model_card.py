"""The model card of a student: what it is, how it was trained, what was measured and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .pipeline_folder import TRAINING_RECORD, read_json
from .scheduling_tbcm import TBCMScheduler


TAGS = ["text-to-image", "diffusers", "sana", "tbcm", "distillation"]


@dataclass(frozen=True)
class Measurement:
    """One row of a card's result table.

    Args:
        model: `"student"` or `"teacher"`; only the student's rows become metadata of the card.
        num_inference_steps: steps taken.
        metrics: value by metric name, such as `{"MobileNet-FD": 12.3}`.
    """

    model: str
    num_inference_steps: int
    metrics: Mapping[str, float]


def render_model_card(
    folder: str | PathLike[str],
    *,
    measurements: Sequence[Measurement] = (),
    dataset: str | None = None,
    sample_grid: str | None = None,
) -> ModelCard:
    """Render the card of a saved student from its folder and from what was measured since.

    Args:
        folder: a pipeline saved by `save_student_pipeline`.
        measurements: rows of the result table, all with the same metrics; without any there is no table.
        dataset: what the measurements were taken on, in words; needed with them.
        sample_grid: file name of a picture in the folder to show on top.

    Returns:
        The card; `card.save(folder / "README.md")` puts it into place.

    Raises:
        ValueError: where there are measurements and no `dataset`.
    """
    if measurements and not dataset:
        raise ValueError(f"dataset is {dataset!r}: say what the measurements were taken on")
    folder = Path(folder)
    record = read_json(folder / TRAINING_RECORD)
    scheduler = TBCMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(2)

    card_data = ModelCardData(
        base_model=record["base_model"],
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(TAGS),
        model_name=record["model_id"],
        eval_results=_eval_results(measurements, dataset) if dataset else None,
        **record["license"],
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(_template_path()),
        model_id=record["model_id"],
        teacher=record["teacher"],
        training=record["training"],
        prompt=json.dumps(record["prompt"], ensure_ascii=False),
        resolution=record["resolution"],
        intermediate=round(float(scheduler.timesteps[1]), 4),
        sample_grid=sample_grid,
        dataset=dataset,
        rows=measurements,
        metric_names=list(measurements[0].metrics) if measurements else [],
    )


def _eval_results(measurements: Sequence[Measurement], dataset: str) -> list[EvalResult]:
    """The student's measurements as the Hub's metadata."""
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="-".join(dataset.lower().split()),
            dataset_name=dataset,
            metric_type=metric,
            metric_name=f"{metric} ({row.num_inference_steps}-step)",
            metric_value=value,
        )
        for row in measurements
        if row.model == "student"
        for metric, value in row.metrics.items()
    ]


def _template_path() -> Path:
    """The card's template: beside this file when installed, at the top of the repository in a checkout."""
    packaged = Path(__file__).with_name("model_card_template.md")
    return packaged if packaged.is_file() else Path(__file__).parents[2] / packaged.name
