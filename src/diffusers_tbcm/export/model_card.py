"""The model card of a student: what it is, how it was trained, what was measured and how to use it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SanaPipeline
from diffusers.pipelines.pipeline_loading_utils import CUSTOM_PIPELINE_FILE_NAME
from diffusers.utils import logging
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..backbones import backbone_of_pipeline, find_backbone
from ..components import SCHEDULER_CONFIG
from ..files import read_json
from ..owned import OwnedFolder
from ..pipeline_folder import CARD, SAMPLE_GRID, SCHEDULER, TRAINING_RECORD, TRANSFORMER, VARIANTS
from ..pipeline_sana_tbcm import STOCK_CALL_OPTIONS
from ..scheduling_flow import GUIDANCE_SCALE, FlowStudentScheduler, is_flow_student, is_matched, student_sigmas
from ..scheduling_tbcm import TBCMScheduler
from .record import Metrics, check_record, is_flow_adapter, load_metrics


logger = logging.get_logger(__name__)

TAGS = ("text-to-image", "diffusers", "distillation", "few-step")
TASK = "text-to-image"
TEMPLATE, PREPARED_TEMPLATE = "model_card_template.md", "prepared_teacher_card_template.md"
MAX_CAPTION = 300  # characters of a prompt
SHOWN_STEPS = (1, 2, 4)  # by the examples
SHOWN_GUIDANCE_SCALE = 4.5  # by a prepared teacher's


def render_model_card(
    folder: str | PathLike[str], *, license: str | None = None, model_id: str | None = None
) -> ModelCard:
    """Render the card of a saved student from what its folder holds: records, metrics, samples, variants.

    What is not in the folder is not in the card: without `metrics.json` there are no results, without a licence in the
    record there is none.

    Args:
        folder: a pipeline or LoRA that `export` saved.
        license: the student's, where the record has none or another; a Hub identifier such as `"apache-2.0"`.
        model_id: what the examples load; the record's by default.

    Returns:
        The card; `save_model_card` puts it into place.

    Raises:
        ValueError: where a record in the folder is not the one that training or an evaluation writes.
    """
    folder = Path(folder)
    record = read_json(folder / TRAINING_RECORD)
    check_record(record)
    samples = [sample for sample in record["samples"] if (folder / sample["file"]).is_file()]
    model_id = model_id or record["model_id"]
    if record.get("prepared"):
        return _render_prepared(folder, record, samples, license=license, model_id=model_id)
    metrics = load_metrics(folder)
    adapter = record.get("adapter")
    relation = "finetune" if adapter is None else "adapter"
    if adapter is None:
        flow = is_flow_student(read_json(folder / SCHEDULER / SCHEDULER_CONFIG))
        backbone = find_backbone(folder)
    else:
        flow = is_flow_adapter(record)
        backbone = backbone_of_pipeline(adapter.get("pipeline", SanaPipeline.__name__))
    scheduler: FlowStudentScheduler | TBCMScheduler
    if adapter is None:
        scheduler = (FlowStudentScheduler if flow else TBCMScheduler).from_pretrained(folder / SCHEDULER)
        call_options = scheduler.default_call_options
    else:
        stochastic = adapter.get("stochastic_sampling", False)
        scheduler = FlowStudentScheduler(stochastic_sampling=stochastic) if flow else TBCMScheduler()
        call_options = adapter.get("call_options", {})
    matched = is_matched(scheduler)
    card_data = ModelCardData(
        base_model=record["base_model"],
        base_model_relation=record["base_model"] and relation,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=[
            *TAGS[:2],
            backbone.TAG,
            *TAGS[2:],
            *_image_free_tags(record, matched),
            *([] if adapter is None else ["lora"]),
        ],
        widget=_widget(samples),
        **(record["license"] if license is None else {"license": license}),
        **({} if metrics is None else _eval_results(metrics, model_id)),
    )
    scheduler.set_timesteps(2)
    return ModelCard.from_template(
        card_data,
        template_path=str(_template_path(TEMPLATE)),
        **{name: record[name] for name in ("teacher", "training", "resolution", "image_free")},
        model_id=model_id,
        prompt=json.dumps(_caption(record["prompt"]), ensure_ascii=False),
        adapter=adapter,
        flow=flow,
        matched=matched,
        standalone=(folder / CUSTOM_PIPELINE_FILE_NAME).is_file(),
        call_options=_beyond_stock(call_options, backbone.PIPELINE_CLASS if flow else backbone.STUDENT_PIPELINE_CLASS),
        unguided=backbone.guidance_arguments(GUIDANCE_SCALE, 1),
        call=backbone.CALL_OPTIONS,
        left_out=backbone.OPTIONAL_COMPONENTS,
        loads_adapters=hasattr(backbone.PIPELINE_CLASS, "load_lora_weights"),
        fresh_noise=scheduler.config["stochastic_sampling"],
        intermediate=round(scheduler.timesteps[1].item(), 4),
        sigmas={
            steps: [round(s, 6) for s in student_sigmas(steps, stochastic_sampling=not matched)]
            for steps in SHOWN_STEPS
        },
        samples=_samples_by_prompt(samples),
        sample_steps=sorted({sample["num_inference_steps"] for sample in samples}),
        sample_grid=SAMPLE_GRID if (folder / SAMPLE_GRID).is_file() else None,
        variants=_variants(folder),
        metrics=metrics,
        metric_names=dict.fromkeys(name for row in (metrics.measurements if metrics else ()) for name in row.metrics),
    )


def _render_prepared(
    folder: Path,
    record: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    *,
    license: str | None,
    model_id: str,
) -> ModelCard:
    """The card of a teacher that was prepared for consistency training, and is no student."""
    backbone = find_backbone(folder)
    card_data = ModelCardData(
        base_model=record["base_model"],
        base_model_relation=record["base_model"] and "finetune",
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=[*TAGS[:2], backbone.TAG, "distillation", "dense-time"],
        widget=_widget(samples),
        **(record["license"] if license is None else {"license": license}),
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(_template_path(PREPARED_TEMPLATE)),
        **{name: record[name] for name in ("teacher", "training", "resolution")},
        model_id=model_id,
        prompt=json.dumps(_caption(record["prompt"]), ensure_ascii=False),
        pipeline=backbone.PIPELINE_CLASS.__name__,
        guided=backbone.guidance_arguments(SHOWN_GUIDANCE_SCALE, 1),
        call=backbone.CALL_OPTIONS,
        left_out=backbone.OPTIONAL_COMPONENTS,
        one_guidance=not backbone.STUDENT_EMBEDS_GUIDANCE,
        samples={_caption(sample["prompt"]): sample["file"] for sample in samples},
        variants=_variants(folder),
    )


def _variants(folder: Path) -> dict[str, torch.dtype]:
    """The half-precision copies of weights that a folder holds."""
    return {name: dtype for name, dtype in VARIANTS.items() if [*folder.glob(f"{TRANSFORMER}/*.{name}*")]}


def _image_free_tags(record: Mapping[str, Any], matched: bool) -> tuple[str, ...]:
    return ("cdm" if matched else "tbcm", "image-free-distillation") if record["image_free"] else ()


def save_model_card(folder: str | PathLike[str], *, license: str | None = None, model_id: str | None = None) -> Path:
    """Render the card of a saved student and put it into the student's folder.

    Args:
        folder, license, model_id: as `render_model_card` takes them.

    Returns:
        The card's file. One that was written or changed by hand is moved to `abandoned/`.
    """
    owned = OwnedFolder(folder, "folder")
    card = render_model_card(folder, license=license, model_id=model_id)
    if owned.foreign([CARD]):
        logger.warning(f"The card was changed by hand: it is now {owned.set_aside(CARD)}")
    with owned.written(CARD) as partial:
        card.save(partial)
    return owned.folder / CARD


def _widget(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The gallery of a model's page on the Hub."""
    return [
        {
            "text": _caption(sample["prompt"]),
            "parameters": {"num_inference_steps": sample["num_inference_steps"]},
            "output": {"url": sample["file"]},
        }
        for sample in samples
    ] or None


