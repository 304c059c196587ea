#!/usr/bin/env python
r"""Distil a text-to-image pipeline into a 1-4 step one, without images (TBCM, arXiv 2511.20410, Algorithm 1).

    accelerate launch examples/tbcm/train_tbcm_distill.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers \
        --prompts_file prompts.txt --output_dir outputs/tbcm-sana-0.6b --mixed_precision bf16

A Sana in dense time, FLUX.1-dev, LongCat-Image, Qwen-Image, FLUX.2 [klein] base, Z-Image, and what prepare_teacher.py
makes of a plain Sana or Stable Diffusion 3 will do.
B prompts and N route steps give B (N - 1) training rows. The steps, as they are numbered below:

    1. prompts -> frozen text encoder -> text: embeddings (B, L, D) and mask (B, L); each prompt once
    2. sampling scheme -> timesteps (B, N), radians, descending from pi/2
    3. frozen teacher along its own denoising trajectory -> latents and velocity (B, N - 1, C, H, W)
    4. brightness filter on the trajectory's end -> rows kept, in a buffer that is trained on in random order
    5. the student with gradient and, in the same pass, its tangent along the teacher's velocity without
    6. loss, backward, clipping, optimiser, EMA
    7. the student, a plain transformer of the teacher's class, in a pipeline folder that any diffusers user can load

The file needs nothing but installed packages: copy it and change what you like.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusers_tbcm.brightness import cached_black_latent, keep_mask
from diffusers_tbcm.draws import draw_generator, draw_guidance_scale, draw_noise, prompt_at
from diffusers_tbcm.loss import (
    ENDPOINT_LOSS_TYPES,
    LOSS_WEIGHTINGS,
    consistency_error,
    consistency_loss,
    endpoint_loss,
)
from diffusers_tbcm.rows import Recording
from diffusers_tbcm.tangent import dual_inputs, normalized_tangent, tangent_ratio
from diffusers_tbcm.training.consistency import ConsistencyDistillation
from diffusers_tbcm.training.interruption import StopRequest
from diffusers_tbcm.training.launch import launch
from diffusers_tbcm.training.loss_by_time import LossByTime
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import (
    PromptSettings,
    RowSettings,
    check_not_negative,
    check_positive,
    parse_settings,
    setting,
)
from diffusers_tbcm.training.stream import Record
from diffusers_tbcm.trajectory import SAMPLING_SCHEMES, record_trajectory, sample_timesteps
from diffusers_tbcm.trigflow import SIGMA_DATA


METHOD = "TBCM, image-free"  # on the model card


@dataclass(kw_only=True)
class TBCMSettings(PromptSettings, RowSettings):
    """trajectories, tangent"""

    route_steps: int = setting(16, "teacher steps N of a trajectory")
    sampling_scheme: str = setting("reference", "where on the trajectory the rows lie", choices=SAMPLING_SCHEMES)
    flow_shift: float = setting(2.5, "of the reference route")
    logit_mean: float = setting(0.2, "of the logit_normal scheme")
    logit_std: float = setting(1.6, "of the logit_normal scheme")
    brightness_threshold: float = setting(1.0, "0: no filter, the VAE never loads")
    brightness_hard: bool = setting(False, "drop all below the threshold (the paper)")

    tangent_warmup_steps: int = setting(4000, "of the ratio r from 0 to 1")
    tangent_cooldown_start_step: int = setting(15000, "-1: no cooldown")
    tangent_cooldown_steps: int = setting(2000, "of r from 1 to tangent_final_ratio")
    tangent_final_ratio: float = setting(0.75, "r after the cooldown")
    tangent_resolution_invariant: bool = setting(False, "norm over the root of its size")
    loss_weighting: str = setting(
        "learned", "of the error at t: w(t)/exp(logvar) (the paper), w(t) or 1", choices=LOSS_WEIGHTINGS
    )
    endpoint_warmup_steps: int = setting(
        0, "first train every row to lead to its trajectory's end (ODE initialisation; not in the paper)"
    )
    endpoint_loss_type: str = setting(
        "norm", "of that: the distance to the end, or its square", choices=ENDPOINT_LOSS_TYPES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.route_steps < 2:
            raise ValueError(
                f"`route_steps` is {self.route_steps}: it takes 2, as the step at pi/2 gives no training row"
            )
        check_positive(self, "flow_shift", "logit_std")
        check_not_negative(self, "brightness_threshold", "tangent_warmup_steps", "endpoint_warmup_steps")
        try:
            self.tangent_ratio(0)
        except ValueError as error:
            raise ValueError(f"--tangent_*: {error}") from error

    def tangent_ratio(self, step: int) -> float:
        """The ratio r of a step: it warms up, stays, and cools down."""
        start = None if self.tangent_cooldown_start_step < 0 else self.tangent_cooldown_start_step
        return tangent_ratio(
            step, self.tangent_warmup_steps, start, self.tangent_cooldown_steps, self.tangent_final_ratio
        )

    @property
    def only_warms_up(self) -> bool:
        """Whether the endpoint warm-up leaves no step to the consistency loss."""
        return self.endpoint_warmup_steps >= self.max_train_steps

    def describe(self) -> dict[str, object]:
        """What the model card says of the method's own settings."""
        cooldown = (
            "no cooldown"
            if self.tangent_cooldown_start_step < 0
            else f"cooldown from step {self.tangent_cooldown_start_step} over {self.tangent_cooldown_steps}"
        )
        consistency = {
            "tangent ratio": f"warm-up {self.tangent_warmup_steps}, {cooldown}, final {self.tangent_final_ratio}",
            "loss weighting": self.loss_weighting,
        }
        warm_up = f"{self.endpoint_warmup_steps} steps, {self.endpoint_loss_type}"
        if self.only_warms_up:
            consistency, warm_up = {}, f"all steps, {self.endpoint_loss_type}; no consistency loss"
        return {
            "route": f"{self.sampling_scheme}, {self.route_steps} steps, shift {self.flow_shift}",
            **consistency,
            "endpoint warm-up": warm_up if self.endpoint_warmup_steps else "off",
            **super().describe(),
        }


