"""A student on disk: a pipeline folder of stock diffusers classes that loads anywhere, and its model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from diffusers import __version__ as diffusers_version
from huggingface_hub import EvalResult, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .scheduling_tbcm import TBCMScheduler


MODEL_INDEX = "model_index.json"  # what makes a folder a pipeline to diffusers
TRAINING_RECORD = "training.json"
LEGAL_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")  # the teacher's terms hold for its student
CARD = "README.md"
TAGS = ["text-to-image", "diffusers", "sana", "tbcm", "distillation"]

TRANSFORMER = "transformer"
COPIED_COMPONENTS = ("text_encoder", "tokenizer", "vae")  # the student's are its teacher's, byte for byte
WEIGHTS_COMPONENTS = (TRANSFORMER, "text_encoder", "vae")
SKIPPED_FILES = ("*.bin", "*.fp16*", "*.bf16*")  # pickles, and second copies in lower precision


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


def resolve_teacher(teacher: str | PathLike[str]) -> Path:
    """Give the local folder of a Sana-family pipeline, downloaded first where `teacher` is a Hub id.

    Args:
        teacher: pipeline folder or Hub id.

    Returns:
        The folder, its components checked to be there and to hold safetensors weights.

    Raises:
        ValueError: where it is neither a folder nor a Hub id, is no Sana pipeline, or lacks a component.
    """
    folder = Path(teacher)
    if not folder.is_dir():
        components = {TRANSFORMER, *COPIED_COMPONENTS, "scheduler"}
        try:
            snapshot = snapshot_download(
                str(teacher),
                allow_patterns=[
                    MODEL_INDEX,
                    CARD,
                    *LEGAL_FILES,
                    *(f"{component}/*" for component in sorted(components)),
                ],
                ignore_patterns=list(SKIPPED_FILES),
            )
        except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            raise ValueError(f"teacher {str(teacher)!r} is neither a folder nor a model on the Hub") from error
        folder = Path(snapshot)

    if not (folder / MODEL_INDEX).is_file():
        raise ValueError(f"teacher {str(teacher)!r} is no pipeline folder: it has no {MODEL_INDEX}")
    classes = _read_json(folder / MODEL_INDEX)
    if classes.get(TRANSFORMER) != ["diffusers", SanaTransformer2DModel.__name__]:
        raise ValueError(
            f"teacher {str(teacher)!r} is no Sana pipeline: its transformer is {classes.get(TRANSFORMER)}"
        )
    for component in (TRANSFORMER, *COPIED_COMPONENTS):
        if component not in classes or not (folder / component).is_dir():
            raise ValueError(f"teacher {str(teacher)!r} lacks its {component}")
    for component in WEIGHTS_COMPONENTS:
        weights = [path.name for path in (folder / component).glob("*.safetensors")]
        if all(any(fnmatch(name, pattern) for pattern in SKIPPED_FILES) for name in weights):
            raise ValueError(f"teacher {str(teacher)!r} has no full-precision safetensors weights of its {component}")
    return folder


def vae_scale_factor(folder: Path) -> int:
    """Read how many pixels a side a latent pixel stands for, without loading the autoencoder.

    Args:
        folder: a Sana pipeline's folder.

    Returns:
        The autoencoder's compression, 32 for Sana's own.
    """
    return 2 ** (len(_read_json(folder / "vae" / "config.json")["encoder_block_out_channels"]) - 1)


def latent_size(teacher_folder: Path, transformer: SanaTransformer2DModel, resolution: int | None) -> int:
    """Say how large a teacher's latents are at a resolution, from its autoencoder's config alone.

    Args:
        teacher_folder: the teacher's pipeline folder.
        transformer: its transformer.
        resolution: pixels a side; None for the teacher's own.

    Returns:
        Latent pixels a side.

    Raises:
        ValueError: where the autoencoder or the position embedding does not allow the resolution.
    """
    if resolution is None:
        return transformer.config["sample_size"]
    factor = vae_scale_factor(teacher_folder)
    multiple = factor * transformer.config["patch_size"]
    if resolution < multiple or resolution % multiple:
        raise ValueError(f"resolution is {resolution}: it has to be a positive multiple of {multiple} pixels")
    size = resolution // factor
    if transformer.config["interpolation_scale"] is not None and size != transformer.config["sample_size"]:
        native = transformer.config["sample_size"] * factor
        raise ValueError(f"resolution is {resolution}: this teacher's position embedding is for {native} pixels")
    return size


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
    student_config = _read_json(partial / TRANSFORMER / "config.json")
    student_config.pop("_name_or_path", None)  # where its maker keeps the teacher
    _write_json(partial / TRANSFORMER / "config.json", student_config)
    scheduler_config = {**json.loads(scheduler.to_json_string()), "_class_name": SCMScheduler.__name__}
    _write_json(partial / "scheduler" / "scheduler_config.json", scheduler_config)

    teacher_classes = _read_json(teacher_folder / MODEL_INDEX)
    model_index = {
        "_class_name": SanaSprintPipeline.__name__,
        "_diffusers_version": diffusers_version,
        **{component: teacher_classes[component] for component in COPIED_COMPONENTS},
        TRANSFORMER: ["diffusers", SanaTransformer2DModel.__name__],
        "scheduler": ["diffusers", SCMScheduler.__name__],
    }
    _write_json(partial / MODEL_INDEX, model_index)

    if resolution is None:
        resolution = student.config.sample_size * vae_scale_factor(teacher_folder)
    is_local = Path(teacher).is_dir()
    record = {
        "model_id": model_id or output_dir.resolve().name,
        "teacher": Path(teacher).resolve().name if is_local else str(teacher),
        "base_model": None if is_local else str(teacher),
        "license": _license_of(teacher_folder / CARD),
        "resolution": resolution,
        "prompt": prompt,
        "training": dict(training),
    }
    _write_json(partial / TRAINING_RECORD, record)
    render_model_card(partial).save(partial / CARD)

    _move_pipeline(partial, output_dir)
    return output_dir


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
    record = _read_json(folder / TRAINING_RECORD)
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


def _license_of(card: Path) -> dict[str, str]:
    """The licence fields of a model card; none where there is no card or it names none."""
    if not card.is_file():
        return {}
    data = ModelCard.load(card).data.to_dict()
    return {field: data[field] for field in ("license", "license_name", "license_link") if field in data}


def _template_path() -> Path:
    """The card's template: beside this file when installed, at the top of the repository in a checkout."""
    packaged = Path(__file__).with_name("model_card_template.md")
    return packaged if packaged.is_file() else Path(__file__).parents[2] / packaged.name


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
