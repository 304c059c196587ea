#!/usr/bin/env python
"""Distil the embedded teacher into outputs/quickstart and show what came out: a pipeline, a grid, a table.

1. `train_tbcm_distill.py` on the embedded teacher, without one image: 24 prompts, or with --full all
   of its 5,179
2. teacher, student and a control (the student before its training) draw the same prompts from noises that no training
   has seen; distances are to the teacher's own pictures
3. grid.png, metrics.json and the finished model card
"""

import json
import platform
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SanaPipeline
from PIL import Image
from tqdm.auto import tqdm

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.command_line import DEBUG_HELP, CommandParser, ending_in_words
from diffusers_tbcm.draws import draw_generator, draw_guidance_scale, draw_noise, prompt_at
from diffusers_tbcm.evaluation.drawing import draw_pictures, has_learned_guidance, numbered_generators
from diffusers_tbcm.evaluation.evaluator import check_installed, seconds_per_image
from diffusers_tbcm.evaluation.features import MobileNetFeatures, pictures_to_tensor
from diffusers_tbcm.evaluation.grid import image_grid
from diffusers_tbcm.evaluation.judge import TeacherJudge
from diffusers_tbcm.evaluation.metrics import Estimate, decisiveness, mirror_products
from diffusers_tbcm.evaluation.reference import FeatureReference
from diffusers_tbcm.export.model_card import save_model_card
from diffusers_tbcm.export.record import Measurement, save_metrics
from diffusers_tbcm.files import read_json
from diffusers_tbcm.owned import OwnedFolder
from diffusers_tbcm.pipeline_folder import TRAINING_CONFIG, list_checkpoints
from diffusers_tbcm.training.interruption import RESUMABLE_EXIT_CODE


TRAINING_SCRIPT = Path(__file__).with_name("train_tbcm_distill.py")
TEACHER_DIR = Path(__file__).with_name("sana_emoji_mini")
PROMPTS_FILE = Path(__file__).with_name("quickstart_prompts.txt")
MAX_SEQUENCE_LENGTH = 48  # the prompts have at most some 30 tokens: padding to 300 changes nothing but the time
GUIDANCE_SCALE = 4.5
SEED = 1234
REFERENCE_SEED = 4321  # of the teacher's pictures that all are compared with
BATCH_SIZE = 50
TEACHER_STEPS = 20
STUDENT_STEPS = (1, 2, 4)
MEASURED_STEPS = {"teacher": (4, TEACHER_STEPS), "untrained student": STUDENT_STEPS, "student": STUDENT_STEPS}
GRID_COLUMNS = (
    ("teacher", TEACHER_STEPS), ("untrained student", 1), ("student", 1), ("student", 2), ("student", 4),
)  # fmt: skip
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
NOISES = 20  # pictures of each of the 24 prompts
EVALUATION_PROMPTS = 500
SHOWN = 12  # of the 24 prompts: the concepts by name
SEEN_PICTURES = 96
MIN_NOISES, MIN_PROMPTS = 3, 60  # a distance in 48 components takes more pictures than that

# Found on the embedded teacher with 2 CPU cores; README's recipe for real models is another.
STEPS = 440
SAMPLING = ["--no-stochastic_sampling", "--intermediate_timesteps", "1.0", "0.2", "0.05"]  # of few prompts
FULL_STEPS = 1000


def recipe(steps: int) -> dict[str, object]:
    """Of few prompts: many trajectories of each, first to their ends, then by the consistency loss at all times."""
    return {
        "train_batch_size": 6,
        "learning_rate": 5e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "replay_buffer_size": 960,
        "replay_steps": 2,
        "teacher_batch_size": 12,
        "endpoint_warmup_steps": 3 * steps // 4,
        "loss_weighting": "uniform",
        "tangent_warmup_steps": 0,
        "tangent_cooldown_start_step": -1,
    }


