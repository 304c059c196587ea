"""Consistency students of a dense-time teacher: TBCM's, sCM's, Sana-Sprint's and LCM's."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbones import Backbone, find_backbone
from ..components import SCHEDULER_CONFIG
from ..dual import checkpoint_dual
from ..errors import in_a_line
from ..evaluation.generate import PROGRAM
from ..export.folders import save_flow_lora, save_flow_student, save_student_lora, save_student_pipeline
from ..files import read_json
from ..flow import FlowTransformer
from ..lora import adapt, copy_trained, make_lora_student
from ..loss import LogvarHead, StudentWithLogvar
from ..pipeline_folder import SCHEDULER, TRANSFORMER, digest_component, resolve_teacher
from ..pipeline_sana_tbcm import SanaTBCMPipeline
from ..rows import TrainingRows
from ..scheduling_flow import FlowStudentScheduler
from ..scheduling_tbcm import MAX_TIMESTEP, TIMESTEPS_BY_STEPS, TBCMScheduler
from ..trigflow import SIGMA_DATA, TrigFlowTransformer
from .distillation import Distillation
from .run import Run
from .settings import RowSettings


@contextmanager
def named_as_start(start: str) -> Iterator[None]:
    """Say of a fault which flag it is of."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(
            f"`student_model_name_or_path` {start!r} is no consistency student of this teacher: {in_a_line(error)}"
        ) from error


