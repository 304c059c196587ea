#!/usr/bin/env python
r"""Distil a Sana pipeline with Sana-Sprint (arXiv 2503.09641), sCM and LADD, for comparison with TBCM.

    accelerate launch examples/tbcm/train_sana_sprint.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers \
        --train_data_dir pictures --output_dir outputs/sprint-sana-0.6b --mixed_precision bf16

Rows and consistency loss are those of train_scm.py. To it comes the loss of a discriminator, trained heads on blocks
of the frozen teacher. Every step updates both sides, each against the other as it was before: the student by the
verdicts of the heads, and the heads by the predictions that the student has just made on the same batch, without its
gradient. The reference's script alternates as well, but spends a batch, a step of its count and another forward of the
student on each side: n steps here are 2 n there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusers_tbcm.adversarial import (
    DiscriminatorHeads,
    block_features,
    frozen_verdicts,
    head_blocks,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from diffusers_tbcm.data.pictures import CaptionedImages
from diffusers_tbcm.diffusion import diffuse, diffusion_rows, sample_diffusion_timesteps
from diffusers_tbcm.draws import draw_generator, draw_guidance_scale, draw_noise, prompt_at
from diffusers_tbcm.loss import LOSS_WEIGHTINGS, consistency_error, consistency_loss
from diffusers_tbcm.rows import Recording, TrainingRows
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
from diffusers_tbcm.trigflow import SIGMA_DATA, consistency_output


METHOD = "Sana-Sprint (arXiv 2503.09641)"  # on the model card


@dataclass(kw_only=True)
class SanaSprintSettings(PictureSettings):
    """times, tangent, discriminator"""

    logit_mean: float = setting(0.2, "of the rows' logit-normal times")
    logit_std: float = setting(1.6, "of the rows' logit-normal times")
    tangent_warmup_steps: int = setting(4000, "of the ratio r from 0 to 1")
    tangent_resolution_invariant: bool = setting(False, "norm over the root of its size")
    loss_weighting: str = setting(
        "learned", "of the error at t: w(t)/exp(logvar) (the paper), w(t) or 1", choices=LOSS_WEIGHTINGS
    )

    scm_lambda: float = setting(1.0, "weight of the consistency loss")
    adv_lambda: float = setting(0.5, "weight of the adversarial loss")
    discriminator_learning_rate: float | None = setting(None, "constant; default: learning_rate before its schedule")
    head_block_ids: list[int] | None = setting(
        None, "the teacher's blocks that get a head; default: 2 8 14 19, closer in a smaller teacher"
    )
    logit_mean_discriminator: float = setting(-0.6, "of the times to judge at")
    logit_std_discriminator: float = setting(1.0, "of the times to judge at")
    train_largest_timestep: bool = setting(
        False, "judge predictions from other noise and times, the largest among them, by a second forward"
    )
    largest_timestep_prob: float = setting(0.5, "of the largest time there")
    misaligned_pairs_D: bool = setting(False, "pictures under others' captions count as fake, too")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "logit_std", "logit_std_discriminator", "discriminator_learning_rate")
        check_not_negative(self, "tangent_warmup_steps", "scm_lambda", "adv_lambda")
        if not 0 <= self.largest_timestep_prob <= 1:
            raise ValueError(f"`largest_timestep_prob` is {self.largest_timestep_prob}: it has to lie in [0, 1]")
        if self.misaligned_pairs_D and self.train_batch_size < 2:
            raise ValueError(
                "`misaligned_pairs_D` swaps the captions of a batch: it needs `train_batch_size` 2 or more"
            )
        if self.compile:
            raise ValueError("`compile` hides the teacher's blocks from the hooks that the discriminator reads")

    def describe(self) -> dict[str, object]:
        """What the model card says of the method's own settings."""
        return {
            "times": f"logit-normal, mean {self.logit_mean}, standard deviation {self.logit_std}",
            "tangent ratio": f"warm-up {self.tangent_warmup_steps}",
            "loss weighting": self.loss_weighting,
            "loss": f"{self.scm_lambda:g} sCM + {self.adv_lambda:g} adversarial",
            "judged at": f"logit-normal times, mean {self.logit_mean_discriminator},"
            f" standard deviation {self.logit_std_discriminator}",
            **super().describe(),
        }