def full_recipe(steps: int) -> dict[str, object]:
    """Of all prompts: every trajectory is another, and its rows are drawn once."""
    return {
        "train_batch_size": 2,
        "learning_rate": 3e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "replay_buffer_size": 64,
        "teacher_batch_size": 16,
        "endpoint_warmup_steps": 7 * steps // 10,
        "endpoint_loss_type": "l2",  # as measured; of so many prompts the distance gives the same
        "tangent_warmup_steps": 0,
        "tangent_cooldown_start_step": 4 * steps // 5,
        "tangent_cooldown_steps": steps // 10,
    }


@dataclass(frozen=True)
class Task:
    """What students are trained on and what is drawn with them.

    Args:
        name: of the task.
        prompts_file: of the prompts to train on.
        prompts, concepts: of the pictures, in rounds of `round_size`: a round is what intervals are resampled by.
        round_size: pictures in a round.
    """

    name: str
    prompts_file: Path
    prompts: list[str]
    concepts: list[str]
    round_size: int

    @property
    def training(self) -> list[str]:
        return self.prompts_file.read_text(encoding="utf-8").splitlines()

    def judge(self, teacher: torch.Tensor) -> TeacherJudge:
        """What compares with the teacher's pictures, by their features."""
        real = FeatureReference.load(TEACHER_DIR / "reference_features.safetensors")
        return TeacherJudge(teacher, self.round_size, real=real, labels=self.concepts)


def few(noises: int = NOISES) -> Task:
    """Twelve concepts, by name and in one of two styles, each drawn from some noises."""
    prompts = PROMPTS_FILE.read_text(encoding="utf-8").splitlines()
    concepts = [prompt.split()[-1] for prompt in prompts]
    return Task("few", PROMPTS_FILE, prompts * noises, concepts * noises, len(prompts))


def many(count: int = EVALUATION_PROMPTS) -> Task:
    """All prompts of the teacher, and evaluation prompts, each drawn once."""
    lines = [json.loads(line) for line in (TEACHER_DIR / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [line for line in lines if not line["held_out"]][:count]
    prompts, concepts = [line["prompt"] for line in asked], [line["concept"] for line in asked]
    return Task("many", TEACHER_DIR / "prompts.txt", prompts, concepts, 1)


def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    steps: int,
    batch_size: int = BATCH_SIZE,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = SEED,
    **options: Any,
) -> list[Image.Image]:
    """One picture a prompt, from noise of the seed and the prompt's place only: the same for teacher and student."""
    size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    pipeline.set_progress_bar_config(disable=True)
    pictures = draw_pictures(
        pipeline,
        prompts,
        numbered_generators(seed),
        num_inference_steps=steps,
        batch_size=batch_size,
        guidance_scale=1.0 if has_learned_guidance(pipeline) else guidance_scale,
        height=size,
        width=size,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        complex_human_instruction=None,
        use_resolution_binning=False,
        **options,
    )
    return list(tqdm(pictures, total=len(prompts), desc=f"{type(pipeline).__name__}, {steps} steps", unit="picture"))


def training_command(output_dir: Path, steps: int, prompts_file: Path, **flags: object) -> list[str]:
    """The training script on the embedded teacher; without a launcher, which Ctrl-C would end before the script."""
    flags = {
        "pretrained_model_name_or_path": TEACHER_DIR,
        "prompts_file": prompts_file,
        "output_dir": output_dir,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "max_train_steps": steps,
        "max_grad_norm": 1.0,
        "ema_decay": 0.99,
        "checkpointing_steps": steps,
        "validation_steps": steps,
        "report_to": "tensorboard",
        "mixed_precision": "no",
        **flags,
    }
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    # The embedded teacher reads a prompt the same without the instruction, and on a CPU the instruction costs 100 ms.
    arguments += ["--use_ema", "--no-complex_human_instruction"]
    return [sys.executable, str(TRAINING_SCRIPT), *arguments]


def run_to_its_end(command: Sequence[str]) -> int:
    """The exit code of a command that answers Ctrl-C itself: the terminal sends it to both. A second one kills it.

    Raises:
        KeyboardInterrupt: when it has ended.
    """
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait()
        except KeyboardInterrupt:
            process.kill()
            process.wait()
        raise


def check_same_run(output_dir: Path, flags: Mapping[str, object]) -> None:
    """Refuse to go on with a run of other flags."""
    config = output_dir / TRAINING_CONFIG
    then = read_json(config).get("flags", {}) if config.is_file() else {}
    for name, value in flags.items():
        if then.get(name, value) != value:
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} holds a run with {name} {then[name]}, which is {value} now: name"
                " another `output_dir`"
            )


