#!/usr/bin/env python
"""Distil the embedded teacher into outputs/quickstart and show what came out: a pipeline, a grid, a table.

1. `accelerate launch train_tbcm_distill.py` on the embedded teacher and its prompts, without one image
2. teacher, student and a control (the student before its training) draw the same evaluation prompts; MobileNet-FD,
   retrieval and time per picture
3. grid.png, metrics.json and the finished model card
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch
from diffusers import DiffusionPipeline, SanaPipeline
from PIL import Image
from tqdm.auto import tqdm

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.command_line import CommandParser
from diffusers_tbcm.evaluation.drawing import draw_pictures, numbered_generators
from diffusers_tbcm.evaluation.evaluator import seconds_per_image
from diffusers_tbcm.evaluation.features import MobileNetFeatures, pictures_to_tensor
from diffusers_tbcm.evaluation.grid import image_grid
from diffusers_tbcm.evaluation.reference import FeatureReference
from diffusers_tbcm.export.model_card import save_model_card
from diffusers_tbcm.export.record import Measurement, save_metrics
from diffusers_tbcm.owned import OwnedFolder
from diffusers_tbcm.pipeline_folder import list_checkpoints


TRAINING_SCRIPT = Path(__file__).with_name("train_tbcm_distill.py")
TEACHER_DIR = Path(__file__).with_name("sana_emoji_mini")
MAX_SEQUENCE_LENGTH = 48  # the prompts have at most some 30 tokens: padding to 300 changes nothing but the time
SEED = 1234
BATCH_SIZE = 50
MIN_PROMPTS = 2  # a distance takes a covariance
GRID_PROMPTS = (
    "a fluent 3d emoji of a dolphin",
    "noto violin",
    "a fluent 3d emoji of a volcano",
    "a noto emoji of a strawberry",
    "fluent 3d rocket",
    "noto sunflower",
    "a fluent 3d emoji of an owl",
    "a noto emoji of a hamburger",
)
STUDENT_STEPS = (1, 2, 4)
MEASURED_STEPS = {"teacher": (1, 2, 4, 20), "untrained student": STUDENT_STEPS, "student": STUDENT_STEPS}
GRID_COLUMNS = (("teacher", 1), ("teacher", 20), ("student", 1), ("student", 2), ("student", 4))

# Found on the embedded teacher with 2 CPU cores; README's recipe for real models is another.
STEPS = 1000
LEARNING_RATE = 3e-4


def training_command(output_dir: Path, steps: int, **changes: object) -> list[str]:
    """The quickstart's `accelerate launch`, with changes of the training script's flags."""
    flags: dict[str, object] = {
        "pretrained_model_name_or_path": TEACHER_DIR,
        "prompts_file": TEACHER_DIR / "prompts.txt",
        "output_dir": output_dir,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "train_batch_size": 2,
        "max_train_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "max_grad_norm": 1.0,
        "replay_buffer_size": 64,
        "teacher_batch_size": 16,
        "endpoint_warmup_steps": 7 * steps // 10,
        "tangent_warmup_steps": 0,
        "tangent_cooldown_start_step": 4 * steps // 5,
        "tangent_cooldown_steps": steps // 10,
        "ema_decay": 0.99,
        "checkpointing_steps": steps,
        "validation_steps": steps,
        "report_to": "tensorboard",
        **changes,
    }
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    launcher += ["--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_cpu_threads_per_process", str(os.cpu_count())]  # accelerate's own choice is one thread
    # The embedded teacher reads a prompt the same without the instruction, and on a CPU the instruction costs 100 ms.
    arguments += ["--use_ema", "--no-complex_human_instruction", "--validation_prompts", *GRID_PROMPTS]
    return [*launcher, str(TRAINING_SCRIPT), *arguments]


def draw(pipeline: DiffusionPipeline, prompts: list[str], steps: int, options: dict[str, Any]) -> list[Image.Image]:
    """One picture a prompt, from noise that depends on the prompt's place only: the same for teacher and student."""
    size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    pipeline.set_progress_bar_config(disable=True)
    pictures = draw_pictures(
        pipeline,
        prompts,
        numbered_generators(SEED),
        num_inference_steps=steps,
        batch_size=BATCH_SIZE,
        use_resolution_binning=False,
        **{"height": size, "width": size, **options},
    )
    return list(tqdm(pictures, total=len(prompts), desc=f"{type(pipeline).__name__}, {steps} steps", unit="picture"))


