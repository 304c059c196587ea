"""Drawing what is to be measured: every prompt with one pipeline at several numbers of steps, by all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from .drawing import draw_pictures, numbered_generators
from .evaluator import seconds_per_image
from .picture_folder import PictureFolder, pipeline_digests


TIMED_CALLS = 3


@dataclass(frozen=True)
class Drawn:
    """The pictures of a model at a number of steps, and the seconds that one takes."""

    model: str
    steps: int
    pictures: PictureFolder
    seconds: float


def draw_runs(
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    runs: Sequence[tuple[str, int, int]],
    prompts: Sequence[str],
    folder: Path,
    *,
    pictures_per_prompt: int,
    batch_size: int,
    options: Mapping[str, Any],
) -> list[Drawn]:
    """Draw what is missing of some runs; every process calls this.

    Args:
        accelerator: of the processes.
        pipeline: of a known family.
        runs: what to call each, its number of steps and its seed.
        prompts: what to draw.
        folder: that holds a folder for each run.
        pictures_per_prompt: how many.
        batch_size: pictures at a time, in each process.
        options: further arguments of the pipeline's call, each a JSON value.

    Returns:
        The runs, in order; seconds are measured in the main process, and 0 in others.

    Raises:
        ValueError: where a run's folder holds pictures of another one, before any is drawn.
    """
    described = {**options, **pipeline_digests(pipeline)}
    # As the folders of earlier versions have it
    described["instruction"] = bool(described.pop("complex_human_instruction", None))
    folders = []
    for model, steps, seed in runs:
        with accelerator.main_process_first():
            settings = {**described, "num_inference_steps": steps, "seed": seed}
            folders.append(PictureFolder(folder / f"{model}-{steps}-steps", prompts, pictures_per_prompt, settings))
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for (model, steps, seed), pictures in zip(runs, folders, strict=True):
        missing = pictures.missing()
        accelerator.wait_for_everyone()  # nobody draws before all have looked
        with accelerator.split_between_processes(missing) as mine:
            pictures.draw(
                pipeline,
                mine,
                num_inference_steps=steps,
                seed=seed,
                batch_size=batch_size,
                progress=accelerator.is_main_process,
                **options,
            )
        accelerator.wait_for_everyone()

        def draw_one(steps: int = steps, seed: int = seed) -> list[Image.Image]:
            generators = numbered_generators(seed)
            return list(draw_pictures(pipeline, prompts[:1], generators, num_inference_steps=steps, **options))

        seconds = seconds_per_image(draw_one, TIMED_CALLS) if accelerator.is_main_process else 0.0
        drawn.append(Drawn(model, steps, pictures, seconds))
    return drawn