def train(
    output_dir: Path,
    steps: int,
    prompts_file: Path,
    flags: Mapping[str, object],
    sampling: Sequence[str],
    shown: Sequence[str],
) -> float | None:
    """Distil; gives the seconds. Where a run went on, its earlier ones are not known: None."""
    start = time.perf_counter()
    command = [*training_command(output_dir, steps, prompts_file, **flags), *sampling, "--validation_prompts", *shown]
    goes_on = bool(list_checkpoints(output_dir))
    if goes_on:
        check_same_run(output_dir, {"max_train_steps": steps, **flags})
        command += ["--resume_from_checkpoint", "latest"]
    if code := run_to_its_end(command):  # the script has said why
        if code == RESUMABLE_EXIT_CODE:
            print("The same command of the quickstart goes on.")
        sys.exit(code)
    return None if goes_on else time.perf_counter() - start


def load_controls(device: str, scheduler: TBCMScheduler | None = None) -> dict[str, DiffusionPipeline]:
    """The teacher, and the student before any training, drawn with a scheduler, the paper's by default."""
    teacher = SanaPipeline.from_pretrained(TEACHER_DIR).to(device)
    untrained = SanaTBCMPipeline(
        teacher.tokenizer,
        teacher.text_encoder,
        teacher.vae,
        make_student(teacher.transformer),
        scheduler or TBCMScheduler(),
    )
    return {"teacher": teacher, "untrained student": untrained}


def measure(models: Mapping[str, DiffusionPipeline], task: Task, extractor: MobileNetFeatures) -> list[Measurement]:
    """All models on the same unseen noises, against what the teacher draws from others."""
    reference = draw(models["teacher"], task.prompts, TEACHER_STEPS, seed=REFERENCE_SEED)
    judge = task.judge(extractor.extract(reference))
    assert judge.real is not None  # which the task has given it
    drawn = {
        (model, steps): draw(models[model], task.prompts, steps)
        for model, all_steps in MEASURED_STEPS.items()
        for steps in all_steps
    }
    teachers = pictures_to_tensor(drawn["teacher", TEACHER_STEPS])
    measurements = []
    for (model, steps), pictures in drawn.items():
        features = extractor.extract(pictures)
        estimates = {
            "FD to the teacher": judge.distance(features),
            "KD to the teacher": judge.kernel_distance(features),
        }
        rounded = {name: Estimate(*(round(value, 3) for value in estimates[name])) for name in estimates}
        metrics = {name: estimate.value for name, estimate in rounded.items()}
        metrics["decisiveness"] = round(decisiveness(mirror_products(pictures_to_tensor(pictures), teachers)), 3)
        metrics["top-5 retrieval"] = round(judge.retrieval(features), 3)
        metrics["FD to real pictures"] = round(judge.real.frechet_distance(features), 1)
        one = seconds_per_image(partial(draw, models[model], task.prompts[:1], steps), repeats=3)
        metrics["s / image"] = round(one, 3)
        intervals = {name: (estimate.low, estimate.high) for name, estimate in rounded.items()}
        measurements.append(Measurement(model, steps, metrics, intervals))
    return measurements


def seen_decisiveness(models: Mapping[str, DiffusionPipeline], task: Task, guidance_scales: Sequence[float]) -> float:
    """The student's decisiveness at 1 step from the first noises that it was trained on."""
    generators = [draw_generator(number, 0) for number in range(SEEN_PICTURES)]
    draw_guidance_scale(guidance_scales, generators)  # comes before the noise
    size = models["teacher"].transformer.config.sample_size
    channels = models["teacher"].transformer.config.in_channels
    noise = draw_noise((channels, size, size), generators)
    training = task.training
    prompts = [training[prompt_at(number, len(training), 0)] for number in range(SEEN_PICTURES)]
    student, teacher = (
        pictures_to_tensor(draw(models[model], prompts, steps, batch_size=SEEN_PICTURES, latents=noise))
        for model, steps in (("student", 1), ("teacher", TEACHER_STEPS))
    )
    return round(decisiveness(mirror_products(student, teacher)), 3)