def likeness(pictures: list[Image.Image], references: list[Image.Image]) -> float:
    """Mean PSNR in dB between pictures drawn from the same noise: how closely one model follows the other."""
    mse = (pictures_to_tensor(pictures) - pictures_to_tensor(references)).square().mean((1, 2, 3))
    return round(float(-10 * mse.log10().mean()), 2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--max_train_steps", type=int, default=STEPS)
    parser.add_argument("--prompts", type=int, default=500, help="evaluation prompts")
    args = parser.parse_args(argv)
    parser.check_at_least(MIN_PROMPTS, prompts=args.prompts)
    start = time.perf_counter()

    # 1. Distil; the same command continues an interrupted run
    command = training_command(args.output_dir, args.max_train_steps)
    if list_checkpoints(args.output_dir):
        command += ["--resume_from_checkpoint", "latest"]
    if code := subprocess.run(command).returncode:
        sys.exit(code)  # the script has said why
    training_seconds = time.perf_counter() - start

    # 2. Measure
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = SanaPipeline.from_pretrained(TEACHER_DIR).to(device)
    untrained = SanaTBCMPipeline(
        teacher.tokenizer, teacher.text_encoder, teacher.vae, make_student(teacher.transformer), TBCMScheduler()
    )
    student = SanaTBCMPipeline.from_pretrained(args.output_dir).to(device)
    options = student.default_call_options  # all draw as the student was distilled
    pipelines: dict[str, DiffusionPipeline] = {"teacher": teacher, "untrained student": untrained, "student": student}
    lines = [json.loads(line) for line in (TEACHER_DIR / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluation = [line for line in lines if not line["held_out"]][: args.prompts]
    prompts, concepts = [line["prompt"] for line in evaluation], [line["concept"] for line in evaluation]
    extractor = MobileNetFeatures().to(device)
    reference = FeatureReference.load(TEACHER_DIR / "reference_features.safetensors")
    drawn: dict[tuple[str, int], list[Image.Image]] = {}
    figures: dict[tuple[str, int], dict[str, float]] = {}
    for model, all_steps in MEASURED_STEPS.items():
        for steps in all_steps:
            drawn[model, steps] = draw(pipelines[model], prompts, steps, options)
            one = seconds_per_image(partial(draw, pipelines[model], prompts[:1], steps, options), repeats=3)
            features = extractor.extract(drawn[model, steps])
            figures[model, steps] = {
                "MobileNet-FD": round(reference.frechet_distance(features), 1),
                "top-5 retrieval": round(reference.retrieval_at_k(features, concepts, k=5), 3),
                "s / image": round(one, 3),
            }
    worst, best = (figures["teacher", steps]["MobileNet-FD"] for steps in (1, 20))
    for model in ("untrained student", "student"):
        for steps in STUDENT_STEPS:
            metrics = figures[model, steps]
            metrics["gap closed"] = round((worst - metrics["MobileNet-FD"]) / (worst - best), 3)
            metrics["PSNR to the teacher's 20 steps (dB)"] = likeness(drawn[model, steps], drawn["teacher", 20])

    # 3. Show
    columns = [draw(pipelines[model], list(GRID_PROMPTS), steps, options) for model, steps in GRID_COLUMNS]
    labels = [f"{model}, {steps} step{'s' * (steps > 1)}" for model, steps in GRID_COLUMNS]
    with OwnedFolder(args.output_dir).written("grid.png") as partial_file:
        image_grid(list(zip(*columns, strict=True)), labels, GRID_PROMPTS).save(partial_file, format="PNG")
    script = "examples/tbcm/quickstart.py"
    save_metrics(
        args.output_dir,
        [Measurement(model, steps, metrics) for (model, steps), metrics in figures.items()],
        dataset=f"{len(prompts)} prompts of the embedded emoji teacher",
        command=f"python {script} --max_train_steps {args.max_train_steps} --prompts {args.prompts}",
        details={
            "seed": SEED,
            "training_seconds": round(training_seconds),
            "hardware": f"{device}, {torch.get_num_threads()} threads, {platform.machine()}",
            "torch": str(torch.__version__),
        },
    )
    save_model_card(args.output_dir)

    rows = [{"model": model, "steps": steps, **metrics} for (model, steps), metrics in figures.items()]
    print("\n" + pandas.DataFrame(rows).to_string(index=False, na_rep=""))
    print(f"{time.perf_counter() - start:.0f} s in all. Look at {args.output_dir / 'grid.png'}, then:\n")
    print("    from diffusers_tbcm import SanaTBCMPipeline")
    print(f'    pipe = SanaTBCMPipeline.from_pretrained("{args.output_dir}")')
    print(f'    pipe("{GRID_PROMPTS[0]}").images[0].save("dolphin.png")')


if __name__ == "__main__":
    main()
