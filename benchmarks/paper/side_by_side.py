"""Figure 6: what the teacher and its students draw from the same noise."""

import argparse
from typing import Any

import torch
from diffusers import SanaPipeline

from diffusers_tbcm.evaluation.drawing import load_pipeline
from diffusers_tbcm.evaluation.grid import image_grid
from examples.tbcm.mini_teacher.emoji_metrics import GUIDANCE_SCALE, TEACHER_DIR, draw

from .teacher_trajectories import CELL_SIZE


TEACHER_STEPS = (20, 1)
SHOWN_PROMPTS = (
    "a fluent 3d emoji of a dolphin",
    "noto violin",
    "a fluent 3d emoji of a volcano",
    "a noto emoji of a strawberry",
    "fluent 3d rocket",
    "noto sunflower",
    "an emoji of an owl",
    "hamburger",
)


def draw_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """Figure 6: one row a prompt, one column a model and number of steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = SanaPipeline.from_pretrained(TEACHER_DIR).to(device)
    columns = {f"teacher, {steps}": draw(teacher, list(SHOWN_PROMPTS), steps) for steps in TEACHER_STEPS}
    for student in args.students:
        name, _, folder = student.rpartition("=")
        pipeline = load_pipeline(folder, device=device)
        for steps in args.steps:
            columns[f"{name or folder}, {steps}"] = draw(pipeline, list(SHOWN_PROMPTS), steps)
    grid = image_grid(list(zip(*columns.values(), strict=True)), list(columns), SHOWN_PROMPTS, CELL_SIZE)
    grid.save(args.output_dir / "figure_6_pictures.png")
    return {"columns: model, steps": list(columns), "prompts": SHOWN_PROMPTS, "guidance_scale": GUIDANCE_SCALE}
