"""One run of the study: a student is trained by a script of examples/tbcm, and measured; what is done stays done."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import median, median_low
from typing import Any

import torch
from diffusers import DiffusionPipeline, SanaPipeline
from safetensors.torch import load_file, save_file

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.evaluation.evaluator import Evaluator, FeatureReference, MobileNetFeatures
from diffusers_tbcm.evaluation.metrics import fit_gaussian, symmetric_root
from diffusers_tbcm.evaluation.text_image import HEAD_FILE, HeadScorer
from diffusers_tbcm.files import read_json, write_json
from diffusers_tbcm.owned import OwnedFolder
from diffusers_tbcm.pipeline_folder import list_checkpoints
from diffusers_tbcm.training.checkpoints import AVERAGES
from examples.tbcm.mini_teacher.emoji_metrics import (
    DISTILLATION_PROMPTS_FILE,
    GUIDANCE_SCALE,
    MAX_SEQUENCE_LENGTH,
    REFERENCE_FILE,
    draw,
    load_evaluation,
)

from ..common import EXAMPLES, default_device, machine


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
    "sana_sprint": {
        "train_batch_size": ROWS_PER_STEP,
        "tangent_warmup_steps": 0.2,
        "discriminator_learning_rate": 5e-3,
    },
    "lcm": {"train_batch_size": ROWS_PER_STEP},
}
SCRIPTS = {method: EXAMPLES / f"train_{method}.py" for method in METHOD_FLAGS}
SCRIPTS["tbcm"] = EXAMPLES / "train_tbcm_distill.py"
VARIANTS_MODULE = "benchmarks.paper.tbcm_variants"
STUDENT_STEPS = (1, 2, 4)
TEACHER_STEPS = 20
DIVERSITY_PROMPTS, DIVERSITY_PICTURES = 50, 4
LATENTS, UNTRAINED = "latents", "untrained"
TEACHER_FILE, FLAGS_FILE, TRAINING_FILE = "study_teacher.json", "study_flags.json", "study_training.json"


@dataclass(frozen=True)
class Setting:
    """What is trained, and the flags in which it differs from its method's others.

    Args:
        method: of `METHOD_FLAGS`.
        flags: of the method's script.
        variant: of `tbcm_variants`; empty for none.
        common: flags of all settings of a study, which no run's name tells.
    """

    method: str = "tbcm"
    flags: Flags = field(default_factory=dict)
    variant: str = ""
    common: Flags = field(default_factory=dict)

    @property
    def needs_pictures(self) -> bool:
        return self.method != "tbcm"

    @property
    def guidance_scale(self) -> float:
        """What the student is drawn with: the one in the middle of those that it is trained with."""
        return median_low(self.flags.get("guidance_scales", [GUIDANCE_SCALE]))

    @property
    def script(self) -> list[str]:
        return ["-m", VARIANTS_MODULE, self.variant] if self.variant else [str(SCRIPTS[self.method])]

    def run_name(self, steps: int, seed: int) -> str:
        changes = [
            f"{name}={'_'.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in self.flags.items()
        ]
        parts = [self.method, self.variant, *changes, f"{steps}_steps", f"seed_{seed}"]
        return "-".join(part for part in parts if part)

    def all_flags(self, steps: int, seed: int) -> dict[str, Any]:
        """Every flag of a run but those that name files."""
        flags = {**COMMON_FLAGS, **METHOD_FLAGS[self.method], **self.common, **self.flags}
        flags |= {"max_train_steps": steps, "seed": seed}
        for name, value in flags.items():
            if isinstance(value, float) and name.endswith(("_step", "_steps")):
                flags[name] = round(value * steps)
        return flags


@dataclass(frozen=True)
class Study:
    """What all runs have in common.

    Args:
        teacher: its pipeline's folder, with prompts, evaluation prompts and reference features as the embedded one's.
        work_dir: of the runs.
        prompts: how many of the evaluation prompts are drawn.
        train_data_dir: pictures for the methods that train on them.
        prompts_file: for the others; by default the teacher's.

    Raises:
        ValueError: where `work_dir` holds runs of another teacher.
    """

    teacher: Path
    work_dir: Path
    prompts: int
    train_data_dir: Path | None = None
    prompts_file: Path | None = None

    def __post_init__(self) -> None:
        self.work_dir.mkdir(parents=True, exist_ok=True)
        file, name = self.work_dir / TEACHER_FILE, {"teacher": self.teacher.name}
        if not file.exists():
            write_json(file, name)
        elif read_json(file) != name:
            raise ValueError(f"work_dir {str(self.work_dir)!r} holds runs of another teacher: choose another folder")

    def run_folder(self, setting: Setting, steps: int, seed: int) -> Path:
        return self.work_dir / setting.run_name(steps, seed)

    def training_arguments(self, setting: Setting, steps: int, seed: int) -> list[str]:
        """The command line of a method's script; a run that was interrupted goes on."""
        files: dict[str, Any] = {
            "pretrained_model_name_or_path": self.teacher,
            "output_dir": self.run_folder(setting, steps, seed),
        }
        if setting.needs_pictures:
            files |= {"train_data_dir": self.train_data_dir, "latents_cache": self.work_dir / LATENTS}
        else:
            files["prompts_file"] = self.prompts_file or self.teacher / DISTILLATION_PROMPTS_FILE
        arguments = []
        resume = "latest" if list_checkpoints(files["output_dir"]) else False
        for name, value in {**files, **setting.all_flags(steps, seed), "resume_from_checkpoint": resume}.items():
            if value is not False:
                values = [] if value is True else value if isinstance(value, list) else [value]
                arguments += [f"--{name}", *map(str, values)]
        return arguments

    def train(self, setting: Setting, steps: int, seed: int) -> dict[str, Any]:
        """Train a student, unless that has been done; only a limited number of checkpoints is deleted afterwards.

        Returns:
            Its time a row and peak memory, as the training script logged them, and the machine.

        Raises:
            ValueError: where the run's folder holds one with other flags.
        """
        folder = self.run_folder(setting, steps, seed)
        flags = setting.all_flags(steps, seed)
        if not (folder / FLAGS_FILE).exists():
            OwnedFolder(folder, "work_dir").claim()
            write_json(folder / FLAGS_FILE, flags)
        elif read_json(folder / FLAGS_FILE) != flags:
            raise ValueError(
                f"work_dir {str(self.work_dir)!r} holds a {folder.name} with other flags: choose another folder"
            )
        if (folder / TRAINING_FILE).exists():
            return read_json(folder / TRAINING_FILE)
        command = [sys.executable, *setting.script, *self.training_arguments(setting, steps, seed)]
        subprocess.run(command, check=True)
        record = training_costs(folder / "metrics.jsonl") | {"machine": machine(default_device())}
        write_json(folder / TRAINING_FILE, record)
        if flags["checkpoints_total_limit"]:
            for checkpoint in list_checkpoints(folder):
                shutil.rmtree(checkpoint)
        return record

    def measure_student(self, setting: Setting, steps: int, seed: int) -> list[dict[str, Any]]:
        folder = self.run_folder(setting, steps, seed)
        load = partial(SanaTBCMPipeline.from_pretrained, folder)
        return self.measure(load, STUDENT_STEPS, folder, setting.guidance_scale)

    def student_features(self, setting: Setting, steps: int, seed: int) -> torch.Tensor:
        folder = self.run_folder(setting, steps, seed)
        return self.features(partial(SanaTBCMPipeline.from_pretrained, folder), folder)

    def untrained_features(self) -> torch.Tensor:
        return self.features(self.untrained, self.work_dir / UNTRAINED)

    def measure_checkpoints(self, setting: Setting, steps: int, seed: int) -> list[dict[str, Any]]:
        """Measure the averaged weights of every checkpoint that a run has kept, at one step; with `after steps`."""
        folder = self.run_folder(setting, steps, seed)

        def averaged(checkpoint: Path) -> SanaTBCMPipeline:
            pipeline = SanaTBCMPipeline.from_pretrained(folder)
            parameters = dict(pipeline.transformer.named_parameters())
            with torch.no_grad():
                for name, weight in load_file(checkpoint / AVERAGES).items():
                    parameters.pop(name.removeprefix("student.")).copy_(weight)
            assert not parameters
            return pipeline

        rows = []
        for checkpoint in list_checkpoints(folder):
            (row,) = self.measure(partial(averaged, checkpoint), STUDENT_STEPS[:1], checkpoint, setting.guidance_scale)
            rows.append({"after steps": int(checkpoint.name.rpartition("-")[2]), **row})
        return rows

    def measure_teacher(self, guidance_scales: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
        """What students lie between: the teacher at each guidance scale, and a student as it is before training."""
        teacher = partial(SanaPipeline.from_pretrained, self.teacher)
        found = {"untrained student": self.measure(self.untrained, STUDENT_STEPS, self.work_dir / UNTRAINED)}
        for scale in guidance_scales:
            name = "teacher" if scale == GUIDANCE_SCALE else f"teacher, guidance {scale:g}"
            found[name] = self.measure(teacher, (TEACHER_STEPS,), self.work_dir / name.replace(", ", "-"), scale)
        return found

    def untrained(self) -> SanaTBCMPipeline:
        teacher = SanaPipeline.from_pretrained(self.teacher)
        parts = (teacher.tokenizer, teacher.text_encoder, teacher.vae)
        return SanaTBCMPipeline(*parts, make_student(teacher.transformer), TBCMScheduler())

    @cached_property
    def evaluation(self) -> tuple[list[str], list[str]]:
        """The evaluation prompts and the concepts that they ask for."""
        items = [item for item in load_evaluation(self.teacher) if not item.held_out][: self.prompts]
        return [item.prompt for item in items], [item.concept for item in items]

    def features(
        self, make_pipeline: Callable[[], DiffusionPipeline], folder: Path, steps: int = STUDENT_STEPS[0]
    ) -> torch.Tensor:
        """What the Frechet distance sees of a picture of every prompt: (prompts, components)."""
        file = folder / f"study_features_{self.prompts}_prompts.safetensors"
        if not file.exists():
            quality, _ = evaluators(self.teacher)
            assert quality.reference is not None
            pictures = draw(make_pipeline().to(default_device()), self.evaluation[0], steps)
            projected = quality.reference.project(quality.extractor.extract(pictures))
            save_file({"features": projected.contiguous()}, file)
        return load_file(file)["features"]

    @cached_property
    def references(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The Gaussians, for `metrics.frechet_distance`, of the teacher's training pictures and of its own."""
        teacher = partial(SanaPipeline.from_pretrained, self.teacher)
        mean, covariance = fit_gaussian(self.features(teacher, self.work_dir / "teacher", TEACHER_STEPS))
        quality, _ = evaluators(self.teacher)
        assert quality.reference is not None
        return {"FD": quality.reference.gaussian, "FD to the teacher": (mean, symmetric_root(covariance))}

    def measure(
        self,
        make_pipeline: Callable[[], DiffusionPipeline],
        all_steps: Sequence[int],
        folder: Path,
        guidance_scale: float = GUIDANCE_SCALE,
    ) -> list[dict[str, Any]]:
        """Draw with a pipeline and measure its pictures, unless that has been done.

        Returns:
            For each number of steps: `inference steps`, every metric by name, and `intervals`, 95% over prompts.
        """
        file = folder / f"study_measured_{self.prompts}_prompts.json"
        if file.exists():
            return read_json(file)["rows"]
        texts, concepts = self.evaluation
        repeated = [text for text in texts[:DIVERSITY_PROMPTS] for _ in range(DIVERSITY_PICTURES)]
        pipeline = make_pipeline().to(default_device())
        quality, diversity = evaluators(self.teacher)
        rows = []
        for steps in all_steps:
            pictures, several = (
                draw(pipeline, prompts, steps, guidance_scale=guidance_scale) for prompts in (texts, repeated)
            )
            found = quality(folder.name, steps, pictures, texts, concepts)
            spread = diversity(folder.name, steps, several, texts[:DIVERSITY_PROMPTS])
            metrics = {**found.metrics, **spread.metrics}
            rows.append({"inference steps": steps, **metrics, "intervals": {**found.intervals, **spread.intervals}})
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"rows": rows})
        return rows


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
def evaluators(teacher: Path) -> tuple[Evaluator, Evaluator]:
    """For pictures against the teacher's training pictures and their prompts; for several pictures a prompt."""
    device = default_device()
    extractor = MobileNetFeatures().to(device)
    scorers = [HeadScorer(teacher, device)] if (teacher / HEAD_FILE).exists() else []
    return Evaluator(extractor, FeatureReference.load(teacher / REFERENCE_FILE), scorers), Evaluator(extractor)
