"""A student on disk: a folder that plain diffusers loads, pipeline or LoRA, with its card and records."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SanaTransformer2DModel, SchedulerMixin
from diffusers import __version__ as diffusers_version
from diffusers.pipelines.pipeline_loading_utils import CUSTOM_PIPELINE_FILE_NAME

from ..backbones import backbone_of, find_backbone
from ..components import MODEL_CONFIG, MODEL_INDEX, SCHEDULER_CONFIG, plain_name, stored_precision
from ..errors import loading
from ..files import read_json, write_json
from ..lora import GUIDANCE_EMBEDDER_FILE, LORA_FILE, save_adapters, save_lora
from ..owned import OwnedFolder
from ..pipeline_folder import (
    ABSENT,
    CARD,
    LEGAL_FILES,
    METRICS,
    SAMPLE_GRID,
    SAMPLES,
    SCHEDULER,
    TOKENIZER,
    TRAINING_CONFIG,
    TRAINING_RECORD,
    TRANSFORMER,
    VARIANTS,
    component_files,
    copied_components,
    home_of,
    license_of,
    resolve_teacher,
)
from ..pipeline_sana_tbcm import STOCK_CALL_OPTIONS
from ..redaction import redact_values
from ..scheduling_flow import FlowStudentScheduler
from ..scheduling_tbcm import DISTILLED_WITH, TBCMScheduler
from ..standalone import standalone_pipeline_source
from ..versions import dtype_argument, tokenizer_class
from .model_card import render_model_card
from .record import FLOW_SCHEDULER, StudentDescription
from .selection import publishable, redact_header


MAX_SAMPLES = 48  # pictures of a card: 16 prompts at 1, 2 and 4 steps
MAX_SAMPLE_SIZE = 512  # pixels a side
SANA_PIPELINE_TIME = 1000  # diffusers' SanaPipeline feeds the network this, times s, times the config's scale


def save_student_pipeline(
    student: SanaTransformer2DModel,
    teacher: str | PathLike[str],
    output_dir: str | PathLike[str],
    description: StudentDescription,
    *,
    scheduler: TBCMScheduler | None = None,
    variants: Sequence[str] = (),
    teacher_variant: str | None = None,
) -> Path:
    """Save a student as a folder that plain `DiffusionPipeline.from_pretrained` loads, with card and records.

    Its `pipeline.py` is `SanaTBCMPipeline` in one file, for `custom_pipeline` where this package is not installed.

    All is written in a folder inside `output_dir` and then moved into place, `model_index.json` last: a half-written
    export is never a pipeline, and an earlier student stays until the new one is complete. Its files go then, samples
    and metrics too; whatever else `output_dir` holds stays.

    Args:
        student: the distilled transformer in flow-matching form, with a guidance embedder.
        teacher: pipeline folder or Hub id that the text encoder, tokenizer and autoencoder are copied from.
        output_dir: where the pipeline is to be.
        description: what its card and records say of it.
        scheduler: carries the checkpoint's own timesteps and what the student was distilled with;
            `TBCMScheduler()` by default.
        variants: `"fp16"`, `"bf16"` or both: copies of all weights in half precision beside the ordinary ones, for
            `from_pretrained(..., variant=..., torch_dtype=...)`.
        teacher_variant: the half-precision weights to copy of the teacher's components that have them; None for the
            ordinary ones. The copies have ordinary names.

    Returns:
        `output_dir`.

    Raises:
        ValueError: where the student has no guidance embedder, a variant is unknown, the teacher is no complete Sana
            pipeline, or `check_target` refuses `output_dir`.
    """
    if not student.config.guidance_embeds:
        raise ValueError(
            "student has guidance_embeds=False, but Sana-Sprint pipelines give guidance to the transformer"
        )
    return _save_pipeline(
        student,
        teacher,
        Path(output_dir),
        description,
        pipeline_class=backbone_of(student).STUDENT_PIPELINE_CLASS,
        scheduler=(TBCMScheduler() if scheduler is None else scheduler).to_stock(),
        source=standalone_pipeline_source(),
        variants=variants,
        teacher_variant=teacher_variant,
    )


def save_flow_student(
    student: Any,
    teacher: str | PathLike[str],
    output_dir: str | PathLike[str],
    description: StudentDescription,
    *,
    scheduler: FlowStudentScheduler,
    variants: Sequence[str] = (),
    teacher_variant: str | None = None,
) -> Path:
    """Save a flow student inside its teacher's own pipeline class; else as `save_student_pipeline`.

    Args:
        student: the distilled transformer, of the teacher's class and in its time.
        teacher, output_dir, description, variants, teacher_variant: as `save_student_pipeline` takes them.
        scheduler: what it is drawn with, which carries how it was distilled.

    Returns:
        `output_dir`.

    Raises:
        ValueError: where a variant is unknown, the teacher is no complete pipeline, or `check_target` refuses
            `output_dir`.
    """
    return _save_pipeline(
        student,
        teacher,
        Path(output_dir),
        description,
        pipeline_class=backbone_of(student).PIPELINE_CLASS,
        scheduler=scheduler.to_stock(),
        source=None,
        variants=variants,
        teacher_variant=teacher_variant,
    )


def save_prepared_teacher(
    transformer: Any,
    teacher: str | PathLike[str],
    output_dir: str | PathLike[str],
    description: StudentDescription,
    *,
    variants: Sequence[str] = (),
    teacher_variant: str | None = None,
) -> Path:
    """Save a teacher that was prepared for consistency training as an ordinary pipeline of its family.

    All but the transformer is the teacher's, its scheduler among it; else as `save_student_pipeline`.

    Args:
        transformer: in dense time, whose config says so.
        teacher, output_dir, description, variants, teacher_variant: as `save_student_pipeline` takes them.

    Returns:
        `output_dir`.

    Raises:
        ValueError: where a variant is unknown, the teacher is no complete pipeline, or `check_target` refuses
            `output_dir`.
    """
    return _save_pipeline(
        transformer,
        teacher,
        Path(output_dir),
        description,
        pipeline_class=backbone_of(transformer).PIPELINE_CLASS,
        scheduler=stock_scheduler(resolve_teacher(teacher, teacher_variant)),
        source=None,
        variants=variants,
        teacher_variant=teacher_variant,
        prepared=True,
    )


def stock_scheduler(folder: Path) -> SchedulerMixin:
    """Load the scheduler of a pipeline folder.

    Args:
        folder: the pipeline's.

    Returns:
        The scheduler that its model_index.json names.

    Raises:
        ValueError: where it cannot be loaded.
    """
    with loading("teacher", folder):
        name = read_json(folder / MODEL_INDEX)[SCHEDULER][1]
        return getattr(diffusers, name).from_pretrained(folder, subfolder=SCHEDULER)


def _save_pipeline(
    student: Any,
    teacher: str | PathLike[str],
    output_dir: Path,
    description: StudentDescription,
    *,
    pipeline_class: type[DiffusionPipeline],
    scheduler: SchedulerMixin,
    source: str | None,
    variants: Sequence[str],
    teacher_variant: str | None,
    prepared: bool = False,
) -> Path:
    """Save a network as a folder of a stock pipeline; `source` is that of another pipeline which draws with it."""
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"variants has {variant!r}: choose from {', '.join(VARIANTS)}")
    teacher_folder = resolve_teacher(teacher, teacher_variant)
    check_target(output_dir, teacher_folder, teacher_variant=teacher_variant)
    with _staged(output_dir, last=MODEL_INDEX) as folder:
        for component in copied_components(teacher_folder):
            _copy_component(teacher_folder, component, folder, teacher_variant)
        student.save_pretrained(folder / TRANSFORMER)
        student_config = read_json(folder / TRANSFORMER / MODEL_CONFIG)
        student_config.pop("_name_or_path", None)  # where its maker keeps the teacher
        write_json(folder / TRANSFORMER / MODEL_CONFIG, student_config)
        scheduler.save_pretrained(folder / SCHEDULER)
        if source is not None:
            (folder / CUSTOM_PIPELINE_FILE_NAME).write_text(source, encoding="utf-8")
        write_json(folder / MODEL_INDEX, _model_index(teacher_folder, folder, pipeline_class, type(scheduler)))
        for variant in variants:
            _save_variant(folder, variant, pipeline_class, backbone_of(student).OPTIONAL_COMPONENTS)
        record = _record(description, student, teacher, teacher_folder, output_dir)
        _describe(folder, teacher_folder, description, record | {"prepared": True} if prepared else record)
    return output_dir


def save_student_lora(
    student: SanaTransformer2DModel,
    teacher: str | PathLike[str],
    output_dir: str | PathLike[str],
    description: StudentDescription,
    *,
    scheduler: TBCMScheduler | None = None,
    guidance_scale: float | None = None,
    teacher_variant: str | None = None,
) -> Path:
    """Save a LoRA student as a folder that its teacher's pipeline loads, ours or a stock one, with card and records.

    Like `save_student_pipeline` it is written inside `output_dir` and moved into place, the adapters last.

    Args:
        student: made by `lora.make_lora_student`.
        teacher: pipeline folder or Hub id of its teacher.
        output_dir: where the folder is to be.
        description: what its card and records say of it.
        scheduler: carries what the student was distilled with; `TBCMScheduler()` by default.
        guidance_scale: the one that the stock `SanaPipeline` will draw with; the scheduler's own by default.
        teacher_variant: the half-precision weights that the teacher was loaded from; None for the ordinary ones.

    Returns:
        `output_dir`.

    Raises:
        ValueError: where the teacher is no complete Sana pipeline, or `check_target` refuses `output_dir`.
    """
    teacher_folder = resolve_teacher(teacher, teacher_variant)
    output_dir = Path(output_dir)
    check_target(output_dir, teacher_folder, lora=True)
    stock = _draws_in_sana_pipeline(student, read_json(teacher_folder / TRANSFORMER / MODEL_CONFIG))
    scheduler = TBCMScheduler() if scheduler is None else scheduler
    if guidance_scale is None:
        guidance_scale = scheduler.default_call_options.get("guidance_scale", STOCK_CALL_OPTIONS["guidance_scale"])
    with _staged(output_dir, last=LORA_FILE) as folder:
        distilled_with = {name: scheduler.config[name] for name in DISTILLED_WITH}
        save_lora(student, folder, guidance_scale if stock else None, distilled_with)
        record = _record(description, student, teacher, teacher_folder, output_dir)
        adapter = {
            "guidance_scale": guidance_scale,
            "stock_pipeline": stock,
            "call_options": scheduler.default_call_options,
        }
        _describe(folder, teacher_folder, description, {**record, "adapter": adapter})
    return output_dir


def save_flow_lora(
    student: Any,
    teacher: str | PathLike[str],
    output_dir: str | PathLike[str],
    description: StudentDescription,
    *,
    scheduler: FlowStudentScheduler,
    teacher_variant: str | None = None,
) -> Path:
    """Save a flow student's adapters for its teacher's own stock pipeline; else as `save_student_lora`.

    Args:
        student: made by `lora.adapt`, in its teacher's time.
        teacher, output_dir, description, teacher_variant: as `save_student_lora` takes them.
        scheduler: what it is drawn with, which says how it was distilled; the stock pipeline has to be given one of
            its shift.

    Returns:
        `output_dir`.

    Raises:
        ValueError: where the teacher is no complete pipeline, or `check_target` refuses `output_dir`.
    """
    teacher_folder = resolve_teacher(teacher, teacher_variant)
    output_dir = Path(output_dir)
    check_target(output_dir, teacher_folder, lora=True)
    with _staged(output_dir, last=LORA_FILE) as folder:
        save_adapters(student, folder)
        adapter = {
            "pipeline": backbone_of(student).PIPELINE_CLASS.__name__,
            "scheduler": FLOW_SCHEDULER,
            "shift": scheduler.config["shift"],
            "stochastic_sampling": scheduler.config["stochastic_sampling"],
            "timestep_scale": student.config.get("timestep_scale"),
            "call_options": scheduler.default_call_options,
        }
        record = _record(description, student, teacher, teacher_folder, output_dir)
        _describe(folder, teacher_folder, description, {**record, "adapter": adapter})
    return output_dir


def _copied(teacher_folder: Path, name: str, variant: str | None) -> dict[str, Path]:
    """The files that a teacher's component consists of, by their plain names."""
    model_index = read_json(teacher_folder / MODEL_INDEX)
    precision = stored_precision(teacher_folder / name, variant)
    files = component_files(teacher_folder, name, model_index, home=home_of(teacher_folder), variant=variant)
    return {plain_name(file.name, precision): file for file in files}


