#!/usr/bin/env python
r"""Prepare a plain teacher for consistency training, without images: a network of 1000 s becomes smooth in s.

    accelerate launch examples/tbcm/prepare_teacher.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_600M_1024px_diffusers --lora my-lora \
        --prompts_file prompts.txt --output_dir outputs/my-teacher --mixed_precision bf16 --gradient_checkpointing

TBCM, sCM and Sana-Sprint differentiate in time, and want a teacher in dense time, which answers smoothly to s in
[0, 1]. What comes out is an ordinary pipeline that draws what the teacher draws, and that their scripts take. A plain
Sana, Stable Diffusion 3, LongCat-Image, Qwen-Image, FLUX.2 [klein] base and Z-Image will do. The steps:

    1. a LoRA, where one is given, is merged into the teacher
    2. a new embedding of s is fitted to the teacher's embedding of 1000 s; the teacher is not run
    3. with --qk_norm, for a Sana whose queries and keys are not normalised: norms, fitted to change v' least
    4. the teacher goes along its own trajectories -> x_s, s, v of both branches of its guidance
    5. mean ||v'(x, s) - v(x, 1000 s)||^2 there -> backward, clipping, optimiser, EMA
    6. v', a plain transformer of the teacher's class in dense time, inside the teacher's own pipeline class

Step 2 is seconds, and often enough: --max_train_steps 0 leaves 5 out. The card says how close v' is to v on
trajectories that no training has seen.

The file needs nothing but installed packages: copy it and change what you like.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from diffusers_tbcm.dense_time import alignment_loss, branch_inputs, record_branches
from diffusers_tbcm.draws import draw_generator, draw_guidance_scale, draw_noise, prompt_at
from diffusers_tbcm.rows import Recording
from diffusers_tbcm.training.interruption import StopRequest
from diffusers_tbcm.training.launch import launch
from diffusers_tbcm.training.preparation import Preparation
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import LR_SCHEDULERS, PromptSettings, check_positive, parse_settings, setting
from diffusers_tbcm.training.stream import Record
from diffusers_tbcm.trajectory import sample_timesteps
from diffusers_tbcm.trigflow import trig_to_flow_timestep


METHOD = "preparation for consistency training, image-free"  # on the model card
HELD_OUT = 2**40  # number of the first draw that is held out: no run comes to it
FOR_NORMS = 2**41  # of the first that norms are fitted on


@dataclass(kw_only=True)
class PreparationSettings(PromptSettings):
    """teacher, alignment"""

    lora: str | None = setting(None, "folder, file or Hub id of a LoRA to merge into the teacher first")
    lora_scale: float = setting(1.0, "what it is multiplied by")
    qk_norm: bool = setting(False, "normalise queries and keys of a Sana that does not; it takes alignment")
    max_train_steps: int = setting(500, "optimiser steps of the alignment; 0: the fit alone")
    lr_scheduler: str = setting("cosine", "of the learning rate", choices=LR_SCHEDULERS)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    route_steps: int = setting(16, "teacher steps of a trajectory, each of which gives two rows")
    flow_shift: float | None = setting(None, "of the trajectories' times; default: the teacher's")
    guidance_scales: list[float] = setting([4.0, 4.5, 5.0], "of the trajectories, one per prompt")
    held_out_prompts: int = setting(8, "trajectories that v' is measured on, before and after")
    validation_prompts: list[str] | None = setting(None, "drawn at 20 steps with v and with v'")

    least_train_steps = 0

    def __post_init__(self) -> None:
        self.merge_lora |= self.rank is not None  # adapters of the alignment are no use without the new embedder
        super().__post_init__()
        check_positive(self, "route_steps", "flow_shift", "held_out_prompts")
        if self.route_steps < 2:
            raise ValueError(f"`route_steps` is {self.route_steps}: a trajectory has at least 2")
        if min(self.guidance_scales) <= 0:
            raise ValueError(f"`guidance_scales` is {self.guidance_scales}: every scale has to be positive")

    def describe(self) -> dict[str, object]:
        """What the model card says of the method's own settings."""
        shift = "the teacher's shift" if self.flow_shift is None else f"shift {self.flow_shift:g}"
        return {
            "trajectories": f"{self.route_steps} steps, {shift}",
            "guidance scales": ", ".join(f"{scale:g}" for scale in self.guidance_scales),
            **({"queries and keys": "normalised, which the teacher's are not"} if self.qk_norm else {}),
        }