class ConsistencyDistillation(Distillation):
    """A teacher seen as the TrigFlow network F, and students of it; as `Distillation`.

    A student takes the guidance scale as an input where its family has one, and learns a single scale where not.

    Args:
        start: folder or Hub id of the student to begin with; None for the teacher.

    Attributes:
        teacher: the frozen network F.
        scheduler: what a student is drawn with.

    Raises:
        ValueError: for a teacher that is not in dense time, for several guidance scales that the student could not
            tell apart, and for a start that is no consistency student of the teacher's family, too.
    """

    settings: RowSettings
    teacher: TrigFlowTransformer

    def __init__(
        self,
        run: Run,
        settings: RowSettings,
        prompts: Sequence[str],
        *,
        method: str,
        image_free: bool = False,
        start: str | None = None,
    ) -> None:
        self._start, self._start_share = start, 0.0
        self._start_folder: Path | None = None
        super().__init__(run, settings, prompts, method=method, image_free=image_free)
        size = ("height", "width") if settings.resolution is None else ()
        drawn_with = {name: value for name, value in self._drawn_with.items() if name not in size}
        self.scheduler: TBCMScheduler | FlowStudentScheduler
        if self.backbone.STUDENT_EMBEDS_GUIDANCE:
            later = settings.intermediate_timesteps
            own = {} if later is None else {str(len(later) + 1): [MAX_TIMESTEP, *later, 0.0]}
            self.scheduler = TBCMScheduler(
                sigma_data=SIGMA_DATA,
                timesteps_by_steps={**TIMESTEPS_BY_STEPS, **own},
                stochastic_sampling=settings.stochastic_sampling,
                guidance_scales=settings.guidance_scales,
                call_options=drawn_with,
            )
            self.save_pipeline, self.save_lora = save_student_pipeline, save_student_lora
            self.beside_lora = ", guidance embedder"
        else:
            self.scheduler = FlowStudentScheduler(call_options=drawn_with, stochastic_sampling=True)
            self.save_pipeline, self.save_lora = save_flow_student, save_flow_lora

    @property
    def inner_dim(self) -> int:
        """Size of the teacher's hidden states."""
        return self.backbone.inner_dim(self.teacher.transformer)

    def condition(self, rows: TrainingRows) -> dict[str, torch.Tensor | None]:
        """Give what a student is called with beside x_t and t: the text, and guidance where it embeds it.

        Args:
            rows: what it is called on.

        Returns:
            Arguments by name.
        """
        guidance = rows.guidance_scale if self.backbone.STUDENT_EMBEDS_GUIDANCE else None
        return {**rows.text.arguments(), "guidance": guidance}

    def add_student(self, rows_per_prompt: int, *, weighting: str = "learned") -> nn.Module:
        """Make the student, with a logvar head if the weight is learnt, and add it; the memory plan is printed.

        Args:
            rows_per_prompt: rows that it will see of every prompt.
            weighting: of the loss, one of `loss.LOSS_WEIGHTINGS`.

        Returns:
            The prepared model, giving F and the log-variance, 0 without a head.
        """
        run, settings = self.run, self.settings
        student = self._make_network()
        head = LogvarHead(student.time_dim) if weighting == "learned" else None
        model = StudentWithLogvar(student, head).to(run.device)
        self.teacher.to(run.weight_dtype)
        self._print_memory_plan({"student": model}, rows_per_prompt, guided=self.backbone.STUDENT_EMBEDS_GUIDANCE)
        self._compile(self.teacher.transformer, student.transformer)
        return run.add(
            "student",
            model,
            exported="student.transformer",
            lr_scheduler=settings.lr_scheduler,
            ema=settings.use_ema,
        )

    def add_student_and_critic(
        self,
        rows_per_prompt: int,
        *,
        start_share: float,
        every: int,
        critic_learning_rate: float,
    ) -> tuple[nn.Module, nn.Module]:
        """Make a student and its critic, which begins as the teacher, and add them; the memory plan is printed.

        Args:
            rows_per_prompt: rows that both will see of every prompt.
            start_share: of the start's weights, in those of the student that is drawn and saved (as in arXiv
                2109.01903).
            every: the student is updated in every so many steps of the run, the critic in every one.
            critic_learning_rate: after the warm-up, which is the student's.

        Returns:
            The prepared student, giving F, and critic, giving the velocity v; both are called with `condition`.

        Raises:
            ValueError: for a start whose layers are not those of a student of this teacher.
        """
        device = self.run.device
        student = self._make_network().to(device)
        critic = FlowTransformer(copy_trained(student.transformer), self.teacher.timestep_scale).to(device)
        began_as, self._start_share = "the teacher", start_share
        if self._start_folder is not None:
            student.transformer.load_state_dict(self._start_weights(self._start_folder, student.transformer))
            began_as = self._digests["student_model_name_or_path"]
        self.run.depends_on(start=began_as)
        return self._add_pair(
            student,
            critic,
            rows_per_prompt=rows_per_prompt,
            every=every,
            critic_learning_rate=critic_learning_rate,
            guided=self.backbone.STUDENT_EMBEDS_GUIDANCE,
        )

    @cached_property
    def velocity(self) -> FlowTransformer:
        """The teacher seen as the velocity v."""
        return FlowTransformer(self.teacher.transformer, self.teacher.timestep_scale)

    def _make_network(self) -> TrigFlowTransformer:
        transformer = self._make_student()
        if self.settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing(checkpoint_dual)
        return TrigFlowTransformer(transformer, self.teacher.timestep_scale)

    def _find_start(self, start: str, backbone: Backbone) -> Path:
        """The folder of the student to begin with; by its configs, a consistency student of the family."""
        with named_as_start(start):
            folder = resolve_teacher(start)
            if find_backbone(folder) is not backbone:
                raise ValueError("its transformer is of another family")
            scheduler = read_json(folder / SCHEDULER / SCHEDULER_CONFIG)
            if not (backbone.STUDENT_EMBEDS_GUIDANCE or scheduler.get("stochastic_sampling")):
                raise ValueError("its scheduler takes no consistency steps, as one of CDM or a teacher's")
        return folder

    def _start_weights(self, folder: Path, transformer: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of the student to begin with, for a network."""
        with named_as_start(str(self._start)):
            weights, own = find_backbone(folder).load_transformer(folder).state_dict(), transformer.state_dict()
            if {name: weights[name].shape for name in weights} != {name: own[name].shape for name in own}:
                raise ValueError("its transformer has other layers")
            digest = digest_component(folder, TRANSFORMER)
        self._unchanged("student_model_name_or_path", str(self._start), digest)
        return weights

    def _load_student(self, weights: Mapping[str, torch.Tensor]) -> Any:
        student = super()._load_student(weights)
        if self._start_folder is not None and self._start_share:
            start = self._start_weights(self._start_folder, student)
            for name, weight in student.state_dict().items():
                weight.lerp_(start[name].to(weight), self._start_share)
        return student

    def _training_table(self) -> dict[str, Any]:
        table, scales = super()._training_table(), self.settings.guidance_scales
        own = [self.backbone.guidance_arguments(scale, 1).get("guidance_scale", scale) for scale in scales]
        if own != scales:
            words, pipeline = ", ".join(f"{scale:g}" for scale in own), self.backbone.PIPELINE_CLASS.__name__
            table["guidance scales"] += f", {words} as `guidance_scale` of `{pipeline}`"
        return table

    def _find_backbone(self) -> Backbone:
        backbone, scales = super()._find_backbone(), self.settings.guidance_scales
        if not backbone.STUDENT_EMBEDS_GUIDANCE:
            if len({*scales}) > 1:
                raise ValueError(
                    f"`guidance_scales` is {scales}: a student of {backbone.PIPELINE_CLASS.__name__} does not embed"
                    " guidance and learns one scale: give one, such as 4.5"
                )
            self.settings.check_stock_sampling(
                f"is for students of Sana, those of {backbone.PIPELINE_CLASS.__name__} have a stock scheduler"
            )
        if self._start is not None:
            self._start_folder = self._find_start(self._start, backbone)
        return backbone

    def _see_teacher(self, transformer: nn.Module, timestep_scale: float) -> TrigFlowTransformer:
        if self.backbone.in_dense_time(transformer, timestep_scale):
            return TrigFlowTransformer(transformer, timestep_scale)
        if timestep_scale == 1:
            smooth = "" if self.backbone.embeds_guidance(transformer) else f" To make it smooth: {self._prepare()}"
            self.run.say(f"This teacher embeds 1000 s: its tangent may be rough.{smooth}")
        elif not self.settings.allow_plain_teacher:
            raise ValueError(
                "`pretrained_model_name_or_path` names a plain teacher, which sees time multiplied by"
                f" {timestep_scale:g}: consistency training wants dense time. Prepare it first, and give what comes"
                f" out as teacher: {self._prepare()} -- or distil it by CDM with train_cdm.py (`allow_plain_teacher`"
                " trains on it as it is)"
            )
        elif self.settings.validation_prompts and self.backbone.STUDENT_EMBEDS_GUIDANCE:
            raise ValueError(
                f"`validation_prompts` cannot be drawn: the teacher sees time multiplied by {timestep_scale:g}, which"
                " the Sana-Sprint pipelines do not; leave them out"
            )
        return TrigFlowTransformer(transformer, timestep_scale)

    def _prepare(self) -> str:
        """The command line that prepares the teacher for this run."""
        names = ("pretrained_model_name_or_path", "variant", "prompts_file", "dataset_name", "dataset_config_name")
        flags = {name: getattr(self.settings, name, None) for name in (*names, "caption_column", "resolution")}
        if flags["prompts_file"] is None and flags["dataset_name"] is None:
            flags["prompts_file"] = "PROMPTS"  # of a run on a folder of pictures
        flags["output_dir"] = f"{self.run.output_dir}-teacher"
        words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
        return shlex.join([PROGRAM, "train", "prepare_teacher", *words])

    def _make_student(self) -> Any:
        embeds_guidance = self.backbone.STUDENT_EMBEDS_GUIDANCE
        if self.settings.rank is None:
            student = self.backbone.make_student(self.teacher.transformer)
        else:
            student = self._adapted(make_lora_student if embeds_guidance else adapt)
        if embeds_guidance:  # its pipeline feeds s itself whatever its config says; LoRA's record asks for the time
            student.register_to_config(timestep_scale=self.teacher.timestep_scale)
        return student

    def _first_output(self, transformer: Any, noise: torch.Tensor) -> torch.Tensor:
        network = TrigFlowTransformer(transformer, self.teacher.timestep_scale)
        t, guidance = (
            torch.full((1,), value, device=noise.device) for value in (math.pi / 2, self.settings.guidance_scales[0])
        )
        embedded = guidance if network.guidance_embeds else None
        return network(noise, t, **self.negative_text.arguments(), guidance=embedded)

    def _pipeline(self, vae: Any, transformer: Any) -> Any:
        if self.backbone.STUDENT_EMBEDS_GUIDANCE:
            return SanaTBCMPipeline(None, None, vae, transformer, self.scheduler)
        return self.backbone.make_pipeline(vae, transformer, self.scheduler)

    def _how_to_draw(self, folder: Path) -> str:
        if self.backbone.STUDENT_EMBEDS_GUIDANCE:
            return f'SanaTBCMPipeline.from_pretrained("{folder}")("a prompt").images[0]'
        return f'{PROGRAM} generate --model "{folder}" --steps 4 --prompt "a prompt" --out picture.png'