def record_trajectories(
    settings: TBCMSettings, run: Run, distillation: ConsistencyDistillation, prompts: Sequence[str]
) -> Record:
    """Steps 1 to 4, as a function of the draws to make rows of."""
    black = None
    if settings.brightness_threshold > 0:
        cache = run.own(f"black_latent_{distillation.resolution}.safetensors")
        with run.accelerator.main_process_first():
            black = cached_black_latent(
                distillation.folder, distillation.resolution, cache, variant=settings.variant
            ).to(run.device)

    def record(draws: list[int]) -> tuple[Recording, torch.Tensor]:
        """Record the trajectories of some draws, and say which of them the brightness filter keeps."""
        # 1. Prompts; everything random of a draw depends on its number in the run and the seed alone
        generators = [draw_generator(draw, settings.seed) for draw in draws]
        numbers = [prompt_at(draw, len(prompts), settings.seed) for draw in draws]
        text = distillation.encode([prompts[number] for number in numbers])
        guidance_scale = draw_guidance_scale(settings.guidance_scales, generators, device=run.device)
        noise = draw_noise(distillation.latent_shape, generators, device=run.device)

        # 2. Timesteps
        timesteps = sample_timesteps(
            settings.sampling_scheme,
            len(draws),
            settings.route_steps,
            shift=settings.flow_shift,
            logit_mean=settings.logit_mean,
            logit_std=settings.logit_std,
            generator=generators,
            device=run.device,
        )

        # 3. The teacher's trajectory
        recording = record_trajectory(
            distillation.teacher, noise, timesteps, text, distillation.negative_text, guidance_scale
        )

        # 4. Brightness filter
        if black is None:
            return recording, torch.ones(len(draws), dtype=torch.bool)
        keep = keep_mask(
            recording.pred_original_sample,
            black,
            settings.brightness_threshold,
            hard=settings.brightness_hard,
            generator=generators,
        )
        return recording, keep

    return record


def train(settings: TBCMSettings, stop: StopRequest) -> Run:
    """Algorithm 1, from `resume_from_checkpoint` to `max_train_steps` or until asked to stop."""
    run = Run(settings, stop, script=__file__)
    prompts = settings.load_prompts()
    run.say(prompts)
    if settings.only_warms_up and not settings.dry_run:  # whose first step is a run of one
        run.say(
            f"Warning: no step is of the consistency loss, as --endpoint_warmup_steps {settings.endpoint_warmup_steps}"
            f" covers --max_train_steps {settings.max_train_steps}"
        )
    distillation = ConsistencyDistillation(run, settings, prompts.prompts, method=METHOD, image_free=True)
    student = distillation.add_student(rows_per_prompt=settings.route_steps - 1, weighting=settings.loss_weighting)
    by_time = LossByTime(run, settings.loss_weighting)
    batches = run.batches(
        record_trajectories(settings, run, distillation, prompts.prompts),
        rows_per_prompt=settings.route_steps - 1,
        num_prompts=len(prompts.prompts),
        drops=settings.brightness_threshold > 0,
        recorded_at_once=settings.teacher_batch_size,
        buffer_size=settings.replay_buffer_size,
        replay_steps=settings.replay_steps,
    )
    for batch in batches:
        for rows in batch:
            if run.step < settings.endpoint_warmup_steps:
                unscaled = rows.latents / SIGMA_DATA
                trig_output, logvar = student(unscaled, rows.timesteps, **distillation.condition(rows))
                loss = endpoint_loss(
                    trig_output,
                    rows.latents,
                    rows.pred_original_sample,
                    rows.timesteps,
                    loss_type=settings.endpoint_loss_type,
                )
                run.backward(loss + 0 * logvar.sum(), student)  # DDP waits for the gradient of every parameter
                continue

            # 5. The student F with gradient and, in the same pass, its tangent g along the teacher's dx_t/dt
            sample, timesteps = dual_inputs(rows.latents, rows.velocity, rows.timesteps)
            trig_output, logvar = student(sample, timesteps, **distillation.condition(rows))
            ratio = settings.tangent_ratio(run.step)
            tangent = normalized_tangent(
                trig_output,
                rows.latents,
                rows.velocity,
                rows.timesteps,
                ratio=ratio,
                resolution_invariant=settings.tangent_resolution_invariant,
            )

            # 6. Loss: mean weight (F - F_sg - g)^2 + logvar, over the rows kept in all processes; the paper's weight
            # is w(t) / exp(logvar)
            errors = (trig_output.primal, tangent.trig_output, tangent.tangent)
            loss = consistency_loss(*errors, logvar, rows.timesteps, weighting=settings.loss_weighting)
            run.backward(loss, student)
            with torch.no_grad():
                error = consistency_error(*errors)
                by_time.note(rows.timesteps, error, logvar)
                run.log(error=error.mean(), tangent_norm=tangent.norm.mean(), tangent_ratio=ratio)
        by_time.log()  # the share of the loss's weight by interval of t
        run.update(student)  # clip, skip what is not finite, step, EMA; log, checkpoint when due
        distillation.show_when_due(student)  # validation pictures; a push at a checkpoint

    # 7. Export
    if not run.stopped:
        by_time.conclude()  # warns of a learned weight that has not converged
        distillation.export(student)
    return run


def main(argv: list[str] | None = None) -> None:
    launch(train, parse_settings(TBCMSettings, argv, description=__doc__))


if __name__ == "__main__":
    main()
