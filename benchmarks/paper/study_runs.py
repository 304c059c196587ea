"""One run of the study: a student is trained by a script of examples/tbcm, and measured; what is done stays done."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from common import EMBEDDED_TEACHER, EXAMPLES, default_device, machine
from diffusers import DiffusionPipeline, SanaPipeline
from emoji_metrics import DISTILLATION_PROMPTS_FILE, MAX_SEQUENCE_LENGTH, REFERENCE_FILE, draw, load_evaluation

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.checkpoints import list_checkpoints
from diffusers_tbcm.evaluation import Evaluator, FeatureReference, MobileNetFeatures
from diffusers_tbcm.pipeline_folder import read_json, write_json
from diffusers_tbcm.text_image import HeadScorer
from diffusers_tbcm.trigflow import make_student


Flags = Mapping[str, Any]

# A float of a flag that counts steps is a share of the run.
COMMON_FLAGS: Flags = {
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
    "no-complex_human_instruction": True,
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 0.05,
    "max_grad_norm": 1.0,
    "use_ema": True,
    "ema_decay": 0.99,
    "checkpointing_steps": 100,
    "checkpoints_total_limit": 1,
    "logging_steps": 16,  # the teacher's batches of TBCM's runs are spread evenly over these
    "report_to": "none",
}
ROWS_PER_STEP = 30
METHOD_FLAGS: Mapping[str, Flags] = {
    "tbcm": {  # the tangent's schedule is the reference's, in its proportions
        "train_batch_size": 2,
        "teacher_batch_size": 16,
        "tangent_warmup_steps": 0.2,
        "tangent_cooldown_start_step": 0.75,
        "tangent_cooldown_steps": 0.1,
    },
    "scm": {"train_batch_size": ROWS_PER_STEP, "tangent_warmup_steps": 0.2},
    "sana_sprint": {"train_batch_size": ROWS_PER_STEP, "tangent_warmup_steps": 0.2},
    "lcm": {"train_batch_size": ROWS_PER_STEP},
}
SCRIPTS = {method: f"train_{method}.py" for method in METHOD_FLAGS} | {"tbcm": "train_tbcm_distill.py"}
STUDENT_STEPS = (1, 2, 4)
TEACHER_STEPS = 20
DIVERSITY_PROMPTS, DIVERSITY_PICTURES = 50, 4
LATENTS = "latents"
FLAGS_FILE, TRAINING_FILE = "study_flags.json", "study_training.json"


@dataclass(frozen=True)
class Setting:
    """What is trained, and the flags in which it differs from its method's others."""

    method: str = "tbcm"
    flags: Flags = field(default_factory=dict)

    @property
    def needs_pictures(self) -> bool:
        return self.method != "tbcm"

    def run_name(self, steps: int, seed: int) -> str:
        changes = [f"{name}={value}" for name, value in self.flags.items()]
        return "-".join([self.method, *changes, f"{steps}_steps", f"seed_{seed}"])

    def all_flags(self, steps: int, seed: int) -> dict[str, Any]:
        """Every flag of a run but those that name files."""
        flags = {**COMMON_FLAGS, **METHOD_FLAGS[self.method], **self.flags, "max_train_steps": steps, "seed": seed}
        for name, value in flags.items():
            if isinstance(value, float) and name.endswith(("_step", "_steps")):
                flags[name] = round(value * steps)
        return flags


def training_arguments(flags: Flags, method: str, folder: Path, train_data_dir: Path | None) -> list[str]:
    """The command line of a method's script; a run that was interrupted goes on."""
    files: dict[str, Any] = {"pretrained_model_name_or_path": EMBEDDED_TEACHER, "output_dir": folder}
    if train_data_dir is None:
        files["prompts_file"] = EMBEDDED_TEACHER / DISTILLATION_PROMPTS_FILE
    else:
        files |= {"train_data_dir": train_data_dir, "latents_cache": folder.parent / LATENTS}
    arguments = []
    for name, value in {**files, **flags, "resume_from_checkpoint": "latest"}.items():
        if value is not False:
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return arguments


