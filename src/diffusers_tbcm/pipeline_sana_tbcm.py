"""The text-to-image pipeline of a distilled Sana student: diffusers' Sana-Sprint pipeline, for any number of steps."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models import AutoencoderDC, SanaTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.pipelines.sana.pipeline_sana_sprint import SanaSprintPipeline
from diffusers.schedulers.scheduling_scm import SCMScheduler
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from .lora import GUIDANCE_EMBEDDER_FILE, load_guidance_embedder
from .scheduling_tbcm import TBCMScheduler
from .versions import tokenizer_class


DEFAULT_NUM_INFERENCE_STEPS = 2
COMPLEX_HUMAN_INSTRUCTION: list[str] = (
    inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
)


class SanaTBCMPipeline(SanaSprintPipeline):
    """
    Text-to-image generation in few steps with a Sana student distilled by TBCM (https://arxiv.org/abs/2511.20410).

    It loads and saves the files of a [`SanaSprintPipeline`], so that plain diffusers reads what it saves, and gives
    the same images bit for bit where timesteps and seed are the same. Beyond it, this pipeline takes any number of
    steps, custom `timesteps`, every image size that autoencoder and transformer divide, and unequal prompts together
    with `num_images_per_prompt`.

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
        `ValueError`: for a scheduler of another kind.
    """

    scheduler: TBCMScheduler

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
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple]:
        """The stock constructor's: diffusers before 0.37 cannot read annotations under `from __future__`."""
        return SanaSprintPipeline._get_signature_types()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        Save as a [`SanaSprintPipeline`] with an [`SCMScheduler`], which loads with and without this package.

        The scheduler's config keeps `timesteps_by_steps`, so that `SanaTBCMPipeline.from_pretrained` gives back this
        very pipeline. `push_to_hub` saves through here too.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder to write.
            args, kwargs:
                Passed on to [`~DiffusionPipeline.save_pretrained`].
        """
        components = self.components
        if self.scheduler is not None:
            config = self.scheduler.config
            scheduler = SCMScheduler(config["num_train_timesteps"], config["prediction_type"], config["sigma_data"])
            scheduler.register_to_config(timesteps_by_steps=config["timesteps_by_steps"])
            components["scheduler"] = scheduler
        stock = SanaSprintPipeline(**components)
        if self.tokenizer is not None and self.tokenizer.is_fast:
            stock.register_to_config(tokenizer=("transformers", tokenizer_class(type(self.tokenizer).__name__)))
        stock.save_pretrained(save_directory, *args, **kwargs)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Load LoRA layers and, where one lies beside them, the guidance embedder of a student distilled as LoRA.

        With the latter the pipeline may hold the plain teacher: it goes on with a transformer of its own, made of the
        teacher's weights, and another pipeline with the same teacher stays as it is.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                Folder, file or Hub id, or the LoRA layers themselves.
            adapter_name (`str`, *optional*), hotswap (`bool`, defaults to `False`), kwargs:
                As in [`~loaders.SanaLoraLoaderMixin.load_lora_weights`].

        Raises:
            `ValueError`: if there is a guidance embedder to load and offloading is already enabled.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, dict):
            folder = os.path.dirname(os.path.abspath(source)) if os.path.isfile(source) else source
            where = {**kwargs, "weight_name": GUIDANCE_EMBEDDER_FILE, "use_safetensors": True}
            try:
                guidance_embedder = self.lora_state_dict(folder, **where)
            except OSError:
                pass  # a LoRA without one, such as a style for a student
            else:
                self.register_modules(transformer=load_guidance_embedder(self.transformer, guidance_embedder))
        super().load_lora_weights(source, adapter_name, hotswap, **kwargs)

    def encode_prompt(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 300,
        complex_human_instruction: list[str] | None = None,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Embed prompts, each `num_images_per_prompt` times in a row.

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
            max_sequence_length (`int`, defaults to `300`):
                Number of tokens to pad or cut each prompt to.
            complex_human_instruction (`list[str]`, *optional*):
                Lines to put before each prompt.
            lora_scale (`float`, *optional*):
                Scale of the text encoder's LoRA layers.

        Returns:
            `tuple` of `torch.Tensor`: embeddings of shape `(prompts * num_images_per_prompt, tokens, hidden)` and
            their mask of shape `(prompts * num_images_per_prompt, tokens)`.
        """
        prompt_embeds, prompt_attention_mask = super().encode_prompt(
            prompt,
            num_images_per_prompt=1,
            device=device,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=complex_human_instruction,
            lora_scale=lora_scale,
        )
        return (
            prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0),
            prompt_attention_mask.repeat_interleave(num_images_per_prompt, dim=0),
        )

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
                " student that TBCM has distilled, or run the teacher in a `SanaPipeline`."
            )
        if config.timestep_scale > 1:
            raise ValueError(
                f"`transformer.config.timestep_scale` is {config.timestep_scale}, but Sana-Sprint sampling feeds times"
                " in [0, 1]; distil a student from a teacher fine-tuned to such dense time."
            )
        multiple = self.vae_scale_factor * config.patch_size
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

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """
        Show the steps done; custom timesteps count without their final 0, which the stock loop counts as a step.

        Args:
            iterable (*optional*), total (`int`, *optional*):
                As in [`~DiffusionPipeline.progress_bar`].

        Returns:
            `tqdm.tqdm`: the bar.
        """
        return super().progress_bar(iterable, None if total is None else self.num_timesteps)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
        guidance_scale: float = 4.5,
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
        max_sequence_length: int = 300,
        complex_human_instruction: list[str] = COMPLEX_HUMAN_INSTRUCTION,
    ) -> SanaPipelineOutput | tuple:
        """
        Generate images from prompts.

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
            guidance_scale (`float`, defaults to 4.5):
                The classifier-free guidance scale to imitate; the student knows those that it was distilled at.
            num_images_per_prompt (`int`, defaults to 1):
                Number of images per prompt.
            height (`int`, *optional*), width (`int`, *optional*):
                Size of the images in pixels. Default: the size that the transformer was trained at.
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
                Defaults to `True` for 1024-pixel Sana, the only one that the stock pipeline bins, else to `False`.
            attention_kwargs (`dict`, *optional*):
                Passed to the attention processors; `scale` weighs LoRA layers.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipeline, step, timestep, callback_kwargs)`; returns a `dict`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors to hand to the callback: `"latents"`, `"prompt_embeds"`.
            max_sequence_length (`int`, defaults to 300):
                Number of tokens to pad or cut each prompt to.
            complex_human_instruction (`list[str]`, *optional*):
                Lines to put before each prompt. Defaults to those that Sana was trained with.

        Examples:
            ```py
            >>> from diffusers_tbcm import SanaTBCMPipeline

            >>> pipe = SanaTBCMPipeline.from_pretrained("path/to/student")
            >>> image = pipe("a tiny astronaut hatching from an egg on the moon", num_inference_steps=1).images[0]
            >>> image.save("moon.png")
            ```

        Returns:
            [`~pipelines.sana.pipeline_output.SanaPipelineOutput`] or `tuple`: the images.

        Raises:
            `ValueError`: naming the argument or the component that does not fit, and what to do.
        """
        if num_inference_steps is None:
            num_inference_steps = DEFAULT_NUM_INFERENCE_STEPS if timesteps is None else len(timesteps) - 1

        sample_size = self.transformer.config.sample_size
        native_size = sample_size * self.vae_scale_factor
        height = native_size if height is None else height
        width = native_size if width is None else width

        # The stock pipeline bins where sample_size is 32, to the 1024-pixel sizes whatever the autoencoder.
        stock_binning = sample_size == 32 and native_size == 1024
        if use_resolution_binning is None:
            use_resolution_binning = stock_binning
        own_binning = use_resolution_binning and not stock_binning
        resize = own_binning and output_type != "latent"

        image_height, image_width = height, width
        if own_binning:
            bins = self._resolution_bins(native_size)
            height, width = self.image_processor.classify_height_width_bin(height, width, ratios=bins)

        images = super().__call__(
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
            output_type="pt" if resize else output_type,
            return_dict=False,
            clean_caption=clean_caption,
            use_resolution_binning=use_resolution_binning and stock_binning,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=complex_human_instruction,
        )[0]

        if resize:
            images = self.image_processor.resize_and_crop_tensor(images, image_width, image_height)
            images = self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))
        return SanaPipelineOutput(images=images) if return_dict else (images,)

    def _resolution_bins(self, native_size: int) -> dict[str, list[int]]:
        """The 1024-pixel sizes of Sana's training, scaled to `native_size` pixels."""
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        scale = native_size / 1024 / multiple
        return {
            ratio: [max(1, round(size * scale)) * multiple for size in sizes]
            for ratio, sizes in ASPECT_RATIO_1024_BIN.items()
        }
