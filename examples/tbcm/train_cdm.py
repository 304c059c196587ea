#!/usr/bin/env python
r"""Distil a text-to-image pipeline into a 1-4 step one, without images and with any time (CDM, arXiv 2605.06376).

    accelerate launch examples/tbcm/train_cdm.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_600M_1024px_diffusers \
        --prompts_file prompts.txt --output_dir outputs/cdm-sana-0.6b \
        --mixed_precision bf16 --gradient_checkpointing --use_ema

A plain Sana, Stable Diffusion 3, LongCat-Image, Qwen-Image, FLUX.2 [klein] base and Z-Image will do: the method asks
for no tangent and no dense time. Three networks begin as copies of the teacher: itself, frozen, the student, and a
critic that knows what the student draws. The steps, as they are numbered below:

    1. prompts -> frozen text encoder -> text: embeddings (B, L, D) and mask (B, L)
    2. one schedule for the whole step: N ~ U{1..28}, N - 1 times between, shifted as the teacher's
    3. the student's rollout from noise by these steps -> x_i, v_i, s_i at one random point i a prompt
    4. every step: the critic learns the student's predictions, then a little of the student flows into it
    5. every second step: CA, DM and CDM pull the student's predictions to where teacher and critic disagree
    6. backward, clipping, optimiser, EMA
    7. the student, a plain transformer of the teacher's class, inside the teacher's own pipeline class

The file needs nothing but installed packages: copy it and change what you like.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from diffusers_tbcm.draws import draw_generator, draw_noise, prompt_at
from diffusers_tbcm.flow import add_flow_noise, flow_prediction, flow_step
from diffusers_tbcm.matching import (
    CRITIC_MERGE,
    augmentation_loss,
    critic_loss,
    distribution_loss,
    draw_tau,
    merge_critic,
)
from diffusers_tbcm.rollout import ANCHOR_RANGE, MAX_ROLLOUT_STEPS, draw_anchors, draw_sigmas, record_rollout
from diffusers_tbcm.rows import Recording, TrainingRows
from diffusers_tbcm.text import Text
from diffusers_tbcm.training.drift import DriftWatch
from diffusers_tbcm.training.flow_distillation import FlowDistillation
from diffusers_tbcm.training.interruption import StopRequest
from diffusers_tbcm.training.launch import launch
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import (
    LR_SCHEDULERS,
    PromptSettings,
    check_not_negative,
    check_positive,
    check_student_is_updated,
    parse_settings,
    setting,
)
from diffusers_tbcm.training.stream import Record


METHOD = "CDM, image-free"  # on the model card
# Streams of random numbers: a step's schedule, the critic's noise, the student's points off the rollout, its losses.
SCHEDULE, CRITIC, OFF_ROLLOUT, CA, DM, CDM, CA_OFF_ROLLOUT = range(2, 9)


@dataclass(kw_only=True)
class CDMSettings(PromptSettings):
    """rollout, critic, losses"""

    max_train_steps: int = setting(4001, "steps of the critic; the student takes one in every student_every")
    lr_warmup_steps: int = setting(100, "of the learning rates from 0, in updates")
    lr_scheduler: str = setting("constant_with_warmup", "of the learning rates", choices=LR_SCHEDULERS)
    weight_decay: float = setting(1e-4, "of both optimisers")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")

    max_rollout_steps: int = setting(MAX_ROLLOUT_STEPS, "largest number N of a rollout's steps")
    anchor_range: list[float] = setting(list(ANCHOR_RANGE), "of a rollout's inner times, before the shift", nargs=2)
    stratified_anchors: bool = setting(False, "one inner time in each of N - 1 equal parts of that range")
    flow_shift: float | None = setting(None, "of all times; default: the teacher's")
    student_every: int = setting(2, "steps of the critic to one of the student")
    critic_learning_rate: float = setting(5e-6, "after the warm-up")
    timed_critic: bool = setting(False, "tell the critic at what time of the rollout a prediction was made")
    critic_merge: float = setting(CRITIC_MERGE, "share of the student that flows into the critic at each of its steps")
    augmentation_scale: float = setting(7.0, "alpha of CA: the teacher's guidance scale less 1")
    augment_everywhere: bool = setting(False, "CA at every tau, and off the rollout too (not in the paper)")
    ca_weight: float = setting(1.0, "of classifier-free guidance as a loss")
    dm_weight: float = setting(1.0, "of distribution matching at the rollout's points")
    cdm_weight: float = setting(1.0, "of distribution matching between them")

    drift_steps: int = setting(100, "from one look at what the student draws to the next; 0: none")
    drift_tolerance: float = setting(0.1, "of its brightness and saturation, of 1, before a warning")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self, "max_rollout_steps", "flow_shift", "student_every", "critic_learning_rate", "drift_tolerance"
        )
        check_student_is_updated(self)
        check_not_negative(
            self, "drift_steps", "critic_merge", "augmentation_scale", "ca_weight", "dm_weight", "cdm_weight"
        )
        if not 0 <= self.anchor_range[0] < self.anchor_range[1] <= 1:
            raise ValueError(f"`anchor_range` is {self.anchor_range}: it has to ascend and lie in [0, 1]")
        if not self.ca_weight + self.dm_weight + self.cdm_weight > 0:
            raise ValueError(
                "`ca_weight`, `dm_weight` and `cdm_weight` are 0: there is nothing to train the student on"
            )

    def describe(self) -> dict[str, object]:
        """What the model card says of the method's own settings."""
        low, high = self.anchor_range
        return {
            "rollout": f"1 to {self.max_rollout_steps} steps, inner times from {low:g} to {high:g}"
            f"{', stratified' if self.stratified_anchors else ''}",
            "student": f"one step in {self.student_every} of the critic's",
            "critic": f"{'timed, ' if self.timed_critic else ''}lr {self.critic_learning_rate:g},"
            f" merge {self.critic_merge:g}",
            "loss": f"{self.ca_weight:g} CA (alpha {self.augmentation_scale:g}"
            f"{', everywhere' if self.augment_everywhere else ''}) + {self.dm_weight:g} DM"
            f" + {self.cdm_weight:g} CDM",
        }