def train(setting: Setting, steps: int, seed: int, work_dir: Path, train_data_dir: Path | None) -> dict[str, Any]:
    """Train a student, unless that has been done.

    Returns:
        Its time a row and peak memory, as the training script logged them, and the machine.

    Raises:
        ValueError: where the run's folder holds one with other flags.
    """
    folder = work_dir / setting.run_name(steps, seed)
    folder.mkdir(parents=True, exist_ok=True)
    flags = setting.all_flags(steps, seed)
    if not (folder / FLAGS_FILE).exists():
        write_json(folder / FLAGS_FILE, flags)
    elif read_json(folder / FLAGS_FILE) != flags:
        raise ValueError(f"work_dir {str(work_dir)!r} holds a {folder.name} with other flags: choose another folder")
    if (folder / TRAINING_FILE).exists():
        return read_json(folder / TRAINING_FILE)
    pictures = train_data_dir if setting.needs_pictures else None
    arguments = training_arguments(flags, setting.method, folder, pictures)
    subprocess.run([sys.executable, str(EXAMPLES / SCRIPTS[setting.method]), *arguments], check=True)
    record = training_costs(folder / "metrics.jsonl") | {"machine": machine(default_device())}
    write_json(folder / TRAINING_FILE, record)
    for checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    return record


def training_costs(log: Path) -> dict[str, float]:
    """Milliseconds a row, the median of the logged ones after the first, which warms up; the most memory."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rates = [line["rows_per_second"] for line in lines]
    return {
        "ms / row": round(1000 / median(rates[1:] or rates), 3),
        "peak memory (GiB)": round(max(line["peak_memory_gib"] for line in lines), 3),
        "filtered share": round(lines[-1]["filtered_share"], 4),
    }


@cache
def evaluators() -> tuple[Evaluator, Evaluator]:
    """For pictures against the teacher's training pictures and their prompts; for several pictures a prompt."""
    device = default_device()
    extractor = MobileNetFeatures().to(device)
    reference = FeatureReference.load(EMBEDDED_TEACHER / REFERENCE_FILE)
    return Evaluator(extractor, reference, HeadScorer(EMBEDDED_TEACHER, device)), Evaluator(extractor)


def measure(
    make_pipeline: Callable[[], DiffusionPipeline], all_steps: Sequence[int], prompts: int, folder: Path
) -> list[dict[str, Any]]:
    """Draw with a pipeline and measure its pictures, unless that has been done.

    Returns:
        For each number of steps: `inference steps`, every metric by name, and `intervals`, 95% over prompts.
    """
    file = folder / f"study_measured_{prompts}_prompts.json"
    if file.exists():
        return read_json(file)["rows"]
    items = [item for item in load_evaluation() if not item.held_out][:prompts]
    texts, concepts = [item.prompt for item in items], [item.concept for item in items]
    repeated = [text for text in texts[:DIVERSITY_PROMPTS] for _ in range(DIVERSITY_PICTURES)]
    pipeline = make_pipeline().to(default_device())
    quality, diversity = evaluators()
    rows = []
    for steps in all_steps:
        found = quality(folder.name, steps, draw(pipeline, texts, steps), texts, concepts)
        spread = diversity(folder.name, steps, draw(pipeline, repeated, steps), texts[:DIVERSITY_PROMPTS])
        metrics = {**found.metrics, **spread.metrics}
        rows.append({"inference steps": steps, **metrics, "intervals": {**found.intervals, **spread.intervals}})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"rows": rows})
    return rows


def measure_student(folder: Path, prompts: int) -> list[dict[str, Any]]:
    return measure(lambda: SanaTBCMPipeline.from_pretrained(folder), STUDENT_STEPS, prompts, folder)


def measure_teacher(work_dir: Path, prompts: int) -> dict[str, list[dict[str, Any]]]:
    """What students lie between: the teacher, and a student as it is before training."""

    def untrained() -> SanaTBCMPipeline:
        teacher = SanaPipeline.from_pretrained(EMBEDDED_TEACHER)
        parts = (teacher.tokenizer, teacher.text_encoder, teacher.vae)
        return SanaTBCMPipeline(*parts, make_student(teacher.transformer), TBCMScheduler())

    return {
        "teacher": measure(
            lambda: SanaPipeline.from_pretrained(EMBEDDED_TEACHER), (TEACHER_STEPS,), prompts, work_dir / "teacher"
        ),
        "untrained student": measure(untrained, STUDENT_STEPS, prompts, work_dir / "untrained"),
    }
