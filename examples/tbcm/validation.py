"""The validation prompts, drawn by a student at 1, 2 and 4 steps from noise that the seed fixes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.data.embeddings import EmbeddingCache, PromptEncoder
from diffusers_tbcm.data.prompts import draw_generator
from diffusers_tbcm.evaluation.evaluator import image_grid
from diffusers_tbcm.export.folders import Sample
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
    columns = [
        pipeline(
            prompt_embeds=text.embeds,
            prompt_attention_mask=text.mask,
            num_inference_steps=steps,
            generator=[draw_generator(index, seed) for index in range(len(prompts))],
            height=resolution,
            width=resolution,
        ).images
        for steps in STEPS
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
