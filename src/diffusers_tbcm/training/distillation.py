"""The teacher of a distillation run, what encodes its prompts, and the students made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from ..backbones import Backbone, find_backbone, text_components
from ..components import MODEL_CONFIG
from ..data.embeddings import EmbeddingCache, PromptEncoder, encoder_fingerprint, precompute_embeddings
from ..data.latents import LatentCache, latents_fingerprint, precompute_latents
from ..data.pictures import CaptionedImages
from ..digests import digest_texts
from ..draws import draw_generator, draw_noise
from ..errors import Failure, in_a_line
from ..evaluation.drawing import call_options, draw_pictures, numbered_generators
from ..evaluation.grid import image_grid
from ..export.folders import check_target
from ..export.record import Sample, StudentDescription
from ..files import WRITE_ERRORS, read_json
from ..flow import FlowTransformer
from ..lora import merge_lora
from ..pipeline_folder import LORA, TRANSFORMER, VALIDATION, digest_component, resolve_teacher
from .accelerators import ending_together
from .health import all_finite
from .memory import memory_plan
from .optimizers import state_bytes
from .run import Run
from .settings import DistillationSettings


logger = logging.get_logger(__name__)

VALIDATION_STEPS = (1, 2, 4)


class Distillation(ABC):
    """The frozen teacher of a run, what encodes its prompts, and the students made of it.

    A kind of student says how it sees its teacher, and how it is made, drawn with and saved.

    Args:
        run: the run; its `output_dir` is opened once teacher and Hub are found to be fit.
        settings: the run's.
        prompts: every prompt that will be trained on; validation's come with them.
        method: what the card calls it.
        image_free: whether it trains on prompts alone.

    Attributes:
        folder: the teacher's pipeline folder.
        teacher: the frozen network, in the training precision once the student was made of it.
        encode: embeds a list of prompts as a `Text`.
        negative_text: the empty prompt, classifier-free guidance's.
        latent_shape: of one picture, without the batch.

    Raises:
        ValueError: where the teacher, the resolution, the launch or the Hub's access does not fit.
    """

    def __init__(
        self,
        run: Run,
        settings: DistillationSettings,
        prompts: Sequence[str],
        *,
        method: str,
        image_free: bool = False,
    ) -> None:
        if settings.rank is not None and run.accelerator.is_fsdp2:
            raise ValueError("`rank` shares the base's weights with the teacher, which FSDP2 would shard: use DDP")
        self.run, self.settings, self.prompts = run, settings, prompts
        self.method, self.image_free = method, image_free
        self._digests: dict[str, str] = {}  # of what settings name and the run reads more than once
        self.folder = resolve_teacher(settings.pretrained_model_name_or_path, settings.variant)
        self.backbone = self._find_backbone()
        transformer = self._load_teacher()
        self.latent_shape = self.backbone.latent_shape(self.folder, transformer, settings.resolution)
        self.max_sequence_length = self.backbone.prompt_tokens(self.folder, settings.max_sequence_length)
        run.depends_on(
            method=method,
            teacher=self._teacher_digest(),
            prompts=digest_texts(prompts),
            resolution=str(self.resolution),
        )
        if settings.rank is not None:
            check_target(run.output_dir / LORA, self.folder, lora=True)
        if settings.rank is None or settings.merge_lora:
            check_target(run.output_dir, self.folder, teacher_variant=settings.variant)
        run.check_push(self.folder)
        run.open_folder()

        self.encode = self._make_encoder()
        self.negative_text = self.encode([""])
        transformer.requires_grad_(False).eval().to(run.device)
        timestep_scale = self.backbone.infer_timestep_scale(transformer, self.negative_text)
        self.teacher = self._see_teacher(transformer, timestep_scale)

    beside_lora = ""  # what trains with the adapters, for the card
    save_pipeline: Callable[..., Path]  # of `export.folders`
    save_lora: Callable[..., Path]
    scheduler: Any  # what a student is drawn with

    def _find_backbone(self) -> Backbone:
        """The teacher's family, one that the method has students of."""
        return find_backbone(self.folder)

    def _teacher_embeds_guidance(self) -> bool:
        """Whether the teacher's network takes the guidance scale as an input, before it is loaded."""
        return bool(read_json(self.folder / TRANSFORMER / MODEL_CONFIG).get("guidance_embeds"))

    def _load_teacher(self) -> Any:
        """The teacher's network, in float32."""
        return self.backbone.load_transformer(self.folder, self.settings.variant)

    def _teacher_digest(self) -> str:
        """The digest of what the teacher's network and text encoders are loaded from."""
        components = (TRANSFORMER, *text_components(self.backbone))
        digest = digest_texts(digest_component(self.folder, name, self.settings.variant) for name in components)
        return self._unchanged("pretrained_model_name_or_path", self.settings.pretrained_model_name_or_path, digest)

    def _unchanged(self, name: str, value: str, digest: str) -> str:
        """The digest of what a setting names, refused where it was another when the run began."""
        if self._digests.setdefault(name, digest) != digest:
            raise ValueError(
                f"`{name}` {value!r} was changed since the run began: put back what was there, then"
                " `resume_from_checkpoint` latest goes on"
            )
        return digest

    @abstractmethod
    def _see_teacher(self, transformer: nn.Module, timestep_scale: float) -> FlowTransformer:
        """The teacher as the student's method takes it, or what is wrong with it."""

    @abstractmethod
    def _make_student(self) -> Any:
        """A student's transformer, equal to its teacher: of weights of its own, or of adapters on the teacher's."""

    @abstractmethod
    def _first_output(self, transformer: Any, noise: torch.Tensor) -> torch.Tensor:
        """What a student's transformer makes of noise for the empty prompt."""

    @abstractmethod
    def _pipeline(self, vae: Any, transformer: Any) -> Any:
        """What draws with a student."""

    @abstractmethod
    def _how_to_draw(self, folder: Path) -> str:
        """The line that draws with a student's folder."""

    @property
    def resolution(self) -> int:
        """Pixels a side of what is drawn and encoded."""
        return self.latent_shape[-1] * self.backbone.vae_scale_factor(self.folder)

    @property
    def _reading(self) -> dict[str, Any]:
        """How prompts are read."""
        return {
            "complex_human_instruction": self.backbone.INSTRUCTION
            if self.settings.complex_human_instruction
            else None,
            "max_sequence_length": self.max_sequence_length,
        }

    @property
    def _drawn_with(self) -> dict[str, Any]:
        """What a student was distilled with, in the words of its pipeline's call."""
        size = {"height": self.resolution, "width": self.resolution}
        return {name: value for name, value in self._reading.items() if name in self.backbone.READING_OPTIONS} | size

    @property
    def num_blocks(self) -> int:
        """How many blocks the teacher has."""
        return len(self.backbone.blocks(self.teacher.transformer))

    def cache_latents(self, images: CaptionedImages, folder: str | None) -> LatentCache:
        """Encode pictures once, before training, in float32; every process takes its share.

        Args:
            images: the pictures.
            folder: where their latents are or go; `latents` in the run's folder by default.

        Returns:
            What gives the latents of pictures, by number.
        """
        run = self.run
        cache = Path(folder or run.output_dir / "latents")
        variant = self.settings.variant
        fingerprint = latents_fingerprint(
            images, self.folder, resolution=self.resolution, dtype=torch.float32, variant=variant
        )
        run.depends_on(pictures=digest_texts(map(str, sorted(fingerprint.items()))))
        with ending_together(run.accelerator):
            precompute_latents(
                images,
                lambda: self.backbone.load_vae(self.folder, variant).to(run.device),
                cache,
                fingerprint,
                backbone=self.backbone,
                resolution=self.resolution,
                process_index=run.accelerator.process_index,
                num_processes=run.accelerator.num_processes,
            )
        return LatentCache(cache, fingerprint)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents, one at a time.

        Args:
            latents: on unit scale, (batch, channels, height, width).

        Returns:
            Pictures in [0, 1], (batch, 3, height, width), on the CPU.
        """
        vae = self.backbone.load_vae(self.folder, self.settings.variant).to(self.run.device)
        return torch.cat([self.backbone.decode_latents(vae, one).cpu() for one in latents.split(1)]) / 2 + 0.5

    def show_when_due(self, student: nn.Module) -> None:
        """Draw the validation prompts, and export and push, where that is due before training goes on.

        Args:
            student: from `add_student`.
        """
        if self.run.validation_due:
            self.validate(student)
        if self.run.push_due:
            self._export(student, last=False)

    def validate(self, student: nn.Module) -> None:
        """Draw the validation prompts with the student as it is; every process calls this.

        Args:
            student: from `add_student`.
        """
        weights = self.run.weights(student)
        with ending_together(self.run.accelerator):
            if self.run.accelerator.is_main_process:
                transformer = self._load_student(weights)
                self._draw(transformer if self.settings.rank is None else merge_lora(transformer))

    def export(self, student: nn.Module) -> None:
        """Save the student as a pipeline or LoRA folder, and push it if asked to; every process calls this.

        Args:
            student: from `add_student`.
        """
        self._export(student, last=True)

    def _export(self, student: nn.Module, *, last: bool) -> None:
        """Save and push; before the `last` time, one that cannot be written costs a warning."""
        settings, weights = self.settings, self.run.weights(student)
        with ending_together(self.run.accelerator):
            if not self.run.accelerator.is_main_process:
                return
            try:
                self._teacher_digest()  # its folder is read again
                self.teacher.float()
                if settings.merge_lora and self.run.weight_dtype != torch.float32:  # which has rounded its weights
                    self.teacher.transformer.load_state_dict(self._load_teacher().state_dict())
                self._save_and_push(weights)
            except (*WRITE_ERRORS, ValueError, Failure) as error:
                if last and isinstance(error, OSError | SafetensorError):
                    raise Failure(
                        f"the student could not be saved: {in_a_line(error)}; make room in `output_dir`, then"
                        " `resume_from_checkpoint` latest goes on from the newest checkpoint"
                    ) from error
                if last:
                    raise
                logger.warning(f"The student of step {self.run.step} was not saved, training goes on: {error}")
            self.teacher.to(self.run.weight_dtype)

    def _save_and_push(self, weights: Mapping[str, torch.Tensor]) -> None:
        run, settings = self.run, self.settings
        if not all_finite(weights.values()):
            raise Failure(f"nothing is exported: the student's weights are not finite at step {run.step}")
        transformer = self._load_student(weights)
        if not self._gives_numbers(transformer):
            raise Failure(f"nothing is exported: what the student gives for noise is not finite at step {run.step}")
        description = StudentDescription(
            prompt=(settings.validation_prompts or self.prompts)[0],
            training=self._training_table(),
            image_free=self.image_free,
            config=run.config,
            samples=self._draw(transformer) if settings.validation_prompts else (),
            resolution=settings.resolution,
        )
        run.push(self._save(transformer, description))

    def _save(self, transformer: Any, description: StudentDescription) -> Path:
        """Save the adapters, the pipeline or both; the folder to publish."""
        folder, settings = self.run.output_dir, self.settings
        teacher = settings.pretrained_model_name_or_path
        common = {"scheduler": self.scheduler, "teacher_variant": settings.variant}
        if settings.rank is not None:
            adapters = folder / LORA
            named = replace(description, model_id=f"{folder.name}/{LORA}")
            self.save_lora(transformer, teacher, adapters, named, **common)
            self._tell(f"Adapters for a pipeline of the teacher, whose card shows how to load them: {adapters}")
            if not settings.merge_lora:
                return adapters
            transformer = merge_lora(transformer)
        self.save_pipeline(transformer, teacher, folder, description, variants=settings.export_variants, **common)
        self._tell(f"Done. Draw with it:\n  {self._how_to_draw(folder)}")
        return folder

    def _tell(self, message: str) -> None:
        """Print what there is to use now; nothing stays of a dry run."""
        if not self.settings.dry_run:
            print(message)

    @torch.no_grad()
    def _gives_numbers(self, transformer: Any) -> bool:
        """Whether the student turns noise into numbers: weights may be finite, and too large for it."""
        noise = draw_noise(self.latent_shape, [draw_generator(0, self.settings.seed)], device=transformer.device)
        return all_finite([self._first_output(transformer, noise)])

    def _make_encoder(self) -> PromptEncoder | EmbeddingCache:
        run, settings = self.run, self.settings
        reading = self._reading

        def make_encoder() -> PromptEncoder:
            pipeline = self.backbone.load_text_pipeline(self.folder, run.weight_dtype, settings.variant)
            return PromptEncoder(pipeline, device=run.device, offload=settings.offload_text_encoder, **reading)

        if settings.precompute_embeddings is None:
            return make_encoder()
        cache = Path(settings.precompute_embeddings)
        fingerprint = encoder_fingerprint(self.folder, dtype=run.weight_dtype, variant=settings.variant, **reading)
        with ending_together(run.accelerator):
            precompute_embeddings(
                [*self.prompts, *(settings.validation_prompts or [])],
                make_encoder,
                cache,
                fingerprint,
                process_index=run.accelerator.process_index,
                num_processes=run.accelerator.num_processes,
            )
        return EmbeddingCache(cache, fingerprint, device=run.device)

    def _compile(self, *transformers: nn.Module) -> None:
        """Compile the blocks of networks where that was asked for."""
        if self.settings.compile:
            for transformer in transformers:
                for block in self.backbone.blocks(transformer):
                    block.compile()

    def _adapted(self, adapt: Callable[..., Any]) -> Any:
        """What `adapt`, of `lora`, makes of the teacher with the run's settings."""
        settings, teacher = self.settings, self.teacher.transformer
        targets = {} if settings.lora_target_modules is None else {"target_modules": settings.lora_target_modules}
        try:
            return adapt(teacher, rank=settings.rank, alpha=settings.lora_alpha, **targets)
        except ValueError as error:
            raise ValueError(f"`lora_target_modules`: {error}") from error

    def _load_student(self, weights: Mapping[str, torch.Tensor]) -> Any:
        """A copy of the student in its teacher's dtype."""
        student = self._make_student()
        whole = self.settings.rank is None
        if not whole:  # all else is the teacher's own
            weights = {name: weights[name] for name, weight in student.named_parameters() if weight.requires_grad}
        student.load_state_dict(weights, strict=whole)
        return student.eval()

    def _add_pair(
        self,
        student: FlowTransformer,
        critic: FlowTransformer,
        *,
        rows_per_prompt: int,
        every: int,
        critic_learning_rate: float,
        guided: bool = False,
    ) -> tuple[nn.Module, nn.Module]:
        """Add a student, updated in every so many steps, and its critic, updated in every one; gives both prepared."""
        run, settings = self.run, self.settings
        self.teacher.to(run.weight_dtype)  # both have copied it by now, or share it
        self._print_memory_plan({"student": student, "critic": critic}, rows_per_prompt, guided=guided)
        self._compile(self.teacher.transformer, student.transformer, critic.transformer)
        schedule = settings.lr_scheduler
        prepared = run.add(
            "student", student, exported="transformer", lr_scheduler=schedule, every=every, ema=settings.use_ema
        )
        return prepared, run.add("critic", critic, learning_rate=critic_learning_rate, lr_scheduler=schedule)

    def _print_memory_plan(
        self, models: Mapping[str, nn.Module], rows_per_prompt: int, *, guided: bool = False
    ) -> None:
        """Say what a process will hold in the backward of the first model, which may take guidance as an input."""
        run, settings = self.run, self.settings
        frozen: dict[str, nn.Module] = {"teacher": self.teacher}
        if isinstance(self.encode, PromptEncoder):
            frozen["text encoder"] = self.encode.text_encoders
        with ending_together(run.accelerator):
            if not run.accelerator.is_main_process:
                return
            rows = settings.train_batch_size * rows_per_prompt
            one = torch.ones(rows, device=run.device)
            text = self.negative_text.expand(settings.train_batch_size)
            latents = torch.zeros((rows, *self.latent_shape), device=run.device)
            plan = memory_plan(
                models,
                frozen,
                (latents, one),
                {**text.arguments(), **({"guidance": one} if guided else {})},
                state_bytes=state_bytes(settings.optimizer, in_8_bits=settings.use_8bit_adam),
                ema=settings.use_ema,
                autocast_dtype=None if run.weight_dtype == torch.float32 else run.weight_dtype,
            )
            parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan.items())
            print(f"Memory plan: {sum(plan.values()) / 2**30:.2f} GiB a process, before any sharding = {parts}")

    @torch.no_grad()
    def _draw(self, transformer: Any) -> list[Sample]:
        """Draw the validation prompts, put a labelled grid of them into log and folder, give the pictures."""
        run, prompts = self.run, self.settings.validation_prompts or []
        labels, numbers, pictures = zip(*self._draw_columns(transformer, prompts), strict=True)
        rows = list(zip(*pictures, strict=True))
        grid = image_grid(rows, labels, prompts)
        try:
            with run.folder.written(f"{VALIDATION}/step-{run.step}.png") as partial:
                grid.save(partial, format="PNG")
        except (OSError, ValueError) as error:
            logger.warning(f"The validation pictures of step {run.step} could not be written: {error}")
        run.metrics.image("validation", grid, run.step)
        return [
            Sample(prompt, steps, image)
            for prompt, row in zip(prompts, rows, strict=True)
            for steps, image in zip(numbers, row, strict=True)
            if steps is not None
        ]

    def _draw_columns(
        self, transformer: Any, prompts: Sequence[str]
    ) -> Iterator[tuple[str, int | None, list[Image.Image]]]:
        """Columns of the validation's grid: label, number of steps, pictures; no number where the card shows none."""
        vae = self.backbone.load_vae(self.folder, self.settings.variant).to(transformer.device)
        pipeline = self._pipeline(vae, transformer)
        pipeline.set_progress_bar_config(disable=True)
        for steps in VALIDATION_STEPS:
            pictures = draw_pictures(
                pipeline,
                self.encode([*prompts]),
                numbered_generators(self.run.settings.seed),
                num_inference_steps=steps,
                **call_options(pipeline),
            )
            yield f"{steps} step{'s' * (steps > 1)}", steps, list(pictures)

    def _training_table(self) -> dict[str, Any]:
        """What the model card says about the run."""
        run, settings = self.run, self.settings
        reading = f"{self.max_sequence_length} tokens"
        if self.backbone.INSTRUCTION is not None:
            reading += (
                f", {'with' if settings.complex_human_instruction else 'without'} the instruction of Sana's pipelines"
            )
        optimiser = f"{settings.optimizer}, lr {settings.learning_rate:g} {settings.lr_scheduler}"
        return {
            "method": self.method,
            "steps": run.step,
            "prompts seen": run.prompts_seen,
            **settings.describe(),
            "prompt": reading,
            "optimiser": f"{optimiser}, clip {settings.max_grad_norm:g}",
            "weights": "all" if settings.rank is None else f"LoRA of rank {settings.rank}{self.beside_lora}",
            "EMA": settings.ema_decay if settings.use_ema else "off",
            "precision": run.accelerator.mixed_precision,
            "seed": settings.seed,
            **({"changed on the way": str(run.history)} if run.history.changes else {}),
        }