def record_rollouts(
    settings: CDMSettings, run: Run, distillation: FlowDistillation, student: nn.Module, prompts: Sequence[str]
) -> Record:
    """Steps 1 to 3, as a function of the draws to make rows of."""

    def record(draws: list[int]) -> tuple[Recording, torch.Tensor]:
        """Roll the student out as it is now; one row a prompt, and those of numbers are kept."""
        # 1. Prompts; everything random of a draw depends on its number in the run and the seed alone
        generators = [draw_generator(draw, settings.seed) for draw in draws]
        text = distillation.encode([prompts[prompt_at(draw, len(prompts), settings.seed)] for draw in draws])
        noise = draw_noise(distillation.latent_shape, generators, device=run.device)

        # 2. The step's schedule, the same in every process
        sigmas = draw_sigmas(
            draw_generator(run.step, settings.seed, stream=SCHEDULE),
            max_steps=settings.max_rollout_steps,
            anchor_range=(settings.anchor_range[0], settings.anchor_range[1]),
            shift=distillation.shift,
            stratified=settings.stratified_anchors,
        )
        anchors = draw_anchors(len(sigmas) - 1, len(draws), generators)

        # 3. The student's own way; sharded processes have to take the same number of steps
        last = len(sigmas) - 2 if run.accelerator.is_fsdp2 else None
        recording = record_rollout(student, noise, sigmas, anchors, text, last_anchor=last)
        return recording, recording.pred_original_sample.isfinite().flatten(1).all(1)

    return record


def noised(run: Run, prediction: torch.Tensor, upper: torch.Tensor, stream: int) -> tuple[torch.Tensor, ...]:
    """z = (1 - tau) x_0 + tau e of predictions, tau ~ U(0, upper), and tau and e."""
    generators = run.generators(len(prediction), stream=stream)
    tau = draw_tau(upper, generators)
    noise = draw_noise(prediction.shape[1:], generators, device=run.device)
    return add_flow_noise(prediction.detach(), noise, tau), tau, noise


def train(settings: CDMSettings, stop: StopRequest) -> Run:
    """CDM, from `resume_from_checkpoint` to `max_train_steps` or until asked to stop."""
    run = Run(settings, stop, script=__file__, num_models=2)
    prompts = settings.load_prompts()
    run.say(prompts)
    distillation = FlowDistillation(
        run, settings, prompts.prompts, method=METHOD, image_free=True, shift=settings.flow_shift
    )
    student, critic = distillation.add_networks(
        every=settings.student_every,
        critic_learning_rate=settings.critic_learning_rate,
        timed_critic=settings.timed_critic,
    )
    drift = DriftWatch(
        run,
        distillation,
        prompts.prompts,
        guidance_scale=1 + settings.augmentation_scale * (settings.ca_weight > 0),
        every=settings.drift_steps,
        tolerance=settings.drift_tolerance,
    )
    merge = partial(merge_critic, critic, student, settings.critic_merge)
    batches = run.batches(
        record_rollouts(settings, run, distillation, student, prompts.prompts),
        rows_per_prompt=1,
        num_prompts=len(prompts.prompts),
        drops=True,  # a rollout that is not finite
        ahead=0,  # a rollout knows the latest weights
    )
    for batch in batches:
        drift.check(student)  # brightness and saturation of what it draws, against the teacher's
        for rows in batch:
            # 4. The critic F learns the student's predictions b = x_i - s_i v_i: mean ||F(z, tau) - (e - b)||^2
            prediction = rows.pred_original_sample
            sample, tau, noise = noised(run, prediction, torch.ones_like(rows.timesteps), CRITIC)
            velocity = critic(sample, tau, **rows.text.arguments(), **told_when(settings, rows.timesteps))
            run.backward(critic_loss(velocity, prediction, noise), critic)
        run.update(critic, then=merge)  # F <- 0.999 F + 0.001 student

        if run.due(student):
            for rows in batch:
                # 5., 6. mean (x_0 - sg[x_0 + w Delta])^2, summed over the terms
                losses = student_losses(settings, run, distillation, student, critic, rows)
                weights = {"ca": settings.ca_weight, "dm": settings.dm_weight, "cdm": settings.cdm_weight}
                run.backward(torch.stack([weights[name] * loss for name, loss in losses.items()]).sum(), student)
                run.log(**{f"{name}_loss": loss.detach() for name, loss in losses.items()})
            run.update(student)
        distillation.show_when_due(student)  # validation pictures; a push at a checkpoint

    # 7. Export
    if not run.stopped:
        distillation.export(student)
    return run


