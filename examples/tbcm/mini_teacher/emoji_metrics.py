"""The evaluation prompts of the embedded teacher, and measures of pictures that the quickstart's `draw` makes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from diffusers_tbcm.evaluation.evaluator import FeatureReference, MobileNetFeatures

from ..quickstart import GUIDANCE_SCALE, MAX_SEQUENCE_LENGTH, SEED, TEACHER_DIR, draw


__all__ = ["GUIDANCE_SCALE", "MAX_SEQUENCE_LENGTH", "SEED", "TEACHER_DIR", "draw"]

EVALUATION_FILE = "evaluation.jsonl"
REFERENCE_FILE = "reference_features.safetensors"
DISTILLATION_PROMPTS_FILE = "prompts.txt"


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
