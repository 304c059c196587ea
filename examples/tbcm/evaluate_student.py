#!/usr/bin/env python
r"""Draw with a student, and with its teacher, and measure the pictures.

1. prompts from a file, a data set or a benchmark; real pictures from a file of features, a folder, a data set or the
   teacher itself
2. every prompt is drawn at every number of steps, as the student was distilled unless a flag says otherwise, by all
   processes; what is on disk already is not drawn again
3. distances, precision, recall, retrieval, scores, diversity and decisiveness with 95% confidence intervals, and time
4. metrics.json, which the model card takes, metrics.png and, prompt by prompt, prompts.csv in --output_dir

    python examples/tbcm/evaluate_student.py --model outputs/student --prompts_file prompts.txt --output_dir outputs/x
    accelerate launch examples/tbcm/evaluate_student.py --model outputs/student --teacher TEACHER \\
      --features inception --dataset_name playgroundai/MJHQ-30K --clip_model openai/clip-vit-large-patch14 \\
      --output_dir outputs/mjhq
"""

import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image

from diffusers_tbcm.backbones import backbone_of, backbone_of_index, find_backbone
from diffusers_tbcm.backbones.loading import load_networks
from diffusers_tbcm.command_line import DEBUG_HELP, ending_in_words, show_information
from diffusers_tbcm.components import MODEL_CONFIG, SCHEDULER_CONFIG
from diffusers_tbcm.data.columns import MJHQ_30K
from diffusers_tbcm.data.pictures import DatasetPictures, FolderPictures
from diffusers_tbcm.data.prompts import EvaluationPrompts, load_evaluation_prompts
from diffusers_tbcm.errors import loading, loading_by_name
from diffusers_tbcm.evaluation.dpg_bench import DPGBench
from diffusers_tbcm.evaluation.drawing import call_options, has_learned_guidance, load_pipeline
from diffusers_tbcm.evaluation.elsewhere import LIST, Scores, read_scores, write_list
from diffusers_tbcm.evaluation.evaluator import (
    Evaluator,
    check_installed,
    check_numbers,
    compare_with_teacher,
)
from diffusers_tbcm.evaluation.features import (
    DINOV2,
    FEATURES,
    Dinov2Features,
    FeatureExtractor,
    InceptionFeatures,
    MobileNetFeatures,
    load_extractor,
)
from diffusers_tbcm.evaluation.geneval import GenEval
from diffusers_tbcm.evaluation.kept import features_of
from diffusers_tbcm.evaluation.preference import (
    HPSV2,
    IMAGE_REWARD,
    PICKSCORE,
    ImageRewardScorer,
    PickScorer,
    load_scorers,
)
from diffusers_tbcm.evaluation.reference import FeatureReference
from diffusers_tbcm.evaluation.report import measurement_table, plot_measurements, save_prompt_values
from diffusers_tbcm.evaluation.runs import Drawn, draw_runs
from diffusers_tbcm.evaluation.text_image import HeadScorer, TextImageScorer
from diffusers_tbcm.export.model_card import render_model_card, save_model_card
from diffusers_tbcm.export.record import Measurement, save_metrics
from diffusers_tbcm.files import read_json
from diffusers_tbcm.owned import OwnedFolder
from diffusers_tbcm.pipeline_folder import METRICS, SCHEDULER, TRAINING_RECORD, TRANSFORMER, resolve_teacher
from diffusers_tbcm.pipeline_sana_tbcm import STOCK_CALL_OPTIONS
from diffusers_tbcm.redaction import redact, redact_command
from diffusers_tbcm.scheduling_flow import is_flow_student
from diffusers_tbcm.training.accelerators import check_processes
from diffusers_tbcm.training.settings import SettingsParser
from diffusers_tbcm.versions import dtype_argument


logger = logging.get_logger(__name__)

