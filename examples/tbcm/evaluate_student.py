#!/usr/bin/env python
"""Draw with a student, and with its teacher, and measure the pictures.

1. prompts from a file or a data set; real pictures from a file of features, a folder, a data set or the teacher itself
2. every prompt is drawn at every number of steps, by all processes; what is on disk already is not drawn again
3. distances, precision, recall, retrieval, text-image score, diversity and time, with 95% confidence intervals
4. metrics.json, which the model card takes, and metrics.png in --output_dir

    python examples/tbcm/evaluate_student.py --model outputs/student --prompts_file prompts.txt --output_dir outputs/x
    accelerate launch examples/tbcm/evaluate_student.py --model outputs/student --teacher TEACHER \\
      --features inception --dataset_name playgroundai/MJHQ-30K --clip_model openai/clip-vit-large-patch14 \\
      --output_dir outputs/mjhq
"""

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SanaPipeline
from PIL import Image
from transformers import HfArgumentParser

from diffusers_tbcm.data.columns import MJHQ_30K
from diffusers_tbcm.data.pictures import DatasetPictures, FolderPictures
from diffusers_tbcm.data.prompts import EvaluationPrompts, load_evaluation_prompts
from diffusers_tbcm.evaluation.drawing import draw_pictures, load_pipeline, numbered_generators
from diffusers_tbcm.evaluation.evaluator import Evaluator, TextImageScorer, seconds_per_image
from diffusers_tbcm.evaluation.features import FeatureExtractor, InceptionFeatures, MobileNetFeatures
from diffusers_tbcm.evaluation.picture_folder import PictureFolder, pipeline_digests
from diffusers_tbcm.evaluation.reference import FeatureReference
from diffusers_tbcm.evaluation.report import measurement_table, plot_measurements
from diffusers_tbcm.evaluation.text_image import CLIPScorer, HeadScorer
from diffusers_tbcm.export.model_card import save_model_card
from diffusers_tbcm.export.record import Measurement, save_metrics
from diffusers_tbcm.owned import OwnedFolder
from diffusers_tbcm.pipeline_folder import METRICS, TRAINING_RECORD
from diffusers_tbcm.versions import dtype_argument


FEATURES: dict[str, type[FeatureExtractor]] = {"mobilenet": MobileNetFeatures, "inception": InceptionFeatures}
PICTURES = "pictures"
REFERENCE = "reference.safetensors"  # the features of the real pictures, for --reference_file
REFERENCE_RUN = "reference"  # the teacher's pictures that others are compared with
PLOT = "metrics.png"
TIMED_CALLS = 3
MIN_PICTURES = 20  # the kernel distance takes 2 in each of 10 subsets
EXCLUSIVE = (  # flags that exclude each other; one of the first two has to be given
    ("prompts_file", "dataset_name"),
    ("reference_dir", "reference_file", "reference_teacher"),
    ("clip_model", "text_image_head"),
)


def flag(default: Any, says: str) -> Any:
    return field(default=default, metadata={"help": says})