def grid(models: Mapping[str, DiffusionPipeline], prompts: Sequence[str]) -> Image.Image:
    columns = [draw(models[model], [*prompts], steps) for model, steps in GRID_COLUMNS]
    labels = [f"{model.partition(' ')[0]}, {steps}" for model, steps in GRID_COLUMNS]
    return image_grid(list(zip(*columns, strict=True)), labels, prompts)


def distil_and_show(args: Namespace) -> None:
    """The three steps."""
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = MobileNetFeatures().to(device)  # with what else measuring takes, missed before training
    check_installed()
    if args.full:
        steps = args.max_train_steps or FULL_STEPS
        task, flags, sampling = many(args.prompts), full_recipe(steps), []
    else:
        steps = args.max_train_steps or STEPS
        task, flags, sampling = few(args.noises), recipe(steps), SAMPLING
    shown = GRID_PROMPTS if args.full else task.training[:SHOWN]

    # 1. Distil; the same command continues an interrupted run
    training_seconds = train(args.output_dir, steps, task.prompts_file, flags, sampling, shown)

    # 2. Measure
    student = SanaTBCMPipeline.from_pretrained(args.output_dir).to(device)
    models = load_controls(device, student.scheduler) | {"student": student}
    measurements = measure(models, task, extractor)
    seen = seen_decisiveness(models, task, student.scheduler.config.guidance_scales)

    # 3. Show
    with OwnedFolder(args.output_dir).written("grid.png") as partial_file:
        grid(models, shown).save(partial_file, format="PNG")
    measured = f"--prompts {args.prompts} --full" if args.full else f"--noises {args.noises}"
    times: dict[str, int | None] = {"training_seconds": None, "seconds": None}
    if training_seconds is not None:
        times = {"training_seconds": round(training_seconds), "seconds": round(time.perf_counter() - start)}
    save_metrics(
        args.output_dir,
        measurements,
        dataset=f"{len(task.prompts)} pictures of {len({*task.prompts})} prompts of the embedded emoji teacher",
        command=f"python examples/tbcm/quickstart.py --max_train_steps {steps} {measured}",
        details={
            "seed": SEED,
            "decisiveness at 1 step from noises of the training": seen,
            **times,
            "hardware": f"{device}, {torch.get_num_threads()} threads, {platform.machine()}",
            "torch": str(torch.__version__),
        },
    )
    save_model_card(args.output_dir)

    import pandas  # checked above

    rows = [{"model": each.model, "steps": each.num_inference_steps, **each.metrics} for each in measurements]
    print("\n" + pandas.DataFrame(rows).to_string(index=False, na_rep=""))
    print(f"{time.perf_counter() - start:.0f} s in all. Look at {args.output_dir / 'grid.png'}, then:\n")
    print("    from diffusers_tbcm import SanaTBCMPipeline")
    print(f'    pipe = SanaTBCMPipeline.from_pretrained("{args.output_dir}")')
    print(f'    pipe("{shown[0]}").images[0].save("dolphin.png")')


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--full", action="store_true", help="train on all 5,179 prompts")
    parser.add_argument("--max_train_steps", type=int, help=f"default: {STEPS}, with --full {FULL_STEPS}")
    parser.add_argument("--noises", type=int, default=NOISES, help="pictures of each of the 24 prompts")
    parser.add_argument("--prompts", type=int, default=EVALUATION_PROMPTS, help="with --full: a picture of each")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    args = parser.parse_args(argv)
    parser.check_at_least(1, max_train_steps=args.max_train_steps)
    parser.check_at_least(MIN_NOISES, noises=args.noises)
    parser.check_at_least(MIN_PROMPTS, prompts=args.prompts)
    with ending_in_words({"output_dir": "--output_dir"}, debug=args.debug):
        try:
            distil_and_show(args)
        except KeyboardInterrupt:
            print("Interrupted: the same command goes on.", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
