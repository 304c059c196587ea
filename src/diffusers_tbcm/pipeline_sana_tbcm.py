"""The text-to-image pipeline of a distilled Sana student: diffusers' Sana-Sprint pipeline, for any number of steps."""

from __future__ import annotations

import copy
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.models import AutoencoderDC, SanaTransformer2DModel
from diffusers.pipelines.pipeline_loading_utils import CUSTOM_PIPELINE_FILE_NAME
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.pipelines.sana.pipeline_sana_sprint import SanaSprintPipeline
from diffusers.schedulers.scheduling_scm import SCMScheduler
from diffusers.utils import logging, scale_lora_layers, unscale_lora_layers
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from .backbones.sana import INSTRUCTION
from .call_arguments import (
    check_attention_kwargs,
    check_callback,
    check_choice,
    check_embeddings,
    check_flags,
    check_generator,
    check_instruction,
    check_latents,
    check_prompt,
    checked_callback,
    real_number,
    whole_number,
)
from .finite import NOT_FINITE, FiniteImageProcessor, NotFiniteWarning, is_finite
from .images import fit_image, load_image, pixels_to_pil, resolution_bins
from .scheduling_tbcm import MAX_TIMESTEP_FLOAT32, TBCMScheduler, recorded_call_options
from .standalone import standalone_pipeline_source
from .student_adapters import OFFLOADING_HOOKS, check_can_be_saved, drawing_with, students_of
from .student_lora import StudentLoraLoaderMixin
from .text import check_tokenizer
from .versions import tokenizer_class


logger = logging.get_logger(__name__)

DEFAULT_NUM_INFERENCE_STEPS = 2
STOCK_CALL_OPTIONS = {"guidance_scale": 4.5, "max_sequence_length": 300, "complex_human_instruction": INSTRUCTION}
PICTURE_TYPES = ("pil", "np", "pt")
CALL_STATE = ("_guidance_scale", "_attention_kwargs", "_num_timesteps", "_all_hooks")  # what a call leaves behind
ENCODING = threading.Lock()  # a fast tokenizer holds the length that it pads to, and a LoRA layer its scale