@dataclass(frozen=True)
class Settings:
    """The flags."""

    model: str = field(metadata={"help": "pipeline folder or Hub id of a student"})
    output_dir: Path
    lora: str | None = flag(None, "LoRA weights to load into it; --model may then be their teacher")
    teacher: str | None = flag(None, "pipeline folder or Hub id of a SanaPipeline to measure beside it")
    steps: list[int] = field(default_factory=lambda: [1, 2, 4], metadata={"help": "the student's"})
    teacher_steps: list[int] = field(
        default_factory=lambda: [20], metadata={"help": "the last is the one compared with"}
    )

    prompts_file: str | None = flag(None, "text with one prompt a line, or csv, json, jsonl or parquet")
    dataset_name: str | None = flag(None, f"`datasets` id or folder; {MJHQ_30K} is known with its columns")
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    caption_column: str = "text"
    label_column: str | None = flag(None, "the concept that a prompt asks for and a picture shows, for retrieval")
    image_column: str | None = flag(None, "of --dataset_name: its pictures are the real ones")
    max_prompts: int | None = flag(None, "the first so many")

    reference_dir: str | None = flag(None, "folder of real pictures; names of folders in it are their labels")
    reference_file: Path | None = field(
        default=None, metadata={"help": f"features of real pictures: an earlier run's {REFERENCE}"}
    )
    reference_teacher: bool = flag(False, "the teacher's pictures, from other noise")
    features: Literal["mobilenet", "inception"] = flag("mobilenet", "inception needs torch-fidelity")

    clip_model: str | None = flag(None, "folder or Hub id of a CLIP model that scores pictures against prompts")
    text_image_head: str | None = flag(None, "pipeline folder with a text-image head, which does so offline")

    num_images_per_prompt: int = flag(1, "2 or more measure diversity too")
    bootstrap_resamples: int = 200
    batch_size: int = flag(8, "pictures at a time, in each process")
    guidance_scale: float = 4.5
    resolution: int | None = flag(None, "pixels a side; the transformer's own by default")
    max_sequence_length: int = flag(300, "tokens of a prompt")
    complex_human_instruction: bool = flag(
        True, "put Sana's instruction before each prompt; --no- for a student that was distilled without it"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    update_card: bool = flag(False, "put the results into --model, a folder, and its card")


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Read the flags, and refuse what is wrong with them before anything is loaded."""
    parser = HfArgumentParser(Settings, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The parser's own names for it are all underscores or all hyphens; this is that of the training scripts.
    parser.add_argument("--no-complex_human_instruction", dest="complex_human_instruction", action="store_false")
    settings: Settings
    settings, unknown = parser.parse_args_into_dataclasses(
        None if argv is None else list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for names in EXCLUSIVE:
        given = [name for name in names if getattr(settings, name)]
        if len(given) > 1:
            parser.error(f"argument --{given[1]}: not allowed with argument --{given[0]}")
    if settings.prompts_file is None and settings.dataset_name is None:
        parser.error("one of the arguments --prompts_file --dataset_name is required")
    for name in ("max_prompts", "num_images_per_prompt", "batch_size", "resolution", "max_sequence_length"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}: it takes at least 1")
    for name in ("steps", "teacher_steps"):
        values = getattr(settings, name)
        if min(values) < 1 or len({*values}) < len(values):
            parser.error(f"--{name} is {values}: it takes different numbers from 1 on")
    if settings.bootstrap_resamples < 2:
        parser.error(f"--bootstrap_resamples is {settings.bootstrap_resamples}: it takes at least 2")
    if settings.reference_teacher and settings.teacher is None:
        parser.error("--reference_teacher needs --teacher")
    if settings.image_column is not None and settings.dataset_name is None:
        parser.error("--image_column is of --dataset_name, which is not given")
    if settings.reference_file is not None and not settings.reference_file.is_file():
        parser.error(f"--reference_file {str(settings.reference_file)!r} does not exist")
    if settings.update_card and not (Path(settings.model) / TRAINING_RECORD).is_file():
        parser.error(f"--update_card needs --model to be a folder that training wrote, with its {TRAINING_RECORD}")
    return settings


def check_folders(settings: Settings) -> None:
    """Refuse to write where something is that is not ours."""
    output = OwnedFolder(settings.output_dir)
    output.check()
    output.check_free([METRICS, REFERENCE, PLOT])
    if settings.update_card:
        OwnedFolder(settings.model, "model").check_free([METRICS])


# 1. Prompts and real pictures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What pictures are drawn of, and what they are measured with.

    Args:
        prompts: with the concepts that they ask for.
        real: pictures to make a reference of; None where there is no reference, or it is a file or the teacher's.
        reference: from a file; None where there is none.
        extractor: makes the features.
        scorer: scores pictures against prompts; None for no score.
    """

    prompts: EvaluationPrompts
    real: FolderPictures | DatasetPictures | None
    reference: FeatureReference | None
    extractor: FeatureExtractor
    scorer: TextImageScorer | None


def prepare(settings: Settings, source: str, device: torch.device) -> Task:
    """Load it all; whatever can be wrong is found before anything is drawn."""
    for name in (settings.model, settings.teacher):
        try:
            if name is not None:
                DiffusionPipeline.load_config(name)
        except OSError as error:
            raise ValueError(f"model {name!r} is neither a pipeline folder nor a model on the Hub") from error
    prompts = load_evaluation_prompts(
        source,
        config=settings.dataset_config_name,
        split=settings.dataset_split,
        prompt_column=settings.caption_column,
        label_column=settings.label_column,
        max_prompts=settings.max_prompts,
    )
    real = real_pictures(settings)
    reference = None if settings.reference_file is None else FeatureReference.load(settings.reference_file)
    extractor = FEATURES[settings.features]().to(device)
    if reference is not None and reference.features.shape[1] != extractor.num_features:
        raise ValueError(
            f"--reference_file holds features of {reference.features.shape[1]} dimensions, --features"
            f" {settings.features} makes {extractor.num_features}"
        )
    scorer: TextImageScorer | None = None
    if settings.clip_model is not None:
        scorer = CLIPScorer(settings.clip_model, device)
    elif settings.text_image_head is not None:
        scorer = HeadScorer(settings.text_image_head, device)
    task = Task(prompts, real, reference, extractor, scorer)
    check_numbers(settings, task)
    return task


def real_pictures(settings: Settings) -> FolderPictures | DatasetPictures | None:
    if settings.reference_dir is not None:
        return FolderPictures(settings.reference_dir)
    if settings.dataset_name is None or settings.reference_file is not None or settings.reference_teacher:
        return None
    if settings.image_column is None and settings.dataset_name != MJHQ_30K:
        return None
    return DatasetPictures(
        settings.dataset_name,
        config=settings.dataset_config_name,
        split=settings.dataset_split,
        image_column=settings.image_column or "image",
        label_column=settings.label_column,
    )


def check_numbers(settings: Settings, task: Task) -> None:
    """Refuse what could not be measured once it is drawn."""
    prompts, labels = task.prompts.prompts, task.prompts.labels
    if len(prompts) < 2:
        raise ValueError("there is 1 prompt: an interval takes at least 2")
    drawn = len(prompts) * settings.num_images_per_prompt
    real_labels: Sequence[str]
    if task.reference is not None:
        real, real_labels = len(task.reference.features), task.reference.labels
    elif settings.reference_teacher:
        real, real_labels = drawn, labels
    elif task.real is not None:
        real, real_labels = len(task.real), task.real.labels
    else:
        return
    needed = max(MIN_PICTURES, 1 + (task.extractor.num_components or task.extractor.num_features))
    for kind, number in (("drawn", drawn), ("real", real)):
        if number < needed:
            raise ValueError(
                f"{number} {kind} pictures are too few: the covariance of --features {settings.features} takes"
                f" {needed}"
            )
    unknown = sorted({*labels} - {*real_labels})
    if real_labels and unknown:
        raise ValueError(f"{len(unknown)} labels of prompts, such as {unknown[0]!r}, are those of no real picture")


# 2. Pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """The pictures of a model at a number of steps, and the seconds that one takes."""

    model: str
    steps: int
    pictures: PictureFolder
    seconds: float


def draw_models(settings: Settings, accelerator: Accelerator, prompts: Sequence[str]) -> list[Drawn]:
    """Draw with the teacher, where there is one, and with the student; one pipeline is in memory at a time."""
    dtype = getattr(torch, settings.dtype)
    drawn: list[Drawn] = []
    if settings.teacher is not None:
        teacher = SanaPipeline.from_pretrained(settings.teacher, **dtype_argument(dtype)).to(accelerator.device)
        runs = [("teacher", steps, settings.seed) for steps in settings.teacher_steps]
        if settings.reference_teacher:
            runs.append((REFERENCE_RUN, settings.teacher_steps[-1], settings.seed + 1))
        drawn += draw_all(settings, accelerator, teacher, prompts, runs)
        del teacher
    student = load_pipeline(settings.model, lora=settings.lora, dtype=dtype, device=accelerator.device)
    runs = [("student", steps, settings.seed) for steps in settings.steps]
    return drawn + draw_all(settings, accelerator, student, prompts, runs)


def draw_all(
    settings: Settings,
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    runs: Sequence[tuple[str, int, int]],
) -> list[Drawn]:
    """Draw the missing pictures of every run (model, steps, seed), shared by the processes."""
    size = settings.resolution or pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    options: dict[str, Any] = {
        "guidance_scale": settings.guidance_scale,
        "height": size,
        "width": size,
        "max_sequence_length": settings.max_sequence_length,
        "use_resolution_binning": False,
    }
    described = {**options, **pipeline_digests(pipeline), "instruction": settings.complex_human_instruction}
    if not settings.complex_human_instruction:
        options["complex_human_instruction"] = None
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for model, steps, seed in runs:
        with accelerator.main_process_first():
            folder = PictureFolder(
                settings.output_dir / PICTURES / f"{model}-{steps}-steps",
                prompts,
                settings.num_images_per_prompt,
                {**described, "num_inference_steps": steps, "seed": seed},
            )
        missing = folder.missing()
        accelerator.wait_for_everyone()  # nobody draws before all have looked
        with accelerator.split_between_processes(missing) as mine:
            folder.draw(
                pipeline,
                mine,
                num_inference_steps=steps,
                seed=seed,
                batch_size=settings.batch_size,
                progress=accelerator.is_main_process,
                **options,
            )
        accelerator.wait_for_everyone()

        def draw_one(steps: int = steps, seed: int = seed) -> list[Image.Image]:
            generators = numbered_generators(seed)
            return list(draw_pictures(pipeline, prompts[:1], generators, num_inference_steps=steps, **options))

        seconds = seconds_per_image(draw_one, TIMED_CALLS) if accelerator.is_main_process else 0.0
        drawn.append(Drawn(model, steps, folder, seconds))
    return drawn


# 3. Measurements -----------------------------------------------------------------------------------------------------


def make_reference(settings: Settings, task: Task, drawn: Sequence[Drawn]) -> FeatureReference | None:
    """The features of the real pictures, kept in the output folder where they do not come from a file."""
    real: Sequence[Image.Image] | None = task.real
    labels: Sequence[str] = () if task.real is None else task.real.labels
    if settings.reference_teacher:
        real = next(run.pictures for run in drawn if run.model == REFERENCE_RUN)
        labels = [label for label in task.prompts.labels for _ in range(settings.num_images_per_prompt)]
    if real is None:
        return task.reference
    reference = FeatureReference.fit(task.extractor.extract(real), labels, task.extractor.num_components)
    reference.save(settings.output_dir / REFERENCE)
    return reference


def measure(
    settings: Settings, task: Task, drawn: Sequence[Drawn], reference: FeatureReference | None
) -> list[Measurement]:
    evaluator = Evaluator(task.extractor, reference, task.scorer, settings.bootstrap_resamples)
    measurements = []
    for run in drawn:
        if run.model != REFERENCE_RUN:
            row = evaluator(run.model, run.steps, run.pictures, task.prompts.prompts, task.prompts.labels)
            measurements.append(replace(row, metrics={**row.metrics, "s / image": run.seconds}))
    teachers = [row for row in measurements if row.model == "teacher"]
    if not teachers or settings.num_images_per_prompt == 1:
        return measurements
    of_teacher = teachers[-1].metrics["diversity"]
    return [
        replace(row, metrics={**row.metrics, "diversity / teacher's": row.metrics["diversity"] / of_teacher})
        for row in measurements
    ]


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(argv)
    words = sys.argv[1:] if argv is None else argv
    accelerator = Accelerator()

    # 1. Prompts and real pictures
    source = settings.prompts_file or settings.dataset_name or ""
    check_folders(settings)
    task = prepare(settings, source, accelerator.device)
    output = OwnedFolder(settings.output_dir)
    output.claim()

    # 2. Pictures
    drawn = draw_models(settings, accelerator, task.prompts.prompts)
    if not accelerator.is_main_process:
        return

    # 3. Measurements
    output.own(REFERENCE, PLOT)
    reference = make_reference(settings, task, drawn)
    measurements = measure(settings, task, drawn, reference)

    # 4. Results; no absolute path, which would be of this machine
    command = shlex.join(Path(word).name if os.path.isabs(word) else word for word in words)
    details = {
        "seed": settings.seed,
        "pictures": len(drawn[0].pictures),
        "real_pictures": None if reference is None else len(reference.features),
        "intervals": f"95%, bootstrap of {settings.bootstrap_resamples} over prompts",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "processes": accelerator.num_processes,
        "torch": str(torch.__version__),
        **({"text_image_head": task.scorer.accuracy} if isinstance(task.scorer, HeadScorer) else {}),
    }
    for folder in [settings.output_dir, *([Path(settings.model)] if settings.update_card else [])]:
        save_metrics(
            folder,
            measurements,
            dataset=f"{len(task.prompts.prompts)} prompts of {Path(source).name if os.path.isabs(source) else source}",
            command=f"python examples/tbcm/{Path(__file__).name} {command}",
            details=details,
        )
    if settings.update_card:
        save_model_card(settings.model)
    plot_measurements(measurements, settings.output_dir / PLOT)
    print(measurement_table(measurements).to_string(index=False, na_rep=""))
    print(f"{settings.output_dir / PLOT}")


if __name__ == "__main__":
    main()
