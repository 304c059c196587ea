#!/usr/bin/env python
"""Draw with a student, and with its teacher, and measure the pictures.

1. prompts from a file or a data set; real pictures from a file of features, a folder, a data set or the teacher itself
2. every prompt is drawn at every number of steps, by all processes; what is on disk already is not drawn again
3. distances, precision, recall, retrieval, text-image score, diversity and time, with 95% confidence intervals
4. metrics.json, which the model card takes, and metrics.png in --output_dir

    python examples/tbcm/evaluate.py --model outputs/student --prompts_file prompts.txt --output_dir outputs/evaluation
    accelerate launch examples/tbcm/evaluate.py --model outputs/student --teacher TEACHER --features inception \\
      --dataset_name playgroundai/MJHQ-30K --clip_model openai/clip-vit-large-patch14 --output_dir outputs/mjhq
"""

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SanaPipeline
from evaluate_args import parse_args
from PIL import Image

from diffusers_tbcm.data.columns import MJHQ_30K
from diffusers_tbcm.data.pictures import DatasetPictures, FolderPictures
from diffusers_tbcm.data.prompts import EvaluationPrompts, load_evaluation_prompts
from diffusers_tbcm.evaluation.drawing import draw_pictures, load_pipeline, numbered_generators
from diffusers_tbcm.evaluation.evaluator import Evaluator, seconds_per_image
from diffusers_tbcm.evaluation.features import FeatureExtractor, InceptionFeatures, MobileNetFeatures
from diffusers_tbcm.evaluation.picture_folder import PictureFolder, pipeline_digests
from diffusers_tbcm.evaluation.reference import FeatureReference
from diffusers_tbcm.evaluation.text_image import CLIPScorer, HeadScorer
from diffusers_tbcm.export.model_card import render_model_card
from diffusers_tbcm.export.record import Measurement, save_metrics
from diffusers_tbcm.pipeline_folder import CARD
from diffusers_tbcm.versions import dtype_argument


FEATURES: dict[str, type[FeatureExtractor]] = {"mobilenet": MobileNetFeatures, "inception": InceptionFeatures}
PICTURES = "pictures"
REFERENCE = "reference.safetensors"  # the features of the real pictures, for --reference_file
REFERENCE_RUN = "reference"  # the teacher's pictures that others are compared with
PLOT = "metrics.png"
TIMED_CALLS = 3
MIN_PICTURES = 20  # the kernel distance takes 2 in each of 10 subsets


def real_pictures(args: argparse.Namespace) -> FolderPictures | DatasetPictures | None:
    """The pictures that a reference is to be made of; None where there is none, or it is a file or the teacher's."""
    if args.reference_dir is not None:
        return FolderPictures(args.reference_dir)
    if args.reference_file is not None or args.reference_teacher:
        return None
    if args.image_column is None and args.dataset_name != MJHQ_30K:
        return None
    return DatasetPictures(
        args.dataset_name,
        config=args.dataset_config_name,
        split=args.dataset_split,
        image_column=args.image_column,
        label_column=args.label_column,
    )


def check_numbers(args: argparse.Namespace, prompts: EvaluationPrompts, real: int | None, real_labels: Sequence[str]):
    """Refuse what could not be measured once it is drawn; `real` is the number of real pictures."""
    drawn = len(prompts.prompts) * args.num_images_per_prompt
    if len(prompts.prompts) < 2:
        raise ValueError("there is 1 prompt: an interval takes at least 2")
    if real is None:
        return
    extractor = FEATURES[args.features]
    needed = max(MIN_PICTURES, 1 + (extractor.num_components or extractor.num_features))
    for kind, number in (("drawn", drawn), ("real", real)):
        if number < needed:
            raise ValueError(
                f"{number} {kind} pictures are too few: the covariance of --features {args.features} takes {needed}"
            )
    unknown = sorted({*prompts.labels} - {*real_labels})
    if real_labels and unknown:
        raise ValueError(f"{len(unknown)} labels of prompts, such as {unknown[0]!r}, are those of no real picture")


