"""Two models that train in turn on points of the plane: a critic in every step, then a student in every second one.

The script of a run in small: tests start it by itself, on several processes or on several nodes.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from diffusers_tbcm.draws import draw_generator, draw_noise
from diffusers_tbcm.matching import merge_critic
from diffusers_tbcm.rows import Recording
from diffusers_tbcm.text import Text
from diffusers_tbcm.training.interruption import StopRequest
from diffusers_tbcm.training.launch import launch
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import RunSettings, parse_settings, setting


@dataclass(kw_only=True)
class ToySettings(RunSettings):
    """toy"""

    dropped: float = setting(0.0, "share of the points that are dropped")


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))


def start(settings: ToySettings, stop: StopRequest) -> tuple[Run, nn.Module, nn.Module]:
    """A run with both models."""
    run = Run(settings, stop, script=__file__, num_models=2)
    run.open_folder()
    student = run.add(
        "student", Net(), every=2, lr_scheduler=settings.lr_scheduler, ema=settings.use_ema, learning_rate=1e-2
    )
    critic = run.add("critic", Net(), learning_rate=2e-2)
    return run, student, critic


def record_points(settings: ToySettings, run: Run, draws: list[int]) -> tuple[Recording, torch.Tensor]:
    generators = [draw_generator(draw, settings.seed) for draw in draws]
    points = draw_noise((2,), generators, device=run.device)
    recording = Recording(
        latents=points.unsqueeze(1),
        velocity=torch.zeros_like(points).unsqueeze(1),
        timesteps=torch.ones(len(draws), 1, device=run.device),
        pred_original_sample=points,
        text=Text.unmasked(torch.zeros(len(draws), 1, 1, device=run.device)),
        guidance_scale=torch.ones(len(draws), device=run.device),
    )
    keep = torch.stack([torch.rand((), generator=generator) >= settings.dropped for generator in generators])
    return recording, keep


def train(settings: ToySettings, stop: StopRequest) -> Run:
    run, student, critic = start(settings, stop)
    batches = run.batches(
        lambda draws: record_points(settings, run, draws),
        rows_per_prompt=1,
        num_prompts=16,
        drops=settings.dropped > 0,
        ahead=0,
    )
    for batch in batches:
        for rows in batch:
            noise = draw_noise((2,), run.generators(len(rows), stream=2), device=run.device)
            with torch.no_grad():
                fake = student(rows.latents)
            run.backward((critic(fake + noise) - fake).square().mean(), critic)
        run.update(critic, then=partial(merge_critic, critic, student, 0.01))
        if run.due(student):
            for rows in batch:  # towards twice the point, and what the critic makes of it
                fake = student(rows.latents)
                with torch.no_grad():
                    judged = critic(fake)
                target = 2 * rows.latents + 0.1 * (judged - fake.detach())
                run.backward((fake - target).square().mean(), student)
            run.update(student)
    return run


if __name__ == "__main__":
    launch(train, parse_settings(ToySettings))
    threads = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    if left := [name for name in threads if "gloo" in name]:  # an interpreter that ends under them may abort
        sys.exit(f"The process group's threads are left: {left}")