def _copy_component(teacher_folder: Path, name: str, folder: Path, variant: str | None) -> None:
    """Copy the files that a teacher's component consists of, without paths of this machine."""
    (folder / name).mkdir(parents=True)
    precision = stored_precision(teacher_folder / name, variant)
    for plain, file in _copied(teacher_folder, name, variant).items():
        target = folder / name / plain
        _copy_published(file, target)
        if target.name != file.name and target.suffix == ".json":  # the index of shards
            index = read_json(target)
            shards = {key: plain_name(shard, precision) for key, shard in index["weight_map"].items()}
            write_json(target, {**index, "weight_map": shards})


def _copy_published(file: Path, target: Path) -> None:
    if file.suffix == ".safetensors":
        shutil.copyfile(file, target)
        redact_header(target)
        return
    content = publishable(file)
    if isinstance(content, Path):
        shutil.copyfile(content, target)
    else:
        target.write_bytes(content)


def check_target(
    output_dir: Path, teacher_folder: Path, *, lora: bool = False, teacher_variant: str | None = None
) -> None:
    """Make sure, before anything is computed, that a student can be saved without harm to what others wrote.

    Args:
        output_dir: where the student is to be.
        teacher_folder: its teacher's.
        lora: whether it is an adapter.
        teacher_variant: as `resolve_teacher` takes it.

    Raises:
        ValueError: where `output_dir` is no folder of ours, has files that are not ours in the student's places, or
            is the teacher's, in it, or around it.
    """
    output, teacher = output_dir.resolve(), teacher_folder.resolve()
    if output == teacher:
        raise ValueError(f"`output_dir` {str(output_dir)!r} is the teacher's own folder: choose another")
    if output.is_relative_to(teacher) or teacher.is_relative_to(output):
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} and the teacher's folder {str(teacher_folder)!r} lie in one another:"
            " choose another folder"
        )
    names = [CARD, TRAINING_RECORD, TRAINING_CONFIG, METRICS, SAMPLE_GRID]
    names += [name for name in LEGAL_FILES if (teacher_folder / name).is_file()]
    if lora:
        names += [LORA_FILE, GUIDANCE_EMBEDDER_FILE]
    else:
        names += [MODEL_INDEX, CUSTOM_PIPELINE_FILE_NAME, f"{SCHEDULER}/{SCHEDULER_CONFIG}"]
        for component in (TRANSFORMER, *copied_components(teacher_folder)):
            names += [f"{component}/{name}" for name in _copied(teacher_folder, component, teacher_variant)]
    folder = OwnedFolder(output_dir)
    folder.check()
    folder.check_free(names)


