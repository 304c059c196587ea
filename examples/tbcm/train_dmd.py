#!/usr/bin/env python
r"""Finish a TBCM student by distribution matching, without images (DMD, arXiv 2311.18828).

    accelerate launch examples/tbcm/train_dmd.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers \
        --student_model_name_or_path outputs/tbcm-sana-0.6b --prompts_file prompts.txt \
        --output_dir outputs/dmd-sana-0.6b --mixed_precision bf16 --gradient_checkpointing --use_ema

Where noise leaves several pictures open, a student of trajectories draws their mean until it has seen very many of
them. Distribution matching decides for one: the student's own predictions are noised, and moved to where the teacher,
under guidance, predicts otherwise than a critic that knows what the student draws. The trajectories go on holding the
student, by the loss to their ends. The steps, as they are numbered below:

    1. prompts, guidance scales and noise
    2. a route of N timesteps for each prompt
    3. the teacher's trajectories: x_t at N - 1 points, pure noise among them, and the x_0 that they lead to
    4. every step: the critic learns the student's predictions
    5. every third step: they move to where teacher and critic disagree, and to x_0
    6. clipping, optimiser, EMA
    7. the student, exported as TBCM's

The file needs nothing but installed packages: copy it and change what you like.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from diffusers_tbcm.draws import draw_generator, draw_guidance_scale, draw_noise, prompt_at
from diffusers_tbcm.flow import add_flow_noise, flow_prediction
from diffusers_tbcm.guidance import guidance_branches, guided_output
from diffusers_tbcm.loss import endpoint_loss
from diffusers_tbcm.matching import critic_loss, distribution_loss, draw_tau
from diffusers_tbcm.rows import Recording, TrainingRows
from diffusers_tbcm.training.consistency import ConsistencyDistillation
from diffusers_tbcm.training.interruption import StopRequest
from diffusers_tbcm.training.launch import launch
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import (
    LR_SCHEDULERS,
    PromptSettings,
    RowSettings,
    check_not_negative,
    check_positive,
    check_student_is_updated,
    parse_settings,
    setting,
)
from diffusers_tbcm.training.stream import Record
from diffusers_tbcm.trajectory import record_trajectory, sample_timesteps
from diffusers_tbcm.trigflow import SIGMA_DATA, consistency_output


METHOD = "DMD after TBCM, image-free"  # on the model card
CRITIC, DM = 2, 3  # streams of random numbers: a prediction's noise, for the critic and for the student


@dataclass(kw_only=True)
class DMDSettings(PromptSettings, RowSettings):
    """trajectories, critic, losses"""

    student_model_name_or_path: str | None = setting(
        None, "folder or Hub id of the TBCM student to begin with; default: the teacher"
    )
    start_share: float = setting(
        0.0, "of that student's weights in those that are drawn and saved; the rest is what was trained"
    )
    max_train_steps: int = setting(3000, "steps of the critic; the student takes one in every student_every")
    lr_scheduler: str = setting("cosine", "of the learning rates", choices=LR_SCHEDULERS)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    route_steps: int = setting(16, "teacher steps N of a trajectory")
    flow_shift: float = setting(2.5, "of the route")
    noise_share: float = setting(0.5, "of a trajectory's N - 1 rows, those at pi/2, where a single step begins")
    student_every: int = setting(3, "steps of the critic to one of the student")
    critic_learning_rate: float = setting(3e-5, "after the warm-up")
    dm_weight: float = setting(1.0, "of distribution matching")
    endpoint_weight: float = setting(0.25, "of the loss to the trajectories' ends")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.route_steps < 2:
            raise ValueError(
                f"`route_steps` is {self.route_steps}: it takes 2, as the step at pi/2 gives no training row"
            )
        check_positive(self, "flow_shift", "student_every", "critic_learning_rate", "dm_weight")
        check_student_is_updated(self)
        check_not_negative(self, "noise_share", "start_share", "endpoint_weight")
        for name in ("noise_share", "start_share"):
            if (share := getattr(self, name)) > 1:
                raise ValueError(f"`{name}` is {share}: it is a share, at most 1")
        if self.start_share and self.student_model_name_or_path is None:
            raise ValueError("`start_share` is of the weights of `student_model_name_or_path`: give that too")
        if self.rank is not None and self.student_model_name_or_path is not None:
            raise ValueError(
                "`rank` trains adapters on the teacher's own weights, and `student_model_name_or_path` has others:"
                " give one of them"
            )

    @property
    def noise_rows(self) -> int:
        """How many of a trajectory's rows are at pi/2."""
        return int(self.noise_share * (self.route_steps - 1))

    def describe(self) -> dict[str, object]:
        """What the model card says of the method's own settings."""
        return {
            "begins as": "the teacher" if self.student_model_name_or_path is None else "a TBCM student",
            **({"saved": f"{self.start_share:g} of the weights it began with"} if self.start_share else {}),
            "route": f"{self.route_steps} steps, shift {self.flow_shift}",
            "rows at pi/2": f"{self.noise_rows} of {self.route_steps - 1}",
            "student": f"one step in {self.student_every} of the critic's",
            "critic": f"lr {self.critic_learning_rate:g}",
            "loss": f"{self.dm_weight:g} DM + {self.endpoint_weight:g} to the trajectories' ends",
            **super().describe(),
        }


