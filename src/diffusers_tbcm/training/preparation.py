"""A plain teacher made into one in dense time: what consistency training starts from."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from peft import get_peft_model_state_dict
from PIL import Image
from torch import nn

from ..backbones import Backbone, sana
from ..components import MODEL_CONFIG
from ..dense_time import (
    EmbeddingFit,
    branch_inputs,
    branch_velocities,
    compare_embeddings,
    relative_error,
    time_response,
    to_dense_time,
)
from ..digests import digest_texts
from ..errors import loading_by_name
from ..evaluation.drawing import draw_pictures, load_lora, lora_record, numbered_generators
from ..evaluation.features import pictures_to_tensor
from ..evaluation.generate import PROGRAM
from ..export.folders import save_prepared_teacher, stock_scheduler
from ..export.model_card import SHOWN_GUIDANCE_SCALE
from ..export.record import StudentDescription
from ..files import read_json
from ..flow import FlowTransformer
from ..lora import adapt, merge_lora
from ..pipeline_folder import TRANSFORMER, flow_shift
from ..qk_norm import fit_norms, train_norms, with_qk_norm
from ..rows import Recording, TrainingRows
from ..text import Text
from .distillation import Distillation
from .run import Run
from .settings import DistillationSettings


logger = logging.get_logger(__name__)

DRAWN_STEPS = 20  # of the validation's pictures, by both networks


class Preparation(Distillation):
    """A plain teacher v and the network v' in dense time that is to be equal to it; as `Distillation`.

    v' is fitted as soon as the teacher is known to be fit; it has the teacher's weights, but for the embedder of time.

    Args:
        lora: folder, file or Hub id of LoRA weights to merge into the teacher first; None for none.
        lora_scale: what they are multiplied by.
        qk_norm: whether `normalise` will be called.

    Attributes:
        teacher: the frozen network v, LoRA merged.
        prepared: v' before any training.
        fit: how close its embedding of time is.
        shift: the teacher's static shift of times.

    Raises:
        ValueError: for a teacher that is in dense time already, embeds guidance, or has no queries and keys to
            normalise, and for a LoRA that is none of it.
    """

    teacher: FlowTransformer

    def __init__(
        self,
        run: Run,
        settings: DistillationSettings,
        prompts: Sequence[str],
        *,
        method: str,
        lora: str | None = None,
        lora_scale: float = 1.0,
        qk_norm: bool = False,
    ) -> None:
        self._lora, self._lora_scale, self._lora_digest = lora, lora_scale, "none"
        self._qk_norm = qk_norm
        self._norms: dict[str, torch.Tensor] = {}  # weights, as they were fitted
        if qk_norm:
            self.beside_lora = ", norms of queries and keys"
        super().__init__(run, settings, prompts, method=method, image_free=True)
        run.depends_on(lora=self._lora_digest)
        self.scheduler = stock_scheduler(self.folder)
        tokens = self.backbone.image_tokens(self.teacher.transformer, self.latent_shape)
        self.shift = flow_shift(self.folder, tokens)
        self.prepared = to_dense_time(self.teacher)
        self.fit: EmbeddingFit = compare_embeddings(self.teacher, self.prepared)
        run.say(f"The new embedding of time: {self._fit_in_words()}")
        self._held_out: list[TrainingRows] = []
        self._measured: dict[str, tuple[float, float]] = {}  # relative error and answer to time, by the network
        self._psnr: float | None = None

    def hold_out(self, recordings: Iterable[Recording]) -> None:
        """Measure how close v' is before any training, and keep what it is measured on for the end.

        Args:
            recordings: of `record_branches`, which training does not see.

        Raises:
            ValueError: where all are empty, as the teacher gave no numbers.
        """
        self._held_out = rows_by_prompt(recordings)
        self._measured["teacher"] = self._measure(self.teacher)
        self._measured["fitted"] = self._measured["before"] = self._measure(self.prepared)
        self.run.say(f"In dense time the relative error of v' is {self._measured['fitted'][0]:.2g}")

    def normalise(self, recordings: Iterable[Recording]) -> None:
        """Normalise the queries and keys of v', and measure how close it is then.

        Args:
            recordings: of `record_branches`, other trajectories than those that were held out.

        Raises:
            ValueError: where all are empty, as the teacher gave no numbers.
        """
        self._norms = fit_norms(self.prepared, rows_by_prompt(recordings), self.negative_text)
        self.prepared = with_qk_norm(self.prepared, self._norms)
        self._measured["before"] = self._measure(self.prepared)
        self.run.say(f"With queries and keys normalised it is {self._measured['before'][0]:.2g}")

    def add_prepared(self, rows_per_prompt: int) -> nn.Module:
        """Make v' ready to be trained and add it; the memory plan is printed.

        Args:
            rows_per_prompt: rows that it will see of every prompt, both branches counted.

        Returns:
            The prepared model, giving v'.
        """
        settings, run = self.settings, self.run
        transformer = self._make_student()
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        model = FlowTransformer(transformer, self.prepared.timestep_scale).to(run.device)
        self.teacher.to(run.weight_dtype)  # v' has copied it by now, or shares it
        self._print_memory_plan({"student": model}, rows_per_prompt)
        self._compile(self.teacher.transformer, transformer)
        return run.add(
            "student", model, exported="transformer", lr_scheduler=settings.lr_scheduler, ema=settings.use_ema
        )

    def _find_backbone(self) -> Backbone:
        if self._teacher_embeds_guidance():
            raise ValueError(
                "`pretrained_model_name_or_path` names a teacher that embeds guidance: only one with an unconditional"
                " branch can be prepared"
            )
        backbone = super()._find_backbone()
        if self._qk_norm and backbone is not sana:
            raise ValueError(
                f"`qk_norm` is for a Sana alone, and the teacher is a {backbone.PIPELINE_CLASS.__name__}: leave it out"
            )
        if self._qk_norm and read_json(self.folder / TRANSFORMER / MODEL_CONFIG).get("qk_norm"):
            raise ValueError("`qk_norm`: the teacher normalises its queries and keys already: leave it out")
        return backbone

    def _load_teacher(self) -> Any:
        transformer = super()._load_teacher()
        if self._lora is not None:
            digest = merge_teachers_lora(self.backbone, transformer, self.folder, self._lora, self._lora_scale)
            self._lora_digest = self._unchanged("lora", self._lora, digest)
        return transformer

    def _see_teacher(self, transformer: nn.Module, timestep_scale: float) -> FlowTransformer:
        teacher = FlowTransformer(transformer, timestep_scale)
        if self.backbone.in_dense_time(transformer, timestep_scale):
            raise ValueError(
                "`pretrained_model_name_or_path` names a teacher that is in dense time already: distil it as it is"
                f" ({PROGRAM} train tbcm_distill)"
            )
        return teacher

    def _make_student(self) -> Any:
        fitted = self.prepared.transformer
        if self.settings.rank is None:
            student = copy.deepcopy(fitted).float().requires_grad_(True)
            # The embedder is as good as it gets, and Adam would move it far
            student.get_submodule(self.backbone.TIME_EMBEDDER).requires_grad_(False)
            return student
        student = self._adapted(lambda teacher, **options: adapt(fitted, **options))
        if self._norms:
            train_norms(student)
        return student

    def _first_output(self, transformer: Any, noise: torch.Tensor) -> torch.Tensor:
        one = torch.ones(1, device=noise.device)
        return self._see_prepared(transformer)(noise, one, **self.negative_text.arguments())

    def _pipeline(self, vae: Any, transformer: Any) -> Any:
        return self.backbone.make_pipeline(vae, transformer, copy.deepcopy(self.scheduler))

    def _how_to_draw(self, folder: Path) -> str:
        guidance = self.backbone.guidance_arguments(SHOWN_GUIDANCE_SCALE, 1)
        arguments = "".join(f", {name}={value}" for name, value in guidance.items())
        pipeline = f'{self.backbone.PIPELINE_CLASS.__name__}.from_pretrained("{folder}")'
        return f'{pipeline}(prompt="a prompt"{arguments}).images[0]'

    def _draw_columns(
        self, transformer: Any, prompts: Sequence[str]
    ) -> Iterator[tuple[str, int | None, list[Image.Image]]]:
        """What the stock pipeline draws with v and with v' from the same noise."""
        vae = self.backbone.load_vae(self.folder, self.settings.variant).to(transformer.device)
        both = Text.cat([self.negative_text.expand(len(prompts)), self.encode([*prompts])])
        negative, text = both[: len(prompts)], both[len(prompts) :]
        unprompted = {f"negative_{name}": part for name, part in self.backbone.text_arguments(negative).items()}
        drawn = []
        for label, network in (("teacher", self.teacher.transformer), ("prepared", transformer)):
            pipeline = self._pipeline(vae, network)
            pipeline.set_progress_bar_config(disable=True)
            pictures = draw_pictures(
                pipeline,
                text,
                numbered_generators(self.run.settings.seed),
                num_inference_steps=DRAWN_STEPS,
                negative_prompt=None,
                **unprompted,
                height=self.resolution,
                width=self.resolution,
                **self.backbone.CALL_OPTIONS,
                **self.backbone.GUIDED_OPTIONS,
            )
            drawn.append(list(pictures))
            yield f"{label}, {DRAWN_STEPS} steps", None if label == "teacher" else DRAWN_STEPS, drawn[-1]
        error = (pictures_to_tensor(drawn[0]) - pictures_to_tensor(drawn[1])).square().mean((1, 2, 3))
        self._psnr = -10 * error.clamp(min=1e-10).log10().mean().item()
        self.run.say(f"Pictures of step {self.run.step}: PSNR {self._psnr:.1f} dB to the teacher's")

    def _save_and_push(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self.run.step:
            weights = self._closer(weights)
        super()._save_and_push(weights)

    def _closer(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Weights of the alignment, or those that it began with where it has come no closer to v."""
        aligned = self._measure(self._see_prepared(self._whole(self._load_student(weights))))
        self._measured["aligned"] = aligned
        self.run.say(f"After {self.run.step} steps of alignment the relative error of v' is {aligned[0]:.2g}")
        if aligned[0] < self._measured["before"][0]:
            return weights
        logger.warning(
            f"After {self.run.step} steps the relative error of v' is {aligned[0]:.2g}, not below"
            f" {self._measured['before'][0]:.2g} before: alignment is left out of what is saved (a lower"
            " `learning_rate` may help)"
        )
        if self.settings.rank is not None:
            return {name: weight * ("lora_B" not in name) for name, weight in weights.items()} | self._norms
        transformer = self._load_teacher()
        fresh = to_dense_time(FlowTransformer(transformer.to(self.run.device), self.teacher.timestep_scale))
        return (with_qk_norm(fresh, self._norms) if self._norms else fresh).transformer.state_dict()

    def _see_prepared(self, transformer: Any) -> FlowTransformer:
        """A network v' as a velocity."""
        return FlowTransformer(transformer, self.prepared.timestep_scale)

    def _whole(self, transformer: Any) -> Any:
        """A network without adapters."""
        return transformer if self.settings.rank is None else merge_lora(transformer)

    def _save(self, transformer: Any, description: StudentDescription) -> Path:
        """Save v', its adapters merged, as a pipeline; the folder to publish."""
        settings, folder = self.settings, self.run.output_dir
        whole = self._whole(transformer)
        self._measured["saved"] = self._measure(self._see_prepared(whole))
        table = {**description.training, **self._how_close()}
        save_prepared_teacher(
            whole,
            settings.pretrained_model_name_or_path,
            folder,
            replace(description, training=table),
            variants=settings.export_variants,
            teacher_variant=settings.variant,
        )
        guidance = "" if self.backbone.STUDENT_EMBEDS_GUIDANCE else f" --guidance_scales {SHOWN_GUIDANCE_SCALE}"
        self._tell(
            f"Done. Distil it:\n  {PROGRAM} train tbcm_distill --pretrained_model_name_or_path {folder} --prompts_file"
            f" PROMPTS --output_dir OUT{guidance}"
        )
        return folder

    @torch.no_grad()
    def _measure(self, network: FlowTransformer) -> tuple[float, float]:
        """Relative error to v, and median of ‖dv/ds‖ / ‖v‖, on what was held out."""
        found, responses = [], []
        for rows in self._held_out:
            sample, s, text = branch_inputs(rows, self.negative_text)
            found.append(network(sample, s, **text.arguments()))
            responses.append(time_response(network, rows, self.negative_text))
        target = torch.cat([branch_velocities(rows) for rows in self._held_out])
        return relative_error(torch.cat(found), target), torch.cat(responses).median().item()

    def _fit_in_words(self) -> str:
        fit = self.fit
        return (
            f"relative residual {fit.residual:.2g}, of the modulation {fit.modulation_residual:.2g}; median"
            f" ‖de/ds‖ / ‖e‖ {fit.slope_after:.2g}, the teacher's {fit.slope_before:.2g}"
        )

    def _how_close(self) -> dict[str, Any]:
        """What the card says of v' beside v."""
        before, saved = self._measured["before"][0], self._measured["saved"]
        error = f"{before:.2g}"
        if self._norms:
            error = f"{self._measured['fitted'][0]:.2g} in dense time, {error} with queries and keys normalised"
        if "aligned" in self._measured:
            aligned = self._measured["aligned"][0]
            error += f" before alignment, {aligned:.2g} after" + (", which was left out" if aligned >= before else "")
        table: dict[str, Any] = {
            "embedding of time": self._fit_in_words(),
            "relative error of v'": error,
            "median ‖dv/ds‖ / ‖v‖": f"{saved[1]:.3g}, the teacher's {self._measured['teacher'][1]:.3g}",
        }
        if self._psnr is not None:
            table["pictures"] = f"PSNR {self._psnr:.1f} dB to the teacher's at {DRAWN_STEPS} steps from the same noise"
        return table

    def _training_table(self) -> dict[str, Any]:
        merged = (
            {} if self._lora is None else {"LoRA merged into the teacher": f"{self._lora}, scale {self._lora_scale:g}"}
        )
        return {**super()._training_table(), **merged}


def rows_by_prompt(recordings: Iterable[Recording]) -> list[TrainingRows]:
    """Take recordings apart, into what one pass of a measurement sees.

    Args:
        recordings: of `record_branches`; each may be empty.

    Returns:
        The rows of every prompt.

    Raises:
        ValueError: where all are empty, as the teacher gave no numbers.
    """
    rows = [
        recording.select(prompt).rows()
        for recording in recordings
        for prompt in torch.arange(len(recording.guidance_scale)).split(1)
        if len(prompt)
    ]
    if not rows:
        raise ValueError("`pretrained_model_name_or_path` names a teacher whose own trajectories are not finite")
    return rows


def merge_teachers_lora(backbone: Backbone, transformer: Any, folder: Path, lora: str, scale: float) -> str:
    """Add LoRA weights to a teacher's network, in place, as its stock pipeline loads them.

    Args:
        backbone: the teacher's family.
        transformer: the network, in float32.
        folder: the teacher's pipeline folder.
        lora: folder, file or Hub id of the weights.
        scale: what they are multiplied by.

    Returns:
        A digest of them.

    Raises:
        ValueError: where they are not found or damaged, are not of this network, or make a few-step student of it.
    """
    if lora_record(lora).get("adapter"):
        raise ValueError(
            f"`lora` {lora!r} makes a few-step student of its teacher: give a LoRA of the many-step model, or none"
        )
    pipeline = backbone.make_pipeline(None, transformer, stock_scheduler(folder))
    with loading_by_name("lora", lora, "LoRA weights"):
        load_lora(pipeline, lora)
    if not getattr(transformer, "peft_config", {}):
        raise ValueError(f"`lora` {lora!r} has no layer of the teacher's transformer: it is another model's")
    (adapter,) = transformer.peft_config
    tensors = sorted(get_peft_model_state_dict(transformer, adapter_name=adapter).items())
    digest = digest_texts(
        f"{name} {tensor.double().sum().item()!r} {tensor.double().norm().item()!r}" for name, tensor in tensors
    )
    transformer.fuse_lora(lora_scale=scale)
    transformer.unload_lora()
    return digest