class SanaTBCMPipeline(StudentLoraLoaderMixin, SanaSprintPipeline):
    """
    Text-to-image and image-to-image in few steps with a Sana student distilled by TBCM
    (https://arxiv.org/abs/2511.20410).

    It loads and saves the files of a [`SanaSprintPipeline`], so that plain diffusers reads what it saves, and gives
    the same images bit for bit where timesteps and seed are the same. Beyond it, this pipeline takes any number of
    steps, custom `timesteps`, an `image` to start from, every image size that autoencoder and transformer divide, and
    unequal prompts together with `num_images_per_prompt`.

    `DiffusionPipeline.from_pretrained` gives the stock pipeline for the same files; `SanaTBCMPipeline.from_pipe(pipe)`
    makes this one of it, without a copy.

    Args:
        tokenizer ([`GemmaTokenizer`]):
            Splits prompts into tokens.
        text_encoder ([`Gemma2PreTrainedModel`]):
            Embeds the tokens.
        vae ([`AutoencoderDC`]):
            Decodes latents to images.
        transformer ([`SanaTransformer2DModel`]):
            The student, in flow-matching form and with a guidance embedder.
        scheduler ([`TBCMScheduler`] or [`SCMScheduler`]):
            The sampler; a plain [`SCMScheduler`] is replaced by the [`TBCMScheduler`] of its config.

    Raises:
        `ValueError`: for a scheduler of another kind, and for a tokenizer that is empty or not the text encoder's.
    """

    scheduler: TBCMScheduler
    _callback_tensor_inputs: list[str] = [*SanaSprintPipeline._callback_tensor_inputs, "denoised"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderDC,
        transformer: SanaTransformer2DModel,
        scheduler: SCMScheduler,
    ):
        if scheduler is not None and not isinstance(scheduler, SCMScheduler):
            raise ValueError(
                f"`scheduler` is a {type(scheduler).__name__}, which cannot sample from a TBCM student;"
                " pass `scheduler=TBCMScheduler()`."
            )
        if scheduler is not None and not isinstance(scheduler, TBCMScheduler):
            scheduler = TBCMScheduler.from_config(scheduler.config)
        if tokenizer is not None and text_encoder is not None:
            check_tokenizer(tokenizer, text_encoder)
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.image_processor = FiniteImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._init_image: torch.Tensor | None = None
        self._interrupt = False
        self._caller: SanaTBCMPipeline | None = None
        self._guidance_warned = False

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **components: Any,
    ) -> SanaTBCMPipeline:
        """
        Make this pipeline of another Sana pipeline's components, without a copy.

        The sampler is a copy, so that the two pipelines can draw at the same time; that of a teacher's
        [`SanaPipeline`], which cannot sample from a student, gives way to a `TBCMScheduler()`.

        Args:
            pipeline ([`DiffusionPipeline`]):
                The pipeline to take components from.
            dtype (`torch.dtype`, *optional*), torch_dtype (`torch.dtype`, *optional*):
                What to cast the shared weights to, in both pipelines. They stay in the precision that they are in by
                default, where the stock method would cast them to float32.
            components:
                Components to take instead of the pipeline's, by name.

        Returns:
            [`SanaTBCMPipeline`]: the new pipeline.
        """
        samples = isinstance(pipeline.scheduler, SCMScheduler)
        components.setdefault("scheduler", copy.copy(pipeline.scheduler) if samples else TBCMScheduler())
        names, _ = cls._get_signature_keys(cls)
        shared = {name: component for name, component in pipeline.components.items() if name in names}
        new_pipeline = cls(**{**shared, **components})
        dtype = torch_dtype if dtype is None else dtype
        return new_pipeline if dtype is None else new_pipeline.to(dtype)

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple]:
        """The stock constructor's: diffusers before 0.37 cannot read annotations under `from __future__`."""
        return SanaSprintPipeline._get_signature_types()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        Save as a [`SanaSprintPipeline`] with an [`SCMScheduler`], which loads with and without this package.

        The scheduler's config keeps what is TBCM's own, so that `SanaTBCMPipeline.from_pretrained` gives back this
        very pipeline. The folder's `pipeline.py` is this class for where the package is not installed:
        `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)` gives it back too.
        `push_to_hub` saves through here.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder to write.
            args, kwargs:
                Passed on to [`~DiffusionPipeline.save_pretrained`].

        Raises:
            `ValueError`: if the transformer has LoRA adapters beside its weights.
        """
        check_can_be_saved(self.transformer)
        components = self.components
        if self.scheduler is not None:
            components["scheduler"] = self.scheduler.to_stock()
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)  # the file is there before the stock method may push the folder
        (folder / CUSTOM_PIPELINE_FILE_NAME).write_text(standalone_pipeline_source(), encoding="utf-8")
        stock = SanaSprintPipeline(**components)
        if self.tokenizer is not None and self.tokenizer.is_fast:
            stock.register_to_config(tokenizer=("transformers", tokenizer_class(type(self.tokenizer).__name__)))
        stock.save_pretrained(save_directory, *args, **kwargs)

    def encode_prompt(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int | None = None,
        complex_human_instruction: list[str] | Literal["as trained"] | None = "as trained",
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Embed prompts, each `num_images_per_prompt` times in a row; one that is repeated is embedded once.

        The stock method repeats embeddings prompt by prompt but masks batch by batch, so that with several prompts and
        several images per prompt an image is made from one prompt's embedding under another's mask; here both go
        prompt by prompt.

        Args:
            prompt (`str` or `list[str]`):
                The prompts; `None` where `prompt_embeds` is given.
            num_images_per_prompt (`int`, defaults to `1`):
                How often to repeat each prompt.
            device (`torch.device`, *optional*):
                Where to put the embeddings. Defaults to where the pipeline runs.
            prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, hidden)`, *optional*):
                Embeddings to repeat instead of making them.
            prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`, *optional*):
                Their mask, 1 for tokens and 0 for padding.
            clean_caption (`bool`, defaults to `False`):
                Whether to strip markup and other noise from the prompts.
            max_sequence_length (`int`, *optional*):
                Number of tokens to pad or cut each prompt to. Default: as in `default_call_options`.
            complex_human_instruction (`list[str]`, *optional*):
                Lines to put before each prompt. Default: those that the checkpoint carries, and none where it carries
                none.
            lora_scale (`float`, *optional*):
                Scale of the text encoder's LoRA layers.

        Returns:
            `tuple` of `torch.Tensor`: embeddings of shape `(prompts * num_images_per_prompt, tokens, hidden)` and
            their mask of shape `(prompts * num_images_per_prompt, tokens)`.

        Raises:
            `ValueError`: naming the argument or the component that does not fit, and what to do.
        """
        if max_sequence_length is None:
            max_sequence_length = self.default_call_options["max_sequence_length"]
        if complex_human_instruction == "as trained":
            complex_human_instruction = self._recorded_options.get("complex_human_instruction")
        num_images_per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt)
        if prompt_embeds is None:
            self._check_can_read_prompts()
            check_prompt(prompt)
            check_instruction(complex_human_instruction)
            max_sequence_length = whole_number("max_sequence_length", max_sequence_length)
            prompts = [prompt] if isinstance(prompt, str) else prompt
            distinct = list(dict.fromkeys(prompts))
            rows = [distinct.index(text) for text in prompts]
            with ENCODING:
                if lora_scale is not None:
                    scale_lora_layers(self.text_encoder, lora_scale)
                encoded = self._get_gemma_prompt_embeds(
                    distinct,
                    device=self._execution_device if device is None else device,
                    dtype=self.text_encoder.dtype,
                    clean_caption=clean_caption,
                    max_sequence_length=max_sequence_length,
                    complex_human_instruction=complex_human_instruction,
                )
                if lora_scale is not None:
                    unscale_lora_layers(self.text_encoder, lora_scale)
            # The first token and the last ones, without the instruction. Slices: the device would have to wait for a
            # list of indices.
            last = encoded[0].shape[1] - (max_sequence_length - 1)
            prompt_embeds, prompt_attention_mask = (
                torch.stack([torch.cat([value[row, :1], value[row, last:]]) for row in rows]) for value in encoded
            )
        elif prompt_attention_mask is None:
            raise ValueError("Must provide `prompt_attention_mask` when specifying `prompt_embeds`.")
        else:
            prompt_embeds, prompt_attention_mask = prompt_embeds.to(device), prompt_attention_mask.to(device)
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        prompt_attention_mask = prompt_attention_mask.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, prompt_attention_mask

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | torch.Tensor | None,
        max_timesteps: float | None,
        intermediate_timesteps: float | None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
    ) -> None:
        """
        Refuse a call that cannot be carried out, before anything is computed.

        Args:
            prompt, height, width, num_inference_steps, timesteps, max_timesteps, intermediate_timesteps,
            callback_on_step_end_tensor_inputs, prompt_embeds, prompt_attention_mask:
                As in `__call__`.

        Raises:
            `ValueError`: naming the argument or the component that does not fit, and what to do.
        """
        config = self.transformer.config
        if not config.guidance_embeds:
            raise ValueError(
                "`transformer.config.guidance_embeds` is False: this is a teacher, not a distilled student. Load a"
                " student that TBCM has distilled, switch its LoRA on, or run the teacher in a `SanaPipeline`."
            )
        if config.timestep_scale > 1:
            raise ValueError(
                f"`transformer.config.timestep_scale` is {config.timestep_scale}, but Sana-Sprint sampling feeds times"
                " in [0, 1]; distil a student from a teacher fine-tuned to such dense time."
            )
        multiple = self._size_multiple
        for name, size in (("height", height), ("width", width)):
            if size < multiple or size % multiple:
                raise ValueError(f"`{name}` is {size}, but has to be a positive multiple of {multiple} pixels.")

        self.scheduler.set_timesteps(num_inference_steps, timesteps, None, max_timesteps, intermediate_timesteps)

        # The stock checks of size and time refuse calls that are fine here: they see one that passes.
        super().check_inputs(
            prompt,
            height=32,
            width=32,
            num_inference_steps=1,
            timesteps=None,
            max_timesteps=math.pi / 2,
            intermediate_timesteps=None,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
        )
        if prompt_embeds is not None:
            check_embeddings(prompt_embeds, prompt_attention_mask, config.caption_channels)
        elif prompt_attention_mask is not None:
            raise ValueError("`prompt_attention_mask` is given without the `prompt_embeds` that it belongs to.")

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Give what sampling starts from: noise or, for image-to-image, the image noised to the first timestep.

        Args:
            batch_size (`int`), num_channels_latents (`int`), height (`int`), width (`int`), dtype (`torch.dtype`),
            device (`torch.device`), generator (`torch.Generator` or `list[torch.Generator]`, *optional*), latents
            (`torch.Tensor`, *optional*):
                As in the stock method; sizes in pixels.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_channels_latents, latent height, latent width)`: the start, to be
            multiplied by `sigma_data`.

        Raises:
            `ValueError`: if generators or latents are not those of so many images of that size, or the images to
                start from do not divide the batch.
        """
        check_generator(generator, batch_size)
        if latents is not None:
            size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
            check_latents(latents, (batch_size, num_channels_latents, *size))
        noise = super().prepare_latents(
            batch_size, num_channels_latents, height, width, dtype, device, generator, latents
        )
        start = self.scheduler.timesteps[:1]
        if self._init_image is None or start >= MAX_TIMESTEP_FLOAT32:  # at pi/2 nothing of an image is left
            return noise
        if batch_size % len(self._init_image):
            raise ValueError(
                f"`image` holds {len(self._init_image)} images, but {batch_size} are to be made: give one image, or"
                " one for each prompt."
            )
        pixels = fit_image(self._init_image, height, width).to(device, self.vae.dtype)
        clean = self.vae.encode(pixels).latent.to(dtype) * self.vae.config.scaling_factor
        clean = clean.repeat_interleave(batch_size // len(clean), dim=0)
        sigma_data = self.scheduler.config.sigma_data
        return self.scheduler.add_noise(clean * sigma_data, noise, start) / sigma_data

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """
        Look at clean latents, such as the `denoised` that a step's callback gets.

        Args:
            latents (`torch.Tensor` of shape `(images, channels, latent height, latent width)`):
                Clean latents of standard deviation `sigma_data`, as they are during sampling.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"`.

        Returns:
            `list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`: the images.

        Raises:
            `ValueError`: for another `output_type`.
        """
        check_choice("output_type", output_type, PICTURE_TYPES)
        latents = (latents / self.scheduler.config.sigma_data).to(self.vae.dtype)
        images = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        images = self.image_processor.postprocess(images, output_type="pt" if output_type == "pil" else output_type)
        _warn_unless_finite(images)
        return pixels_to_pil(images) if output_type == "pil" else images

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """
        Show the steps done; custom timesteps count without their final 0, which the stock loop counts as a step.

        The pipeline that was called shows from here on what the call knows, such as `num_timesteps`.

        Args:
            iterable (*optional*), total (`int`, *optional*):
                As in [`~DiffusionPipeline.progress_bar`].

        Returns:
            `tqdm.tqdm`: the bar.
        """
        if self._caller is not None:
            self._caller._show(self)
        return super().progress_bar(iterable, None if total is None else self.num_timesteps)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        use_resolution_binning: bool | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' default)
        max_sequence_length: int | None = None,
        complex_human_instruction: list[str] | Literal["as trained"] | None = "as trained",
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
    ) -> SanaPipelineOutput | tuple:
        """
        Generate images from prompts or, where `image` is given, from prompts and images.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to generate. Either this or `prompt_embeds`.
            num_inference_steps (`int`, *optional*):
                Number of transformer evaluations, at least 1. Defaults to the number that `timesteps` implies,
                otherwise to 2 as in the stock pipeline.
            timesteps (`list[float]` or `torch.Tensor` of shape `(num_inference_steps + 1,)`, *optional*):
                Angles in radians, strictly descending from at most pi/2 to 0. Defaults to the scheduler's own.
            max_timesteps (`float`, *optional*):
                First angle in radians, of even steps down to 0.
            intermediate_timesteps (`float`, *optional*):
                The angle in the middle, for two steps only.
            guidance_scale (`float`, *optional*):
                The classifier-free guidance scale to imitate; the student knows those that it was distilled at, and
                where its scheduler's config names them, one beyond them is warned of once. Defaults to the middle one
                of them, and to 4.5 where it names none.
            num_images_per_prompt (`int`, defaults to 1):
                Number of images per prompt.
            height (`int`, *optional*), width (`int`, *optional*):
                Size of the images in pixels. Default: the size that the student was trained at.
            eta (`float`, defaults to 0.0):
                Without effect; it keeps its place in the order of the stock arguments.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise, one for the batch or one per image.
            latents (`torch.Tensor` of shape `(images, channels, latent height, latent width)`, *optional*):
                Standard normal noise to start from. Drawn from `generator` by default.
            prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, hidden)`, *optional*):
                Embedded prompts, in the place of `prompt`.
            prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`, *optional*):
                Mask of `prompt_embeds`, required with them.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`):
                Whether to return an output object instead of a tuple.
            clean_caption (`bool`, defaults to `False`):
                Whether to strip markup and other noise from the prompts; needs `beautifulsoup4` and `ftfy`.
            use_resolution_binning (`bool`, *optional*):
                Whether to generate at the size of like aspect that training used, and to resize to `height` x `width`.
                Defaults to `True` for 1024-pixel Sana, the only one that the stock pipeline bins, and to `False` for
                others and for its students that were trained at another size.
            attention_kwargs (`dict`, *optional*):
                Passed to the attention processors; `scale` weighs LoRA layers.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipeline, step, timestep, callback_kwargs)`; returns a `dict`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors to hand to the callback: `"latents"`, `"prompt_embeds"`, and `"denoised"`, the clean
                latents that the step has predicted, which `decode_latents` turns into pictures.
            max_sequence_length (`int`, *optional*):
                Number of tokens to pad or cut each prompt to. Defaults to that of the student's training, and to 300
                where its scheduler's config names none.
            complex_human_instruction (`list[str]`, *optional*):
                Lines to put before each prompt; None or an empty list for none. Defaults to those of the student's
                training, and to Sana's own where its scheduler's config names none.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a `list` of one kind, *optional*):
                What to start from instead of noise: one image, or one for each prompt. Arrays and tensors hold floats
                in [0, 1]. It is resized to `height` x `width`, and has to have their proportions.
            strength (`float`, defaults to 0.6):
                How much of `image` to replace, in (0, 1]: it multiplies every timestep, so that sampling starts at
                `strength * pi / 2`, where the latents are `cos(t) image + sin(t) noise`; 1 is text-to-image. A
                consistency model may start at any angle, so that all `num_inference_steps` are taken from there, where
                other pipelines take a share of them.

        Examples:
            ```py
            >>> from diffusers_tbcm import SanaTBCMPipeline

            >>> pipe = SanaTBCMPipeline.from_pretrained("path/to/student")
            >>> image = pipe("a tiny astronaut hatching from an egg on the moon", num_inference_steps=1).images[0]
            >>> image.save("moon.png")

            >>> # image-to-image, in two steps that start at 0.5 * pi / 2
            >>> image = pipe("a watercolour of an astronaut", image=image, strength=0.5).images[0]


            >>> # what each step expects the picture to be
            >>> def preview(pipe, step, timestep, tensors):
            ...     pipe.decode_latents(tensors["denoised"])[0].save(f"step_{step}.png")
            ...     return {}


            >>> image = pipe(
            ...     "a tiny astronaut hatching from an egg on the moon",
            ...     num_inference_steps=4,
            ...     callback_on_step_end=preview,
            ...     callback_on_step_end_tensor_inputs=["denoised"],
            ... ).images[0]
            ```

        Returns:
            [`~pipelines.sana.pipeline_output.SanaPipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: naming the argument or the component that does not fit, and what to do.
        """
        self._check_components(prompt, output_type)
        defaults = self.default_call_options
        if max_sequence_length is None:
            max_sequence_length = defaults["max_sequence_length"]
        if complex_human_instruction == "as trained":
            complex_human_instruction = defaults["complex_human_instruction"]
        guidance_scale = real_number(
            "guidance_scale", defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        )
        real_number("eta", eta)
        num_images_per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt)
        check_flags(return_dict=return_dict, clean_caption=clean_caption)
        check_choice("output_type", output_type, (*PICTURE_TYPES, "latent"))
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        lora_scale = check_attention_kwargs(attention_kwargs)
        if num_inference_steps is None and timesteps is None:
            num_inference_steps = DEFAULT_NUM_INFERENCE_STEPS

        sample_size = self.transformer.config.sample_size
        native_size = sample_size * self.vae_scale_factor
        height = whole_number("height", defaults.get("height", native_size) if height is None else height)
        width = whole_number("width", defaults.get("width", native_size) if width is None else width)

        # The stock pipeline bins where sample_size is 32, to the 1024-pixel sizes whatever the autoencoder.
        stock_binning = sample_size == 32 and native_size == 1024
        if use_resolution_binning is None:  # among the sizes of the network's own training
            use_resolution_binning = stock_binning and defaults.get("height", native_size) == native_size
        check_flags(use_resolution_binning=use_resolution_binning)
        own_binning = use_resolution_binning and not stock_binning
        resize = own_binning and output_type != "latent"

        image_height, image_width = height, width
        if own_binning:
            bins = resolution_bins(native_size, self._size_multiple)
            height, width = self.image_processor.classify_height_width_bin(height, width, ratios=bins)

        self._warn_of_guidance(guidance_scale)
        with self._call(lora_scale) as call:
            call.scheduler.set_timesteps(num_inference_steps, timesteps, None, max_timesteps, intermediate_timesteps)
            num_inference_steps = call.scheduler.num_inference_steps
            if image is not None:
                if latents is not None:
                    raise ValueError("`latents` and `image` are both given, but sampling starts from one; leave one.")
                strength = real_number("strength", strength)
                if not 0 < strength <= 1:
                    raise ValueError(f"`strength` is {strength}, but has to lie in (0, 1].")
                call._init_image = load_image(image, image_height, image_width, self._size_multiple)
                timesteps, max_timesteps, intermediate_timesteps = call.scheduler.timesteps * strength, None, None

            images = SanaSprintPipeline.__call__(
                call,
                prompt=prompt,
                num_inference_steps=num_inference_steps,
                timesteps=timesteps,
                max_timesteps=max_timesteps,
                intermediate_timesteps=intermediate_timesteps,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                height=height,
                width=width,
                eta=eta,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
                output_type="pt" if resize or output_type == "pil" else output_type,
                return_dict=False,
                clean_caption=clean_caption,
                use_resolution_binning=use_resolution_binning and stock_binning,
                attention_kwargs=attention_kwargs,
                callback_on_step_end=None if callback_on_step_end is None else checked_callback(callback_on_step_end),
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                max_sequence_length=max_sequence_length,
                complex_human_instruction=complex_human_instruction,
            )[0]

        _warn_unless_finite(images)
        if resize:
            images = self.image_processor.resize_and_crop_tensor(images, image_width, image_height)
        if output_type == "pil":
            images = pixels_to_pil(images)
        elif resize:
            images = self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))
        return SanaPipelineOutput(images=images) if return_dict else (images,)

    @contextmanager
    def _call(self, lora_scale: float | None) -> Iterator[SanaTBCMPipeline]:
        """
        A copy of the pipeline that holds the state of one call, so that several threads may draw.

        It has the networks of the pipeline and a sampler of its own. The pipeline shows what the last call has left.
        """
        self._interrupt = False
        call = copy.copy(self)
        call.scheduler = copy.copy(self.scheduler)
        call._caller, call._init_image = self, None
        with drawing_with(self.transformer, lora_scale):
            yield call
        self._show(call)

    def _show(self, call: SanaTBCMPipeline) -> None:
        """Take over what a call has left, unless another sampler has been set meanwhile."""
        for name in CALL_STATE:
            if hasattr(call, name):
                setattr(self, name, getattr(call, name))
        if self.scheduler.config is call.scheduler.config:
            self.scheduler = call.scheduler

    @property
    def interrupt(self) -> bool:
        """Whether to stop after this step: a callback's pipeline stops its own call, the pipeline all under way."""
        started = self.scheduler.step_index is not None
        return started and (self._interrupt or (self._caller is not None and self._caller._interrupt))

    def _check_components(self, prompt: Any, output_type: Any) -> None:
        """Refuse to draw without the components that this takes."""
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` is None: this pipeline was loaded without it and cannot draw.")
        if self.vae is None and output_type != "latent":
            raise ValueError("`vae` is None: load the pipeline with it, or pass `output_type='latent'`.")
        if prompt is not None:
            self._check_can_read_prompts()

    def _check_can_read_prompts(self) -> None:
        for name in ("tokenizer", "text_encoder"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"`prompt` is given, but `{name}` is None: load the pipeline with it, or pass `prompt_embeds` and"
                    " `prompt_attention_mask`."
                )

    @property
    def default_call_options(self) -> dict[str, Any]:
        """The arguments that a call takes where it is not told: those of the student's training, else stock ones."""
        return {**STOCK_CALL_OPTIONS, **self._recorded_options}

    @property
    def _recorded_options(self) -> dict[str, Any]:
        """What the checkpoint, or the LoRA of a student in effect, carries of `default_call_options`."""
        return recorded_call_options(self._scheduler_config)

    @property
    def _scheduler_config(self) -> dict[str, Any]:
        """The scheduler's config with what the LoRA of students in effect changes; there may be no scheduler."""
        students = None if self.transformer is None else students_of(self.transformer)
        recorded = {} if students is None else students.scheduler_config
        return {**({} if self.scheduler is None else self.scheduler.config), **recorded}

    @property
    def _execution_device(self) -> torch.device:
        """The stock property, which looks for hooks several times in every layer, where a single look finds none."""
        networks = [part for part in (self.text_encoder, self.transformer, self.vae) if part is not None]
        devices = {next(network.parameters()).device for network in networks}
        layers: list[torch.nn.Module] = [*networks]
        for layer in layers:  # grows by the layers found
            if any(hook in layer.__dict__ for hook in OFFLOADING_HOOKS):
                return super()._execution_device
            layers.extend(part for part in layer._modules.values() if part is not None)
        return devices.pop() if len(devices) == 1 else super()._execution_device

    @property
    def _size_multiple(self) -> int:
        """What height and width have to be multiples of, in pixels."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    def _warn_of_guidance(self, guidance_scale: float) -> None:
        scales = self._scheduler_config.get("guidance_scales")
        if scales and not min(scales) <= guidance_scale <= max(scales) and not self._guidance_warned:
            self._guidance_warned = True
            logger.warning(
                f"`guidance_scale` is {guidance_scale}, but this student was distilled at {min(scales)} to"
                f" {max(scales)} and has not learnt what lies beyond; pass a `guidance_scale` from there."
            )


def _warn_unless_finite(images: Any) -> None:
    if not is_finite(images):
        warnings.warn(f"What was drawn {NOT_FINITE}", NotFiniteWarning, stacklevel=3)