def record_trajectories(
    settings: PreparationSettings, run: Run, preparation: Preparation, prompts: Sequence[str]
) -> Record:
    """Step 4, as a function of the draws to make rows of."""
    shift = preparation.shift if settings.flow_shift is None else settings.flow_shift

    def record(draws: list[int]) -> tuple[Recording, torch.Tensor]:
        """Record the trajectories of some draws; those of numbers are kept."""
        # Everything random of a draw depends on its number in the run and the seed alone
        generators = [draw_generator(draw, settings.seed) for draw in draws]
        text = preparation.encode([prompts[prompt_at(draw, len(prompts), settings.seed)] for draw in draws])
        guidance_scale = draw_guidance_scale(settings.guidance_scales, generators, device=run.device)
        noise = draw_noise(preparation.latent_shape, generators, device=run.device)
        angles = sample_timesteps(
            "reference", len(draws), settings.route_steps, shift=shift, generator=generators, device=run.device
        )
        sigmas = trig_to_flow_timestep(angles).clamp(max=1)
        recording = record_branches(
            preparation.teacher, noise, sigmas, text, preparation.negative_text, guidance_scale
        )
        return recording, recording.velocity.isfinite().flatten(1).all(1)

    return record


def train(settings: PreparationSettings, stop: StopRequest) -> Run:
    """The preparation, from `resume_from_checkpoint` to `max_train_steps` or until asked to stop."""
    run = Run(settings, stop, script=__file__, shards=False)
    prompts = settings.load_prompts()
    run.say(prompts)

    # 1., 2. LoRA and fit
    preparation = Preparation(
        run,
        settings,
        prompts.prompts,
        method=METHOD,
        lora=settings.lora,
        lora_scale=settings.lora_scale,
        qk_norm=settings.qk_norm,
    )
    record = record_trajectories(settings, run, preparation, prompts.prompts)

    def unseen(first: int) -> Iterator[Recording]:
        """Trajectories that are none of training, as many at once as in a step."""
        draws = range(first, first + settings.held_out_prompts)
        for start in range(0, len(draws), settings.train_batch_size):
            recording, finite = record([*draws[start : start + settings.train_batch_size]])
            yield recording.select(finite.nonzero()[:, 0])

    preparation.hold_out(unseen(HELD_OUT))
    if settings.qk_norm:
        preparation.normalise(unseen(FOR_NORMS))  # 3. Norms of queries and keys

    prepared = preparation.add_prepared(rows_per_prompt=2 * settings.route_steps)
    batches = run.batches(
        record,  # 4. The teacher's trajectories
        rows_per_prompt=settings.route_steps,
        num_prompts=len(prompts.prompts),
        drops=True,  # a trajectory that is not finite
    )
    for batch in batches:
        for rows in batch:
            # 5. mean ||v'(x, s) - v(x, 1000 s)||^2 over both branches
            sample, s, text = branch_inputs(rows, preparation.negative_text)
            velocity = prepared(sample, s, **text.arguments())
            run.backward(alignment_loss(velocity, rows), prepared)
        run.update(prepared)
        preparation.show_when_due(prepared)  # validation pictures; a push at a checkpoint

    # 6. Export
    if not run.stopped:
        preparation.export(prepared)
    return run


def main(argv: list[str] | None = None) -> None:
    launch(train, parse_settings(PreparationSettings, argv, description=__doc__))


if __name__ == "__main__":
    main()