def student_losses(
    settings: CDMSettings,
    run: Run,
    distillation: FlowDistillation,
    student: nn.Module,
    critic: nn.Module,
    rows: TrainingRows,
) -> dict[str, torch.Tensor]:
    """CA and DM of the student's predictions at the rollout's points, CDM of those between them."""
    text, count = rows.text, len(rows)
    anywhere = torch.ones_like(rows.timesteps)

    moved, elsewhere = off_rollout(run, rows)
    # Both points of a prompt in one pass of the student, next to each other
    sample = torch.stack([rows.latents, moved], dim=1).flatten(0, 1)
    times = torch.stack([rows.timesteps, elsewhere], dim=1).flatten()
    predicted = flow_prediction(sample, student(sample, times, **text.arguments()), times)
    here, there = predicted.unflatten(0, (count, 2)).unbind(1)

    dm, dm_tau, _ = noised(run, here, anywhere, DM)
    cdm, cdm_tau, _ = noised(run, there, anywhere, CDM)
    guided = [(here, anywhere if settings.augment_everywhere else rows.timesteps, CA)]
    if settings.augment_everywhere:
        guided.append((there, anywhere, CA_OFF_ROLLOUT))
    ca, ca_tau = zip(*(noised(run, *point)[:2] for point in guided), strict=True)
    with torch.no_grad():
        judge = partial(predictions, text=text)
        real_dm, real_cdm, *real_ca = judge(distillation.teacher, [dm, cdm, *ca], [dm_tau, cdm_tau, *ca_tau])
        told = told_when(settings, torch.stack([rows.timesteps, elsewhere], dim=1).flatten())
        fake_dm, fake_cdm = judge(critic, [dm, cdm], [dm_tau, cdm_tau], told=told)
        negative = distillation.negative_text.expand(count)
        unconditional = predictions(distillation.teacher, [*ca], [*ca_tau], text=negative)
    run.log(disagreement=(real_dm - fake_dm).square().mean().sqrt())
    augmented = [
        augmentation_loss(point, real, without, settings.augmentation_scale)
        for (point, *_), real, without in zip(guided, real_ca, unconditional, strict=True)
    ]
    return {
        "ca": torch.stack(augmented).sum(),
        "dm": distribution_loss(here, real_dm, fake_dm),
        "cdm": distribution_loss(there, real_cdm, fake_cdm),
    }


def off_rollout(run: Run, rows: TrainingRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the rollout would have been at another time, x' = x_i + (t' - s_i) v_i, and that time t'."""
    elsewhere = draw_tau(torch.ones_like(rows.timesteps), run.generators(len(rows), stream=OFF_ROLLOUT))
    return flow_step(rows.latents, rows.velocity, rows.timesteps, elsewhere), elsewhere


def told_when(settings: CDMSettings, drawn_at: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a timed critic is told beside the prompt: when predictions were made."""
    return {"drawn_at": drawn_at} if settings.timed_critic else {}


def predictions(
    network: Callable[..., torch.Tensor],
    samples: list[torch.Tensor],
    taus: list[torch.Tensor],
    *,
    text: Text,
    told: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> tuple[torch.Tensor, ...]:
    """D(z, tau) of several noised predictions of each prompt, in one pass."""
    sample, tau = torch.stack(samples, dim=1).flatten(0, 1), torch.stack(taus, dim=1).flatten()
    clean = flow_prediction(sample, network(sample, tau, **text.arguments(), **told), tau)
    return clean.unflatten(0, (len(text), len(samples))).unbind(1)


def main(argv: list[str] | None = None) -> None:
    launch(train, parse_settings(CDMSettings, argv, description=__doc__))


if __name__ == "__main__":
    main()
