"""Flow students, drawn by their teacher's own stock pipeline, and the critic that they are trained against: CDM's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbones import Backbone
from ..critic import TimedCritic
from ..evaluation.generate import PROGRAM
from ..export.folders import save_flow_lora, save_flow_student
from ..flow import FlowTransformer
from ..lora import adapt, copy_trained
from ..pipeline_folder import flow_shift
from ..scheduling_flow import FlowStudentScheduler
from .distillation import Distillation
from .run import Run
from .settings import DistillationSettings


class FlowDistillation(Distillation):
    """A teacher seen as the velocity v, and networks that start as its copies; as `Distillation`.

    The student's transformer is the teacher's class without more weights, in the teacher's own time. With LoRA student
    and critic are adapters on the teacher's very weights: what a network is, is which adapters it calls.

    Attributes:
        teacher: the frozen network v.
        shift: the teacher's static shift of times.
        scheduler: what a student is drawn with.

    Raises:
        ValueError: for a teacher that embeds guidance, too.
    """

    save_pipeline = staticmethod(save_flow_student)
    save_lora = staticmethod(save_flow_lora)
    teacher: FlowTransformer

    def __init__(
        self,
        run: Run,
        settings: DistillationSettings,
        prompts: Sequence[str],
        *,
        method: str,
        image_free: bool = False,
        shift: float | None = None,
    ) -> None:
        super().__init__(run, settings, prompts, method=method, image_free=image_free)
        tokens = self.backbone.image_tokens(self.teacher.transformer, self.latent_shape)
        self.shift = flow_shift(self.folder, tokens) if shift is None else shift
        self.scheduler = FlowStudentScheduler(self.shift, self._drawn_with)

    def add_networks(
        self, *, every: int, critic_learning_rate: float, timed_critic: bool = False
    ) -> tuple[nn.Module, nn.Module]:
        """Make student and critic, both equal to the teacher, and add them to the run; the memory plan is printed.

        Args:
            every: the student is updated in every so many steps of the run, the critic in every one.
            critic_learning_rate: after the warm-up, which is the student's.
            timed_critic: make the critic a `TimedCritic`.

        Returns:
            The prepared student and critic, giving v.
        """
        student = self._make_network()
        critic = copy_trained(student)  # adapters start alike too: what is merged of them are their factors
        if timed_critic:
            critic = TimedCritic(critic, self.negative_text.embeds.shape[-1]).to(self.run.device)
        # A prompt's rows in the student's pass: a point on the rollout and one off it
        return self._add_pair(
            student, critic, rows_per_prompt=2, every=every, critic_learning_rate=critic_learning_rate
        )

    def _make_network(self) -> FlowTransformer:
        transformer = self._make_student()
        if self.settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        return FlowTransformer(transformer, self.teacher.timestep_scale).to(self.run.device)

    def _find_backbone(self) -> Backbone:
        if self._teacher_embeds_guidance():
            raise ValueError(
                "`pretrained_model_name_or_path` names a teacher that embeds guidance: it has no unconditional branch,"
                " which this method's guidance term asks for"
            )
        return super()._find_backbone()

    def _see_teacher(self, transformer: nn.Module, timestep_scale: float) -> FlowTransformer:
        return FlowTransformer(transformer, timestep_scale)

    def _make_student(self) -> Any:
        if self.settings.rank is None:
            student = copy.deepcopy(self.teacher.transformer).float().requires_grad_(True)
        else:
            student = self._adapted(adapt)
        self.backbone.name_timestep_scale(student, self.teacher.timestep_scale)
        return student

    def _first_output(self, transformer: Any, noise: torch.Tensor) -> torch.Tensor:
        return FlowTransformer(transformer, self.teacher.timestep_scale)(
            noise, torch.ones(1, device=noise.device), **self.negative_text.arguments()
        )

    def _pipeline(self, vae: Any, transformer: Any) -> Any:
        return self.backbone.make_pipeline(vae, transformer, self.scheduler)

    def _how_to_draw(self, folder: Path) -> str:
        return f'{PROGRAM} generate --model "{folder}" --steps 4 --prompt "a prompt" --out picture.png'
