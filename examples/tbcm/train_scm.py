#!/usr/bin/env python
r"""Distil a Sana text-to-image pipeline with sCM (arXiv 2410.11081) on captioned pictures, for comparison with TBCM.

    accelerate launch examples/tbcm/train_scm.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers \
        --train_data_dir pictures --output_dir outputs/scm-sana-0.6b --mixed_precision bf16

A row is the latent of a picture, noised to a logit-normal time, with the teacher's velocity there. The steps are those
of train_tbcm_distill.py; r warms up to 1 and stays.
"""

from dataclasses import dataclass

import torch

from diffusers_tbcm.data.pictures import CaptionedImages
from diffusers_tbcm.diffusion import diffusion_rows, sample_diffusion_timesteps
from diffusers_tbcm.draws import draw_generator, draw_guidance_scale, draw_noise, prompt_at
from diffusers_tbcm.loss import LOSS_WEIGHTINGS, consistency_error, consistency_loss
from diffusers_tbcm.rows import Recording
from diffusers_tbcm.tangent import dual_inputs, normalized_tangent, tangent_ratio
from diffusers_tbcm.training.consistency import ConsistencyDistillation
from diffusers_tbcm.training.interruption import StopRequest
from diffusers_tbcm.training.launch import launch
from diffusers_tbcm.training.loss_by_time import LossByTime
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import (
    PictureSettings,
    check_not_negative,
    check_positive,
    parse_settings,
    setting,
)
from diffusers_tbcm.training.stream import Record
from diffusers_tbcm.transfer import to_device


METHOD = "sCM (arXiv 2410.11081)"  # on the model card


@dataclass(kw_only=True)
class SCMSettings(PictureSettings):
    """times, tangent"""

    logit_mean: float = setting(0.2, "of the rows' logit-normal times")
    logit_std: float = setting(1.6, "of the rows' logit-normal times")
    tangent_warmup_steps: int = setting(4000, "of the ratio r from 0 to 1")
    tangent_resolution_invariant: bool = setting(False, "norm over the root of its size")
    loss_weighting: str = setting(
        "learned", "of the error at t: w(t)/exp(logvar) (the paper), w(t) or 1", choices=LOSS_WEIGHTINGS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "logit_std")
        check_not_negative(self, "tangent_warmup_steps")

    def describe(self) -> dict[str, object]:
        """What the model card says of the method's own settings."""
        return {
            "times": f"logit-normal, mean {self.logit_mean}, standard deviation {self.logit_std}",
            "tangent ratio": f"warm-up {self.tangent_warmup_steps}",
            "loss weighting": self.loss_weighting,
            **super().describe(),
        }


def noise_pictures(
    settings: SCMSettings, run: Run, distillation: ConsistencyDistillation, images: CaptionedImages
) -> Record:
    """Steps 1 to 3, as a function of the draws to make rows of."""
    latents = distillation.cache_latents(images, settings.latents_cache)

    def record(draws: list[int]) -> tuple[Recording, torch.Tensor]:
        """Noise the pictures of some draws; one row each, and all are kept."""
        # 1. Pictures, one of their captions; everything random of a draw depends on its number and the seed alone
        generators = [draw_generator(draw, settings.seed) for draw in draws]
        pictures = [prompt_at(draw, len(images), settings.seed) for draw in draws]
        text = distillation.encode(list(map(images.pick_caption, pictures, generators)))
        guidance_scale = draw_guidance_scale(settings.guidance_scales, generators, device=run.device)
        noise = draw_noise(distillation.latent_shape, generators, device=run.device)

        # 2. Times
        timesteps = sample_diffusion_timesteps(
            len(draws), logit_mean=settings.logit_mean, logit_std=settings.logit_std, generator=generators
        )

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


def train(settings: SCMSettings, stop: StopRequest) -> Run:
    """sCM's distillation, from `resume_from_checkpoint` to `max_train_steps` or until asked to stop."""
    run = Run(settings, stop, script=__file__)
    images = settings.load_pictures()
    run.say(images)
    distillation = ConsistencyDistillation(run, settings, images.prompts, method=METHOD)
    student = distillation.add_student(rows_per_prompt=1, weighting=settings.loss_weighting)
    by_time = LossByTime(run, settings.loss_weighting)
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
            # 5. The student F with gradient and, in the same pass, its tangent g along the teacher's dx_t/dt
            sample, timesteps = dual_inputs(rows.latents, rows.velocity, rows.timesteps)
            trig_output, logvar = student(sample, timesteps, **distillation.condition(rows))
            ratio = tangent_ratio(run.step, settings.tangent_warmup_steps, None, 0, 1.0)
            tangent = normalized_tangent(
                trig_output,
                rows.latents,
                rows.velocity,
                rows.timesteps,
                ratio=ratio,
                resolution_invariant=settings.tangent_resolution_invariant,
            )

            # 6. Loss: mean weight (F - F_sg - g)^2 + logvar, the weight by default w(t) / exp(logvar)
            errors = (trig_output.primal, tangent.trig_output, tangent.tangent)
            loss = consistency_loss(*errors, logvar, rows.timesteps, weighting=settings.loss_weighting)
            run.backward(loss, student)
            with torch.no_grad():
                error = consistency_error(*errors)
                by_time.note(rows.timesteps, error, logvar)
                run.log(error=error.mean(), tangent_norm=tangent.norm.mean(), tangent_ratio=ratio)
        by_time.log()  # the share of the loss's weight by interval of t
        run.update(student)
        distillation.show_when_due(student)  # validation pictures; a push at a checkpoint

    # 7. Export
    if not run.stopped:
        by_time.conclude()  # warns of a learned weight that has not converged
        distillation.export(student)
    return run


def main(argv: list[str] | None = None) -> None:
    launch(train, parse_settings(SCMSettings, argv, description=__doc__))


if __name__ == "__main__":
    main()