@contextmanager
def _staged(output_dir: Path, *, last: str) -> Iterator[Path]:
    """A folder to write a student in, which then takes the place of an earlier one; its file `last` comes last."""
    target = OwnedFolder(output_dir)
    target.claim()
    absent = [METRICS, SAMPLE_GRID, *([GUIDANCE_EMBEDDER_FILE] if last == LORA_FILE else [])]
    with target.replaced(last=last, absent=absent, stale=(SAMPLES, *LEGAL_FILES)) as folder:
        yield folder


def _model_index(
    teacher_folder: Path, folder: Path, pipeline_class: type[DiffusionPipeline], scheduler_class: type[SchedulerMixin]
) -> dict[str, Any]:
    """What makes `folder`, a copy of the teacher's components, a pipeline to diffusers."""
    backbone, teacher_classes = find_backbone(teacher_folder), read_json(teacher_folder / MODEL_INDEX)
    model_index = {
        "_class_name": pipeline_class.__name__,
        "_diffusers_version": diffusers_version,
        **dict.fromkeys(backbone.OPTIONAL_COMPONENTS, ABSENT),
        **{component: teacher_classes[component] for component in copied_components(teacher_folder)},
        TRANSFORMER: ["diffusers", backbone.TRANSFORMER_CLASS.__name__],
        SCHEDULER: ["diffusers", scheduler_class.__name__],
    }
    for component in (name for name in backbone.COPIED_COMPONENTS if name.startswith(TOKENIZER)):
        if (folder / component / "tokenizer.json").is_file():
            library, name = model_index[component]
            model_index[component] = [library, tokenizer_class(name)]
    return model_index


