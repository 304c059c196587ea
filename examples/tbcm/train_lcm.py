#!/usr/bin/env python
r"""Distil a Sana pipeline with discrete consistency (LCM, arXiv 2310.04378), for comparison with TBCM.

    accelerate launch examples/tbcm/train_lcm.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers \
        --train_data_dir pictures --output_dir outputs/lcm-sana-0.6b --mixed_precision bf16

A row is the latent of a picture, noised to a time of the teacher's ODE solver; the student's prediction there is to
agree with its own prediction one step of that solver later. The steps are those of train_tbcm_distill.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from diffusers_tbcm.data.pictures import CaptionedImages
from diffusers_tbcm.diffusion import diffusion_rows
from diffusers_tbcm.discrete import (
    HUBER_CONSTANT,
    LOSS_TYPES,
    discrete_loss,
    discrete_target,
    neighbouring_timesteps,
)
from diffusers_tbcm.draws import draw_generator, draw_guidance_scale, draw_noise, prompt_at
from diffusers_tbcm.rows import Recording
from diffusers_tbcm.training.consistency import ConsistencyDistillation
from diffusers_tbcm.training.interruption import StopRequest
from diffusers_tbcm.training.launch import launch
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import PictureSettings, check_positive, parse_settings, setting
from diffusers_tbcm.training.stream import Record
from diffusers_tbcm.trajectory import reference_route
from diffusers_tbcm.transfer import to_device
from diffusers_tbcm.trigflow import SIGMA_DATA


METHOD = "LCM (arXiv 2310.04378)"  # on the model card


@dataclass(kw_only=True)
class LCMSettings(PictureSettings):
    """grid, loss"""

    num_ddim_timesteps: int = setting(50, "steps of the teacher's ODE solver")
    flow_shift: float = setting(2.5, "of the grid")
    loss_type: str = setting("huber", "of the two predictions' distance", choices=LOSS_TYPES)
    huber_c: float = setting(HUBER_CONSTANT, "of the pseudo-Huber loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_ddim_timesteps", "flow_shift", "huber_c")

    def describe(self) -> dict[str, object]:
        """What the model card says of the method's own settings."""
        return {
            "grid": f"{self.num_ddim_timesteps} steps, shift {self.flow_shift}",
            "loss": f"huber, c {self.huber_c:g}" if self.loss_type == "huber" else self.loss_type,
            **super().describe(),
        }


def noise_pictures(
    settings: LCMSettings, run: Run, distillation: ConsistencyDistillation, images: CaptionedImages
) -> Record:
    """Steps 1 to 3, as a function of the draws to make rows of."""
    latents = distillation.cache_latents(images, settings.latents_cache)
    route = reference_route(settings.num_ddim_timesteps, settings.flow_shift)

    def record(draws: list[int]) -> tuple[Recording, torch.Tensor]:
        """Noise the pictures of some draws; one row each, and all are kept."""
        # 1. Pictures, one of their captions; everything random of a draw depends on its number and the seed alone
        generators = [draw_generator(draw, settings.seed) for draw in draws]
        pictures = [prompt_at(draw, len(images), settings.seed) for draw in draws]
        text = distillation.encode(list(map(images.pick_caption, pictures, generators)))
        guidance_scale = draw_guidance_scale(settings.guidance_scales, generators, device=run.device)
        noise = draw_noise(distillation.latent_shape, generators, device=run.device)

        # 2. Times of the grid
        timesteps, _ = neighbouring_timesteps(route, len(draws), generator=generators)

        # 3. x_t = cos(t) x_0 + sin(t) sigma_data e, and the teacher's dx_t/dt there
        recording = diffusion_rows(
            distillation.teacher,
            to_device(latents(pictures), run.device),
            noise,
            to_device(timesteps, run.device),
            text,
            distillation.negative_text,
            guidance_scale,
        )
        return recording, torch.ones(len(draws), dtype=torch.bool)

    return record


def train(settings: LCMSettings, stop: StopRequest) -> Run:
    """LCM's distillation, from `resume_from_checkpoint` to `max_train_steps` or until asked to stop."""
    run = Run(settings, stop, script=__file__)
    images = settings.load_pictures()
    run.say(images)
    distillation = ConsistencyDistillation(run, settings, images.prompts, method=METHOD)
    student = distillation.add_student(rows_per_prompt=1)
    route = reference_route(settings.num_ddim_timesteps, settings.flow_shift)
    grid = torch.cat([route, route.new_zeros(1)]).to(run.device)
    batches = run.batches(
        noise_pictures(settings, run, distillation, images),
        rows_per_prompt=1,
        num_prompts=len(images),
        recorded_at_once=settings.teacher_batch_size,
        buffer_size=settings.replay_buffer_size,
        replay_steps=settings.replay_steps,
    )
    for batch in batches:
        for rows in batch:
            # 5. The student at both ends of an interval, at the earlier one without gradient
            next_timesteps = grid.expand(len(rows), -1).where(grid < rows.timesteps.unsqueeze(1), 0).amax(1)
            predict = partial(student, **distillation.condition(rows))
            target = discrete_target(first_of(predict), rows, next_timesteps)
            trig_output, logvar = predict(rows.latents / SIGMA_DATA, rows.timesteps)

            # 6. Loss: the distance between both predictions
            loss = discrete_loss(
                trig_output,
                rows.latents,
                target,
                rows.timesteps,
                loss_type=settings.loss_type,
                huber_constant=settings.huber_c,
            )
            run.backward(loss + 0 * logvar.sum(), student)  # DDP waits for the gradient of every parameter
        run.update(student)
        distillation.show_when_due(student)  # validation pictures; a push at a checkpoint

    # 7. Export
    if not run.stopped:
        distillation.export(student)
    return run


def first_of(predict: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """The student's F without its log-variance, for rows whose text and guidance it has."""
    return lambda sample, timestep, **_: predict(sample, timestep)[0]


def main(argv: list[str] | None = None) -> None:
    launch(train, parse_settings(LCMSettings, argv, description=__doc__))


if __name__ == "__main__":
    main()