PICTURES = "pictures"
REFERENCE = "reference.safetensors"  # the features of the real pictures, for --reference_file
REFERENCE_RUN = "reference"  # the teacher's pictures that others are compared with
PLOT = "metrics.png"
BY_PROMPT = "prompts.csv"
DRAWN_WITH = ("guidance_scale", "height", "width", "max_sequence_length", "instruction")  # which the results record
KINDS = (MobileNetFeatures, InceptionFeatures, Dinov2Features)
OWN_NAMES = {  # of measures and of the list of pictures, which no other program's scores can have
    *(name for kind in KINDS for name in (kind.frechet_name, kind.kernel_name)),
    *("precision", "recall", "diversity", "decisiveness", Path(LIST).stem),
    *(kind.name for kind in (PickScorer, ImageRewardScorer, GenEval, DPGBench)),
}
MAX_STEPS = 1000  # of the schedulers
PATIENCE = timedelta(hours=6)  # of processes that wait while one checks the real pictures
PROMPTS = ("prompts_file", "dataset_name", "geneval", "dpg_bench")  # one has to be given
EXCLUSIVE = (PROMPTS, ("reference_dir", "reference_file", "reference_teacher"))  # flags that exclude each other


def flag(default: Any, says: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": says, **options})


@dataclass(frozen=True)
class Settings:
    """The flags."""

    model: str = field(metadata={"help": "pipeline folder or Hub id of a student"})
    output_dir: Path
    lora: str | None = flag(None, "LoRA weights to load into it; --model may then be their teacher")
    teacher: str | None = flag(None, "pipeline folder or Hub id of its teacher, to measure beside it")
    variant: Literal["fp16", "bf16"] | None = flag(None, "half-precision weights to load of the teacher")
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
    geneval: str | None = flag(
        None, "GenEval's evaluation_metadata.jsonl: its prompts; pictures for its scorer, whose results are read back"
    )
    dpg_bench: str | None = flag(None, "DPG-Bench's folder of prompts: the same")
    max_prompts: int | None = flag(None, "the first so many")

    reference_dir: str | None = flag(None, "folder of real pictures; names of folders in it are their labels")
    reference_file: Path | None = field(
        default=None, metadata={"help": f"features of real pictures: an earlier run's {REFERENCE}"}
    )
    reference_teacher: bool = flag(False, "the teacher's pictures, from other noise")
    features: list[str] = field(
        default_factory=lambda: ["mobilenet"],
        metadata={"help": "several give the distances in each; inception needs torch-fidelity", "choices": FEATURES},
    )
    dinov2_model: str = flag(DINOV2, "folder or Hub id of --features dinov2")
    distance_by_label: bool = flag(False, "the Frechet distance of every label apart, too: for few labels")

    clip_model: str | None = flag(None, "folder or Hub id of a CLIP model that scores pictures against prompts")
    text_image_head: str | None = flag(None, "pipeline folder with a text-image head, which does so offline")
    pickscore_model: str | None = flag(
        None, f"folder or Hub id for PickScore; {PICKSCORE} where none is given", nargs="?", const=PICKSCORE
    )
    hpsv2_model: str | None = flag(
        None, f"folder or Hub id for HPSv2; {HPSV2} where none is given", nargs="?", const=HPSV2
    )
    hpsv2_version: Literal["2.1", "2.0"] = "2.1"
    image_reward_model: str | None = flag(
        None, f"folder or Hub id for ImageReward; {IMAGE_REWARD} where none is given", nargs="?", const=IMAGE_REWARD
    )
    read_scores: list[str] = field(
        default_factory=list,
        metadata={"help": "such as HPSv3: scores of other programs, in NAME.jsonl beside each model's pictures"},
    )

    num_images_per_prompt: int = flag(1, "2 or more measure diversity too")
    bootstrap_resamples: int = 200
    batch_size: int = flag(8, "pictures at a time, in each process")
    guidance_scale: float | None = flag(
        None, "of all models, but for a student that has learned its guidance; the middle of the student's by default"
    )
    resolution: int | None = flag(None, "pixels a side; the student's own by default")
    max_sequence_length: int | None = flag(None, "tokens of a prompt; as the student was distilled by default")
    complex_human_instruction: bool | None = flag(
        None,
        "put Sana's instruction before each prompt; as the student was distilled by default",
        nargs="?",
        const=True,
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    update_card: bool = flag(False, "put the results into --model, a folder, and its card")
    debug: bool = flag(False, DEBUG_HELP)


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Read the flags, and refuse what is wrong with them before anything is loaded."""
    parser = SettingsParser(Settings, description=__doc__)
    # The parser's own names for it are all underscores or all hyphens; this is that of the training scripts.
    parser.add_argument(
        "--no-complex_human_instruction", dest="complex_human_instruction", action="store_false", help="put it there"
    )
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
    if not any(getattr(settings, name) for name in PROMPTS):
        parser.error(f"one of the arguments {' '.join(f'--{name}' for name in PROMPTS)} is required")
    numbers = ("max_prompts", "num_images_per_prompt", "batch_size", "resolution", "max_sequence_length")
    parser.check_at_least(1, **{name: getattr(settings, name) for name in numbers})
    parser.check_at_least(0, seed=settings.seed)
    if len({*settings.features}) < len(settings.features):
        parser.error(f"--features is {settings.features}: it takes different ones")
    if settings.reference_file is not None and len(settings.features) > 1:
        parser.error("--reference_file holds one kind of features: give one of --features, or real pictures")
    parser.check_at_least(2, bootstrap_resamples=settings.bootstrap_resamples)
    if settings.guidance_scale is not None and not math.isfinite(settings.guidance_scale):
        parser.error(f"--guidance_scale is {settings.guidance_scale}: it takes a finite number")
    for name in ("steps", "teacher_steps"):
        values = getattr(settings, name)
        if min(values) < 1 or max(values) > MAX_STEPS or len({*values}) < len(values):
            parser.error(f"--{name} is {values}: it takes different numbers from 1 to {MAX_STEPS}")
    if settings.reference_teacher and settings.teacher is None:
        parser.error("--reference_teacher needs --teacher")
    if settings.distance_by_label and settings.label_column is None and settings.dataset_name != MJHQ_30K:
        parser.error("--distance_by_label needs --label_column")
    references = (settings.reference_dir, settings.reference_file, settings.reference_teacher, settings.image_column)
    if settings.distance_by_label and not any(references) and settings.dataset_name != MJHQ_30K:
        parser.error(
            "--distance_by_label needs real pictures: give --reference_dir, --reference_file, --reference_teacher or"
            " --image_column"
        )
    if not all(name.replace("-", "").replace("_", "").isalnum() for name in settings.read_scores):
        parser.error(f"--read_scores is {settings.read_scores}: it takes names of letters, digits, - and _")
    own = {name.lower() for name in OWN_NAMES}
    if taken := [name for name in settings.read_scores if name.lower() in own]:
        parser.error(f"--read_scores is {taken[0]}: the evaluation has something of that name, give the score another")
    if settings.image_column is not None and settings.dataset_name is None:
        parser.error("--image_column is of --dataset_name, which is not given")
    if settings.reference_file is not None and not settings.reference_file.is_file():
        parser.error(f"--reference_file {str(settings.reference_file)!r} does not exist")
    if settings.reference_dir is not None:
        real, drawn = Path(settings.reference_dir).resolve(), settings.output_dir.resolve()
        if drawn.is_relative_to(real):
            parser.error("--output_dir is in --reference_dir, whose pictures are the real ones: choose another")
    if settings.update_card and not (Path(settings.model) / TRAINING_RECORD).is_file():
        parser.error(f"--update_card needs --model to be a folder that training wrote, with its {TRAINING_RECORD}")
    return settings


def benchmarks(settings: Settings) -> list[tuple[type[GenEval] | type[DPGBench], str | None]]:
    """The benchmarks, and where the prompts of each are given."""
    return [(GenEval, settings.geneval), (DPGBench, settings.dpg_bench)]


def check_folders(settings: Settings) -> None:
    """Refuse to write where something is that is not ours."""
    output = OwnedFolder(settings.output_dir)
    output.check()
    output.check_free([METRICS, *reference_files(settings), PLOT, BY_PROMPT])
    for name in (PICTURES, *(bench.folder for bench, path in benchmarks(settings) if path is not None)):
        folder = settings.output_dir / name
        for path in (folder, *folder.glob("*-steps")):
            if os.path.lexists(path) and not path.is_dir():
                raise ValueError(f"--output_dir is to hold a folder {str(path)!r}, which is a file: move it away")
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
        extractors: make features, each of another kind; the first are those of all measures.
        scorers: each scores pictures against prompts.
        benchmark: whose prompts they are; None where they are nobody's.
    """

    prompts: EvaluationPrompts
    real: FolderPictures | DatasetPictures | None
    reference: FeatureReference | None
    extractors: list[FeatureExtractor]
    scorers: list[TextImageScorer]
    benchmark: GenEval | DPGBench | None


def prepare(settings: Settings, source: str, device: torch.device) -> Task:
    """Load it all; whatever can be wrong is found before anything is drawn."""
    with loading_by_name("model", settings.model, "a pipeline folder"):
        model_index = DiffusionPipeline.load_config(settings.model)
    backbone = backbone_of_index(model_index, settings.model)
    check_installed()
    if settings.teacher is not None:
        folder = resolve_teacher(settings.teacher, settings.variant)
        with loading("teacher", settings.teacher):
            is_student = is_flow_student(read_json(folder / SCHEDULER / SCHEDULER_CONFIG))
        embeds_guidance = read_json(folder / TRANSFORMER / MODEL_CONFIG).get("guidance_embeds")
        if is_student or (embeds_guidance and backbone.STUDENT_EMBEDS_GUIDANCE):
            raise ValueError(
                f"teacher {settings.teacher!r} is a few-step student: give the teacher that it was distilled from"
            )
        if find_backbone(folder) is not backbone:
            raise ValueError(f"teacher {settings.teacher!r} is of another family than model {settings.model!r}")
    if settings.update_card:
        render_model_card(settings.model)
    benchmark: GenEval | DPGBench | None = None
    for kind, path in benchmarks(settings):
        if path is not None:
            benchmark = kind(path, settings.max_prompts)
    if benchmark is not None:
        prompts = EvaluationPrompts(benchmark.prompts, [])
    else:
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
    extractors = [load_extractor(name, dinov2_model=settings.dinov2_model).to(device) for name in settings.features]
    if reference is not None and reference.features.shape[1] != extractors[0].num_features:
        raise ValueError(
            f"--reference_file holds features of {reference.features.shape[1]} dimensions, --features"
            f" {settings.features[0]} makes {extractors[0].num_features}"
        )
    scorers = load_scorers(
        clip_model=settings.clip_model,
        text_image_head=settings.text_image_head,
        pickscore_model=settings.pickscore_model,
        hpsv2_model=settings.hpsv2_model,
        hpsv2_version=settings.hpsv2_version,
        image_reward_model=settings.image_reward_model,
        device=device,
    )
    task = Task(prompts, real, reference, extractors, scorers, benchmark)
    check_task(settings, task)
    return task


def real_pictures(settings: Settings) -> FolderPictures | DatasetPictures | None:
    if settings.reference_dir is not None:
        labelled = settings.label_column is not None or settings.dataset_name == MJHQ_30K
        return FolderPictures(settings.reference_dir, labelled=labelled)
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
        prompt_column=settings.caption_column,
    )


def check_task(settings: Settings, task: Task) -> None:
    """Refuse what could not be measured once it is drawn."""
    prompts, labels = task.prompts.prompts, task.prompts.labels
    if len(prompts) < 2:
        raise ValueError("there is 1 prompt: an interval takes at least 2")
    drawn = len(prompts) * settings.num_images_per_prompt
    real: tuple[int, Sequence[str]]
    if task.reference is not None:
        real = len(task.reference.features), task.reference.labels
    elif settings.reference_teacher:
        real = drawn, labels * settings.num_images_per_prompt
    elif task.real is not None:
        real = len(task.real), task.real.labels
    else:
        return
    for extractor in task.extractors:
        check_numbers(
            extractor,
            labels=labels,
            drawn=drawn,
            real=real[0],
            real_labels=real[1],
            by_label=settings.distance_by_label,
        )
    if labels and not real[1]:
        logger.warning("The real pictures have no labels: no retrieval is measured.")


# 2. Pictures ---------------------------------------------------------------------------------------------------------


def draw_models(settings: Settings, accelerator: Accelerator, task: Task) -> list[Drawn]:
    """Draw with the student and, where there is one, its teacher; one pipeline is in memory at a time."""
    dtype = getattr(torch, settings.dtype)
    variant = None if settings.lora is None else settings.variant  # then it is a teacher's weights that are loaded
    student = load_pipeline(
        settings.model, lora=settings.lora, variant=variant, dtype=dtype, device=accelerator.device
    )
    learned = has_learned_guidance(student)
    only_teachers = learned and settings.teacher is not None
    backbone = backbone_of(student.transformer)
    options: dict[str, Any] = {
        **call_options(
            student,
            guidance_scale=None if only_teachers else settings.guidance_scale,
            height=settings.resolution,
            width=settings.resolution,
            max_sequence_length=settings.max_sequence_length,
            complex_human_instruction=settings.complex_human_instruction,
        ),
        **backbone.CALL_OPTIONS,
    }
    if task.real is not None and accelerator.is_main_process:
        task.real.check((options["width"], options["height"]))
    accelerator.wait_for_everyone()
    OwnedFolder(settings.output_dir).claim()

    def draw(
        pipeline: DiffusionPipeline, runs: Sequence[tuple[str, int, int]], options: dict[str, Any]
    ) -> list[Drawn]:
        return draw_runs(
            accelerator,
            pipeline,
            runs,
            task.prompts.prompts,
            settings.output_dir / PICTURES,
            pictures_per_prompt=settings.num_images_per_prompt,
            batch_size=settings.batch_size,
            options=options,
        )

    drawn = draw(student, [("student", steps, settings.seed) for steps in settings.steps], options)
    if settings.teacher is None:
        return drawn
    del student
    folder = resolve_teacher(settings.teacher, settings.variant)
    with loading("teacher", folder):
        networks = load_networks(folder, dtype, settings.variant, without=backbone.OPTIONAL_COMPONENTS)
        teacher = backbone.PIPELINE_CLASS.from_pretrained(
            folder, variant=settings.variant, **networks, **dtype_argument(dtype)
        )
    teacher.to(accelerator.device)
    runs = [("teacher", steps, settings.seed) for steps in settings.teacher_steps]
    if settings.reference_teacher:
        runs.append((REFERENCE_RUN, settings.teacher_steps[-1], settings.seed + 1))
    if learned:  # the student's 1 would leave the teacher without guidance
        guidance_scale = settings.guidance_scale
        options["guidance_scale"] = STOCK_CALL_OPTIONS["guidance_scale"] if guidance_scale is None else guidance_scale
    return draw(teacher, runs, {**options, **backbone.GUIDED_OPTIONS}) + drawn


# 3. Measurements -----------------------------------------------------------------------------------------------------


def reference_files(settings: Settings) -> list[str]:
    """The files that features of real pictures are kept in, one for each kind."""
    return [REFERENCE, *(f"reference-{name}.safetensors" for name in settings.features[1:])]


def make_references(settings: Settings, task: Task, drawn: Sequence[Drawn]) -> list[FeatureReference]:
    """The features of the real pictures, kept in the output folder where they do not come from a file."""
    real: Sequence[Image.Image] | None = task.real
    labels, prompts = ((), ()) if task.real is None else (task.real.labels, task.real.prompts)
    if settings.reference_teacher:
        real = next(run.pictures for run in drawn if run.model == REFERENCE_RUN)
        labels, prompts = (
            [text for text in texts for _ in range(settings.num_images_per_prompt)]
            for texts in (task.prompts.labels, task.prompts.prompts)
        )
    if real is None:
        return [] if task.reference is None else [task.reference]
    references = []
    for extractor, name in zip(task.extractors, reference_files(settings), strict=True):
        reference = FeatureReference.fit(features_of(extractor, real), labels, extractor.num_components, prompts)
        with OwnedFolder(settings.output_dir).written(name) as partial:
            reference.save(partial)
        references.append(reference)
    return references


def measure(
    settings: Settings, task: Task, drawn: Sequence[Drawn], references: Sequence[FeatureReference]
) -> list[Measurement]:
    evaluator = Evaluator(
        task.extractors[0],
        references[0] if references else None,
        task.scorers,
        settings.bootstrap_resamples,
        settings.distance_by_label,
        [*zip(task.extractors[1:], references[1:], strict=False)],
    )
    teachers = [run.pictures for run in drawn if run.model == "teacher"]
    teacher = teachers[-1] if teachers else None
    measurements, by_prompt = [], []
    for run in drawn:
        if run.model != REFERENCE_RUN:
            row = evaluator(run.model, run.steps, run.pictures, task.prompts.prompts, task.prompts.labels, teacher)
            scores = scores_of_others(settings, task, run)
            metrics = {**row.metrics, **scores.metrics, "s / image": run.seconds}
            measurements.append(replace(row, metrics=metrics, intervals={**row.intervals, **scores.intervals}))
            by_prompt.append((run.model, run.steps, evaluator.by_prompt(run.pictures, task.prompts.prompts)))
    with OwnedFolder(settings.output_dir).written(BY_PROMPT) as partial:
        save_prompt_values(partial, task.prompts.prompts, by_prompt)
    return compare_with_teacher(measurements)


def scores_of_others(settings: Settings, task: Task, run: Drawn) -> Scores:
    """What other programs say of a model's pictures; where they have not been asked, how to ask them is printed."""
    found, resamples, of_run = Scores({}, {}), settings.bootstrap_resamples, f"{run.model} at {run.steps} steps"
    if task.benchmark is not None:
        folder = settings.output_dir / task.benchmark.folder / run.pictures.folder.name
        command = task.benchmark.export(run.pictures, folder)
        scores = task.benchmark.scores(run.pictures, folder, resamples)
        if scores is None:
            print(f"{task.benchmark.name} of {of_run}: run this, then the evaluation again:\n  {command}")
        else:
            found.update(scores)
    for name in settings.read_scores:
        scores = read_scores(run.pictures, name, resamples)
        if scores is None:
            print(f"{name} of {of_run}: write {name}.jsonl beside {write_list(run.pictures)}, then evaluate again")
        else:
            found.update(scores)
    return found


def hardware(device: torch.device) -> str:
    """What the pictures were drawn with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {platform.machine()}"


def evaluate(settings: Settings, words: Sequence[str]) -> None:
    """Take all four steps; the words are those of the command line, which the results record."""
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    check_processes(accelerator)

    # 1. Prompts and real pictures
    source = settings.prompts_file or settings.dataset_name or settings.geneval or settings.dpg_bench or ""
    check_folders(settings)
    task = prepare(settings, source, accelerator.device)

    # 2. Pictures
    drawn = draw_models(settings, accelerator, task)
    if not accelerator.is_main_process:
        return

    # 3. Measurements
    references = make_references(settings, task, drawn)
    measurements = measure(settings, task, drawn, references)

    # 4. Results; no path of this machine
    heads = [scorer for scorer in task.scorers if isinstance(scorer, HeadScorer)]
    details = {
        "seed": settings.seed,
        "features": settings.features,
        **{name: drawn[0].pictures.settings.get(name) for name in DRAWN_WITH},
        "student_guidance_scale": drawn[-1].pictures.settings["guidance_scale"],
        "pictures": len(drawn[0].pictures),
        "real_pictures": len(references[0].features) if references else None,
        "intervals": f"95%, bootstrap of {settings.bootstrap_resamples} over prompts",
        "hardware": hardware(accelerator.device),
        "processes": accelerator.num_processes,
        "torch": str(torch.__version__),
        **({"text_image_head": heads[0].accuracy} if heads else {}),
    }
    for folder in [settings.output_dir, *([Path(settings.model)] if settings.update_card else [])]:
        save_metrics(
            folder,
            measurements,
            dataset=f"{len(task.prompts.prompts)} prompts of {redact(source)}",
            command=f"python examples/tbcm/{Path(__file__).name} {redact_command(words)}",
            details=details,
        )
    if settings.update_card:
        save_model_card(settings.model)
    with OwnedFolder(settings.output_dir).written(PLOT) as partial:
        plot_measurements(measurements, partial, format="png")
    print(measurement_table(measurements).to_string(index=False, na_rep=""))
    print(f"{settings.output_dir / PLOT}")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(argv)
    show_information()
    flags = {item.name: f"--{item.name}" for item in fields(Settings)} | {"height": "--resolution"}
    with ending_in_words(flags, debug=settings.debug):
        evaluate(settings, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