def _eval_results(metrics: Metrics, model_id: str) -> dict[str, Any]:
    """The student's measurements as the Hub's metadata."""
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type="-".join(metrics.dataset.lower().split()),
            dataset_name=metrics.dataset,
            metric_type=metric,
            metric_name=f"{metric} ({row.num_inference_steps}-step)",
            metric_value=value,
        )
        for row in metrics.measurements
        if row.model == "student"
        for metric, value in row.metrics.items()
    ]
    return {"model_name": model_id, "eval_results": results} if results else {}


def _beyond_stock(call_options: Mapping[str, Any], pipeline_class: type[DiffusionPipeline]) -> dict[str, str]:
    """The arguments, in Python, that a stock pipeline has to be given to draw as the student was distilled."""
    stock = inspect.signature(pipeline_class.__call__).parameters
    return {
        name: repr(value)
        for name, value in call_options.items()
        if name in STOCK_CALL_OPTIONS and name in stock and value != stock[name].default
    }


def _caption(prompt: str) -> str:
    """A prompt as the card shows it, which a page of text would make unreadable."""
    return prompt if len(prompt) <= MAX_CAPTION else prompt[:MAX_CAPTION].rstrip() + " ..."


def _samples_by_prompt(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, str]]:
    """The sample pictures' files by prompt and number of steps."""
    table: dict[str, dict[int, str]] = {}
    for sample in samples:
        table.setdefault(_caption(sample["prompt"]), {})[sample["num_inference_steps"]] = sample["file"]
    return table


def _template_path(name: str) -> Path:
    """A card's template: in the package when installed, at the top of the repository in a checkout."""
    packaged = Path(__file__).parents[1] / name
    return packaged if packaged.is_file() else Path(__file__).parents[3] / packaged.name