def _save_variant(folder: Path, variant: str, pipeline_class: type[DiffusionPipeline], without: Sequence[str]) -> None:
    """Put half-precision copies of all weights beside the ordinary ones, under the names that diffusers looks for."""
    absent = dict.fromkeys(without)
    pipeline = pipeline_class.from_pretrained(folder, **absent, **dtype_argument(VARIANTS[variant]))
    with TemporaryDirectory(dir=folder) as written:
        pipeline.save_pretrained(written, variant=variant)
        for file in Path(written).glob(f"*/*.{variant}*"):  # and not the configs, which would name the lower dtype
            file.replace(folder / file.relative_to(written))


def _draws_in_sana_pipeline(student: SanaTransformer2DModel, teacher_config: Mapping[str, Any]) -> bool:
    """Whether a stock `SanaPipeline` of the teacher feeds the adapted network the times that the student knows."""
    time_scale = backbone_of(student).timestep_scale(student)
    fed = SANA_PIPELINE_TIME * teacher_config.get("timestep_scale", 1.0)
    return not teacher_config.get("guidance_embeds", False) and fed == time_scale


def _record(
    description: StudentDescription,
    student: Any,
    teacher: str | PathLike[str],
    teacher_folder: Path,
    output_dir: Path,
) -> dict[str, Any]:
    """What the card says of either kind of student, the samples left out."""
    resolution = description.resolution
    if resolution is None:
        backbone = backbone_of(student)
        resolution = backbone.native_size(student) * backbone.vae_scale_factor(teacher_folder)
    license = description.license
    is_local = Path(teacher).is_dir()
    return {
        "model_id": description.model_id or output_dir.resolve().name,
        "teacher": Path(teacher).resolve().name if is_local else str(teacher),
        "base_model": None if is_local else str(teacher),
        "license": license_of(teacher_folder / CARD) if license is None else {"license": license},
        "resolution": resolution,
        "prompt": description.prompt,
        "training": dict(description.training),
        "image_free": description.image_free,
    }


def _describe(folder: Path, teacher_folder: Path, description: StudentDescription, record: Mapping[str, Any]) -> None:
    """Write what a folder holds beside its weights: records, samples, the teacher's terms, the card."""
    for name in LEGAL_FILES:
        if (teacher_folder / name).is_file():
            _copy_published(teacher_folder / name, folder / name)
    pictures = []
    for index, sample in enumerate(description.samples[:MAX_SAMPLES]):
        file = f"{SAMPLES}/{index:02}.png"
        (folder / SAMPLES).mkdir(exist_ok=True)
        shown = sample.image.copy()
        shown.thumbnail((MAX_SAMPLE_SIZE, MAX_SAMPLE_SIZE))  # leaves smaller ones as they are
        shown.save(folder / file)
        pictures.append({"prompt": sample.prompt, "num_inference_steps": sample.num_inference_steps, "file": file})
    write_json(folder / TRAINING_RECORD, redact_values({**record, "samples": pictures}))
    if description.config is not None:
        write_json(folder / TRAINING_CONFIG, redact_values(description.config))
    render_model_card(folder).save(folder / CARD)