def record_trajectories(
    settings: DMDSettings, run: Run, distillation: ConsistencyDistillation, prompts: Sequence[str]
) -> Record:
    """Steps 1 to 3, as a function of the draws to make rows of."""

    def record(draws: list[int]) -> tuple[Recording, torch.Tensor]:
        """Record the trajectories of some draws; all are kept."""
        # 1. Prompts; everything random of a draw depends on its number in the run and the seed alone
        generators = [draw_generator(draw, settings.seed) for draw in draws]
        text = distillation.encode([prompts[prompt_at(draw, len(prompts), settings.seed)] for draw in draws])
        guidance_scale = draw_guidance_scale(settings.guidance_scales, generators, device=run.device)
        noise = draw_noise(distillation.latent_shape, generators, device=run.device)

        # 2. Timesteps
        timesteps = sample_timesteps(
            "reference",
            len(draws),
            settings.route_steps,
            shift=settings.flow_shift,
            generator=generators,
            device=run.device,
        )

        # 3. The teacher's trajectory
        recording = record_trajectory(
            distillation.teacher,
            noise,
            timesteps,
            text,
            distillation.negative_text,
            guidance_scale,
            noise_rows=settings.noise_rows,
        )
        return recording, torch.ones(len(draws), dtype=torch.bool)

    return record


def train(settings: DMDSettings, stop: StopRequest) -> Run:
    """DMD, from `resume_from_checkpoint` to `max_train_steps` or until asked to stop."""
    run = Run(settings, stop, script=__file__, num_models=2)
    prompts = settings.load_prompts()
    run.say(prompts)
    start = settings.student_model_name_or_path
    distillation = ConsistencyDistillation(run, settings, prompts.prompts, method=METHOD, image_free=True, start=start)
    student, critic = distillation.add_student_and_critic(
        rows_per_prompt=settings.route_steps - 1,
        start_share=settings.start_share,
        every=settings.student_every,
        critic_learning_rate=settings.critic_learning_rate,
    )
    batches = run.batches(
        record_trajectories(settings, run, distillation, prompts.prompts),
        rows_per_prompt=settings.route_steps - 1,
        num_prompts=len(prompts.prompts),
        recorded_at_once=settings.teacher_batch_size,
        buffer_size=settings.replay_buffer_size,
        replay_steps=settings.replay_steps,
    )
    for batch in batches:
        for rows in batch:
            # 4. The critic F learns the student's predictions b, on unit scale: mean ||F(z, tau) - (e - b)||^2
            with torch.no_grad():
                _, prediction = predict(distillation, student, rows)
            sample, tau, noise = noised(run, prediction, CRITIC)
            velocity = critic(sample, tau, **distillation.condition(rows))
            run.backward(critic_loss(velocity, prediction, noise), critic)
        run.update(critic)

        if run.due(student):
            for rows in batch:
                # 5. dm_weight mean (b - sg[b + w (D_R - D_F)])^2 + endpoint_weight mean (b - x_0)^2
                trig_output, prediction = predict(distillation, student, rows)
                sample, tau, _ = noised(run, prediction, DM)
                real, fake = judge(distillation, critic, rows, sample, tau)
                dm_loss = distribution_loss(prediction, real, fake)
                ends = rows.pred_original_sample
                end_loss = endpoint_loss(trig_output, rows.latents, ends, rows.timesteps, loss_type="l2")
                run.backward(settings.dm_weight * dm_loss + settings.endpoint_weight * end_loss, student)
                disagreement = (real - fake).square().mean().sqrt()
                run.log(dm_loss=dm_loss.detach(), endpoint_loss=end_loss.detach(), disagreement=disagreement)
            run.update(student)  # 6. clip, skip what is not finite, step, EMA
        distillation.show_when_due(student)  # validation pictures; a push at a checkpoint

    # 7. Export
    if not run.stopped:
        distillation.export(student)
    return run


def predict(
    distillation: ConsistencyDistillation, student: nn.Module, rows: TrainingRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's F, and its prediction f(x_t, t) on unit scale."""
    trig_output = student(rows.latents / SIGMA_DATA, rows.timesteps, **distillation.condition(rows))
    return trig_output, consistency_output(rows.latents, trig_output, rows.timesteps) / SIGMA_DATA


def noised(run: Run, prediction: torch.Tensor, stream: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z = (1 - tau) b + tau e of predictions, tau ~ U(0, 1), and tau and e."""
    generators = run.generators(len(prediction), stream=stream)
    tau = draw_tau(torch.ones(len(prediction), device=run.device), generators)
    noise = draw_noise(prediction.shape[1:], generators, device=run.device)
    return add_flow_noise(prediction.detach(), noise, tau), tau, noise


@torch.no_grad()
def judge(
    distillation: ConsistencyDistillation,
    critic: nn.Module,
    rows: TrainingRows,
    sample: torch.Tensor,
    tau: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """D_R(z, c) of the teacher under guidance, and D_F(z, c) of the critic."""
    branches = guidance_branches(distillation.velocity, rows.text, distillation.negative_text)
    real = guided_output(distillation.velocity, sample, tau, branches, rows.guidance_scale)
    fake = critic(sample, tau, **distillation.condition(rows))
    return flow_prediction(sample, real, tau), flow_prediction(sample, fake, tau)


def main(argv: list[str] | None = None) -> None:
    launch(train, parse_settings(DMDSettings, argv, description=__doc__))


if __name__ == "__main__":
    main()
