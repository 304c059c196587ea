"""Draw the evaluation prompts of the embedded teacher and measure what comes out: one code for teacher and student."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from diffusers_tbcm.evaluation.drawing import draw_pictures, has_learned_guidance, numbered_generators
from diffusers_tbcm.evaluation.evaluator import FeatureReference, MobileNetFeatures
from diffusers_tbcm.evaluation.judge import TeacherJudge


TEACHER_DIR = Path(__file__).parents[1] / "sana_emoji_mini"
EVALUATION_FILE = "evaluation.jsonl"
REFERENCE_FILE = "reference_features.safetensors"
DISTILLATION_PROMPTS_FILE = "prompts.txt"
FEW_PROMPTS_FILE = Path(__file__).parents[1] / "quickstart_prompts.txt"

GUIDANCE_SCALE = 4.5
MAX_SEQUENCE_LENGTH = 48  # the prompts have at most some 30 tokens: padding to 300 changes nothing but the time
SEED = 1234
TEACHER_STEPS = 20
REFERENCE_SEED = 4321  # of the teacher's pictures that all are compared with: other noises than SEED's
NOISES = 20  # pictures of each of the few prompts


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt, the concept it asks for, and whether that concept was kept from the teacher in that style."""

    prompt: str
    concept: str
    held_out: bool


def load_evaluation(folder: Path = TEACHER_DIR) -> list[EvaluationPrompt]:
    lines = (folder / EVALUATION_FILE).read_text(encoding="utf-8").splitlines()
    return [EvaluationPrompt(**json.loads(line)) for line in lines]


def save_evaluation(items: list[EvaluationPrompt], folder: Path) -> None:
    lines = [json.dumps(asdict(item), ensure_ascii=False) for item in items]
    (folder / EVALUATION_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    steps: int,
    batch_size: int = 50,
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


@dataclass(frozen=True)
class Task:
    """What students are trained on and what is drawn with them.

    Args:
        name: of its folder.
        training: prompts to train on.
        prompts, concepts: of the pictures, in rounds of `round_size`: a round is what intervals are resampled by.
        round_size: pictures in a round.
    """

    name: str
    training: list[str]
    prompts: list[str]
    concepts: list[str]
    round_size: int

    def judge(self, teacher: torch.Tensor) -> TeacherJudge:
        """What compares with the teacher's pictures, by their features."""
        real = FeatureReference.load(TEACHER_DIR / REFERENCE_FILE)
        return TeacherJudge(teacher, self.round_size, real=real, labels=self.concepts)


def few(noises: int = NOISES) -> Task:
    """Twelve concepts, by name and in one of two styles: 24 prompts."""
    prompts = FEW_PROMPTS_FILE.read_text(encoding="utf-8").splitlines()
    concepts = [prompt.split()[-1] for prompt in prompts]
    return Task("few", prompts, prompts * noises, concepts * noises, len(prompts))


def many(count: int = 500) -> Task:
    """All prompts of the teacher, measured on evaluation prompts."""
    training = (TEACHER_DIR / DISTILLATION_PROMPTS_FILE).read_text(encoding="utf-8").splitlines()
    items = [item for item in load_evaluation() if not item.held_out][:count]
    return Task("many", training, [item.prompt for item in items], [item.concept for item in items], 1)


class Meter:
    """MobileNet-FD against the training pictures, and top-5 retrieval of the prompted concept."""

    def __init__(self, folder: Path = TEACHER_DIR):
        self.features = MobileNetFeatures().to("cuda" if torch.cuda.is_available() else "cpu")
        self.reference = FeatureReference.load(folder / REFERENCE_FILE)

    def __call__(self, pictures: list[Image.Image], concepts: list[str]) -> dict[str, float]:
        features = self.features.extract(pictures)
        return {
            "MobileNet-FD": round(self.reference.frechet_distance(features), 1),
            "top-5 retrieval": round(self.reference.retrieval_at_k(features, concepts, k=5), 3),
        }