@dataclass(frozen=True)
class Drawn:
    """The pictures of a model at a number of steps, and the seconds that one takes."""

    model: str
    steps: int
    pictures: PictureFolder
    seconds: float


def draw_all(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    runs: Sequence[tuple[str, int, int]],
) -> list[Drawn]:
    """Draw the missing pictures of every run (model, steps, seed), shared by the processes."""
    size = args.resolution or pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    options: dict[str, Any] = {
        "guidance_scale": args.guidance_scale,
        "height": size,
        "width": size,
        "max_sequence_length": args.max_sequence_length,
        "use_resolution_binning": False,
    }
    settings = {**options, **pipeline_digests(pipeline), "instruction": args.complex_human_instruction}
    if not args.complex_human_instruction:
        options["complex_human_instruction"] = None
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for model, steps, seed in runs:
        with accelerator.main_process_first():
            folder = PictureFolder(
                args.output_dir / PICTURES / f"{model}-{steps}-steps",
                prompts,
                args.num_images_per_prompt,
                {**settings, "num_inference_steps": steps, "seed": seed},
            )
        missing = folder.missing()
        accelerator.wait_for_everyone()  # nobody draws before all have looked
        with accelerator.split_between_processes(missing) as mine:
            folder.draw(
                pipeline,
                mine,
                num_inference_steps=steps,
                seed=seed,
                batch_size=args.batch_size,
                progress=accelerator.is_main_process,
                **options,
            )
        accelerator.wait_for_everyone()

        def draw_one(steps: int = steps, seed: int = seed) -> list[Image.Image]:
            first = draw_pictures(
                pipeline, prompts[:1], numbered_generators(seed), num_inference_steps=steps, **options
            )
            return list(first)

        seconds = seconds_per_image(draw_one, TIMED_CALLS) if accelerator.is_main_process else 0.0
        drawn.append(Drawn(model, steps, folder, seconds))
    return drawn


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Every metric over the number of steps, a line a model, with its intervals."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in measurements for name in row.metrics))
    models = list(dict.fromkeys(row.model for row in measurements))
    all_steps = sorted({row.num_inference_steps for row in measurements})
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.5 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        for model in models:
            shown = sorted(
                (row.num_inference_steps, row.metrics[name], row.intervals.get(name, (row.metrics[name],) * 2))
                for row in measurements
                if row.model == model and name in row.metrics
            )
            if shown:
                steps, values, ends = zip(*shown, strict=True)
                errors = [[v - low for v, (low, _) in zip(values, ends, strict=True)]]
                errors += [[high - v for v, (_, high) in zip(values, ends, strict=True)]]
                axis.errorbar(steps, values, yerr=errors, marker="o", capsize=3, label=model)
        axis.set_xscale("log", base=2)
        axis.set_xticks(all_steps, [str(steps) for steps in all_steps])
        axis.set(title=name, xlabel="steps")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv, __doc__)
    accelerator = Accelerator()

    # 1. Prompts and real pictures; whatever can be wrong is found before anything is drawn
    for name in (args.model, args.teacher):
        try:
            if name is not None:
                DiffusionPipeline.load_config(name)
        except OSError as error:
            raise ValueError(f"model {name!r} is neither a pipeline folder nor a model on the Hub") from error
    source = args.prompts_file or args.dataset_name
    prompts = load_evaluation_prompts(
        source,
        config=args.dataset_config_name,
        split=args.dataset_split,
        prompt_column=args.caption_column,
        label_column=args.label_column,
        max_prompts=args.max_prompts,
    )
    real = real_pictures(args)
    reference = None if args.reference_file is None else FeatureReference.load(args.reference_file)
    extractor = FEATURES[args.features]().to(accelerator.device)
    if reference is not None and reference.features.shape[1] != extractor.num_features:
        raise ValueError(
            f"--reference_file holds features of {reference.features.shape[1]} dimensions, --features {args.features}"
            f" makes {extractor.num_features}"
        )
    scorer = None
    if args.clip_model is not None:
        scorer = CLIPScorer(args.clip_model, accelerator.device)
    elif args.text_image_head is not None:
        scorer = HeadScorer(args.text_image_head, accelerator.device)
    real_labels: Sequence[str] = () if real is None else real.labels
    if reference is not None:
        check_numbers(args, prompts, len(reference.features), reference.labels)
    elif args.reference_teacher:
        check_numbers(args, prompts, len(prompts.prompts) * args.num_images_per_prompt, prompts.labels)
    else:
        check_numbers(args, prompts, None if real is None else len(real), real_labels)

    # 2. Pictures, one pipeline in memory at a time
    dtype = getattr(torch, args.dtype)
    drawn: list[Drawn] = []
    if args.teacher is not None:
        teacher = SanaPipeline.from_pretrained(args.teacher, **dtype_argument(dtype)).to(accelerator.device)
        runs = [("teacher", steps, args.seed) for steps in args.teacher_steps]
        if args.reference_teacher:
            runs.append((REFERENCE_RUN, args.teacher_steps[-1], args.seed + 1))
        drawn += draw_all(args, accelerator, teacher, prompts.prompts, runs)
        del teacher
    student = load_pipeline(args.model, lora=args.lora, dtype=dtype, device=accelerator.device)
    drawn += draw_all(
        args, accelerator, student, prompts.prompts, [("student", steps, args.seed) for steps in args.steps]
    )
    del student
    if not accelerator.is_main_process:
        return

    # 3. Measurements
    if args.reference_teacher:
        real = next(run.pictures for run in drawn if run.model == REFERENCE_RUN)
        real_labels = [label for label in prompts.labels for _ in range(args.num_images_per_prompt)]
    if real is not None:
        reference = FeatureReference.fit(extractor.extract(real), real_labels, extractor.num_components)
        reference.save(args.output_dir / REFERENCE)
    evaluator = Evaluator(extractor, reference, scorer, args.bootstrap_resamples)
    measurements = []
    for run in drawn:
        if run.model != REFERENCE_RUN:
            row = evaluator(run.model, run.steps, run.pictures, prompts.prompts, prompts.labels)
            measurements.append(replace(row, metrics={**row.metrics, "s / image": run.seconds}))
    teachers = [row for row in measurements if row.model == "teacher"]
    if teachers and args.num_images_per_prompt > 1:
        of_teacher = teachers[-1].metrics["diversity"]
        measurements = [
            replace(row, metrics={**row.metrics, "diversity / teacher's": row.metrics["diversity"] / of_teacher})
            for row in measurements
        ]

    # 4. Results
    details = {
        "seed": args.seed,
        "pictures": len(drawn[0].pictures),
        "real_pictures": None if reference is None else len(reference.features),
        "intervals": f"95%, bootstrap of {args.bootstrap_resamples} over prompts",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "processes": accelerator.num_processes,
        "torch": str(torch.__version__),
        **({"text_image_head": scorer.accuracy} if isinstance(scorer, HeadScorer) else {}),
    }
    folders = [args.output_dir, *([Path(args.model)] if args.update_card else [])]
    for folder in folders:
        save_metrics(
            folder,
            measurements,
            dataset=f"{len(prompts.prompts)} prompts of {Path(source).name if os.path.isabs(source) else source}",
            command=args.command,
            details=details,
        )
    if args.update_card:
        render_model_card(args.model).save(Path(args.model) / CARD)
    plot(measurements, args.output_dir / PLOT)
    table = [
        {
            "model": row.model,
            "steps": row.num_inference_steps,
            **{
                name: f"{value:.4g}"
                + (f" ({row.intervals[name][0]:.4g} to {row.intervals[name][1]:.4g})" if name in row.intervals else "")
                for name, value in row.metrics.items()
            },
        }
        for row in measurements
    ]
    print(pandas.DataFrame(table).to_string(index=False, na_rep=""))
    print(f"{args.output_dir / PLOT}")


if __name__ == "__main__":
    main()