def noise_pictures(
    settings: SanaSprintSettings, run: Run, distillation: ConsistencyDistillation, images: CaptionedImages
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


def train(settings: SanaSprintSettings, stop: StopRequest) -> Run:
    """Sana-Sprint's distillation, from `resume_from_checkpoint` to `max_train_steps` or until asked to stop."""
    run = Run(settings, stop, script=__file__, num_models=2, shards=False)  # the heads' weights are read, too
    images = settings.load_pictures()
    run.say(images)
    distillation = ConsistencyDistillation(run, settings, images.prompts, method=METHOD)
    blocks = choose_blocks(settings, distillation)
    student = distillation.add_student(rows_per_prompt=1, weighting=settings.loss_weighting)
    by_time = LossByTime(run, settings.loss_weighting)
    if settings.gradient_checkpointing:  # of the pass through which the verdicts reach the student
        distillation.teacher.transformer.enable_gradient_checkpointing()
    heads = DiscriminatorHeads(distillation.inner_dim, blocks)
    discriminator = run.add("discriminator", heads, learning_rate=settings.discriminator_learning_rate)
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
            errors = (trig_output.primal, tangent.trig_output, tangent.tangent)
            loss = consistency_loss(*errors, logvar, rows.timesteps, weighting=settings.loss_weighting)

            # 6. What the student predicts, noised and judged: its loss is scm_lambda sCM - adv_lambda mean D(fake)
            generators = run.generators(len(rows), stream=2)
            if settings.train_largest_timestep:
                prediction = predict_elsewhere(settings, distillation, student, rows, generators)
            else:
                prediction = consistency_output(rows.latents, trig_output.primal, rows.timesteps)
            features = noised_features(settings, distillation, blocks, rows, generators)
            fake_features = features(prediction)
            adversarial_loss = hinge_generator_loss(frozen_verdicts(heads, fake_features))

            # The heads' own loss, on what the student predicted without its gradient
            fakes = [{block: hidden_states.detach() for block, hidden_states in fake_features.items()}]
            with torch.no_grad():
                real_features = features(rows.pred_original_sample)
                if settings.misaligned_pairs_D:
                    fakes.append(features(rows.pred_original_sample, shift=1))
            real, *fake = discriminator(real_features, *fakes)
            run.backward(hinge_discriminator_loss(real, torch.cat(fake)), discriminator)
            run.backward(settings.scm_lambda * loss + settings.adv_lambda * adversarial_loss, student)
            with torch.no_grad():
                error = consistency_error(*errors)
                by_time.note(rows.timesteps, error, logvar)
                run.log(error=error.mean(), tangent_norm=tangent.norm.mean(), tangent_ratio=ratio)
            run.log(adversarial_loss=adversarial_loss.detach())
        by_time.log()  # the share of the loss's weight by interval of t
        run.update(student, discriminator)
        distillation.show_when_due(student)  # validation pictures; a push at a checkpoint

    # 7. Export
    if not run.stopped:
        by_time.conclude()  # warns of a learned weight that has not converged
        distillation.export(student)
    return run


def choose_blocks(settings: SanaSprintSettings, distillation: ConsistencyDistillation) -> tuple[int, ...]:
    """The teacher's blocks that get a head."""
    try:
        return head_blocks(distillation.num_blocks, settings.head_block_ids)
    except ValueError as error:
        raise ValueError(f"`head_block_ids`: {error}") from error


def predict_elsewhere(
    settings: SanaSprintSettings,
    distillation: ConsistencyDistillation,
    student: torch.nn.Module,
    rows: TrainingRows,
    generators: list[torch.Generator],
) -> torch.Tensor:
    """The student's predictions of the same pictures from other noise, often from nothing but noise."""
    device = rows.latents.device
    timesteps = sample_diffusion_timesteps(
        len(rows),
        logit_mean=settings.logit_mean,
        logit_std=settings.logit_std,
        largest_probability=settings.largest_timestep_prob,
        generator=generators,
    )
    timesteps = to_device(timesteps, device)
    noise = draw_noise(rows.latents.shape[1:], generators, device=device)
    latents = diffuse(rows.pred_original_sample, noise, timesteps)
    trig_output, _ = student(latents / SIGMA_DATA, timesteps, **distillation.condition(rows))
    return consistency_output(latents, trig_output, timesteps)


def noised_features(
    settings: SanaSprintSettings,
    distillation: ConsistencyDistillation,
    blocks: tuple[int, ...],
    rows: TrainingRows,
    generators: list[torch.Generator],
) -> Callable[..., dict[int, torch.Tensor]]:
    """What the teacher sees in clean latents, real or predicted, all noised alike: a function of them."""
    device = rows.latents.device
    timesteps = sample_diffusion_timesteps(
        len(rows),
        logit_mean=settings.logit_mean_discriminator,
        logit_std=settings.logit_std_discriminator,
        generator=generators,
    )
    timesteps = to_device(timesteps, device)
    noise = draw_noise(rows.latents.shape[1:], generators, device=device)

    def features(original_sample: torch.Tensor, shift: int = 0) -> dict[int, torch.Tensor]:
        """`shift` gives the latents others' prompts."""
        return block_features(
            distillation.teacher,
            blocks,
            diffuse(original_sample, noise, timesteps),
            timesteps,
            rows.text.roll(shift),
            rows.guidance_scale,
        )

    return features


def main(argv: list[str] | None = None) -> None:
    launch(train, parse_settings(SanaSprintSettings, argv, description=__doc__))


if __name__ == "__main__":
    main()
