"""The validation prompts, drawn by a student at 1, 2 and 4 steps from noise that the seed fixes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.data.embeddings import EmbeddingCache, PromptEncoder
from diffusers_tbcm.evaluation.drawing import draw_pictures, numbered_generators
from diffusers_tbcm.evaluation.grid import image_grid
from diffusers_tbcm.export.record import Sample
from diffusers_tbcm.training.tracking import MetricsLog


STEPS = (1, 2, 4)


@torch.no_grad()
def validate(
    student: SanaTransformer2DModel,
    *,
    step: int,
    prompts: Sequence[str],
    encoder: PromptEncoder | EmbeddingCache,
    teacher_folder: Path,
    scheduler: TBCMScheduler,
    resolution: int | None,
    seed: int,
    folder: Path,
    log: MetricsLog,
) -> list[Sample]:
    """Draw the prompts, show them as a labelled grid to the log and in `folder`, and give the single pictures."""
    vae = AutoencoderDC.from_pretrained(teacher_folder, subfolder="vae").to(student.device)
    pipeline = SanaTBCMPipeline(None, None, vae, student, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    text = encoder(prompts)
    size = {"height": resolution, "width": resolution}
    columns = [
        draw_pictures(pipeline, text, numbered_generators(seed), num_inference_steps=steps, **size) for steps in STEPS
    ]
    rows = list(zip(*columns, strict=True))
    grid = image_grid(rows, [f"{steps} step{'s' * (steps > 1)}" for steps in STEPS], prompts)
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"step-{step}.png")
    log.image("validation", grid, step)
    return [
        Sample(prompt, steps, image)
        for prompt, row in zip(prompts, rows, strict=True)
        for steps, image in zip(STEPS, row, strict=True)
    ]
