"""LongCat-Image (Meituan, 2025): all that is this family's own. diffusers has it from 0.37."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

from ..text import Text
from .autoencoder_kl import decode_latents as decode_latents
from .autoencoder_kl import encode_pixels as encode_pixels
from .autoencoder_kl import load_vae as load_vae
from .autoencoder_kl import vae_scale_factor as vae_scale_factor
from .guided import guidance_arguments as guidance_arguments
from .loading import load_network, load_prompt_pipeline
from .own_time import DENSE_TIME_SCALE as DENSE_TIME_SCALE
from .own_time import infer_timestep_scale as infer_timestep_scale
from .own_time import make_student as make_student
from .own_time import name_timestep_scale as name_timestep_scale
from .own_time import time_features as time_features
from .own_time import timestep_scale as timestep_scale
from .packed import PACK, image_places, pack, unpack
from .packed import image_tokens as image_tokens
from .packed import latent_shape as latent_shape
from .packed import native_size as native_size
from .patched import after_blocks as after_blocks
from .patched import double_and_single_blocks
from .patched import inner_dim as inner_dim
from .patched import keep_text as keep_text
from .patched import make_ready as make_ready
from .time_embedding import PROJECTED_TIME
from .time_embedding import in_dense_time as in_dense_time
from .time_embedding import modulation as modulation


TRANSFORMER_CLASS = LongCatImageTransformer2DModel
PIPELINE_CLASS = LongCatImagePipeline
STUDENT_PIPELINE_CLASS = LongCatImagePipeline
STUDENT_EMBEDS_GUIDANCE = False
TAG = "longcat-image"
COPIED_COMPONENTS = ("text_encoder", "tokenizer", "vae")
OPTIONAL_COMPONENTS = ("text_processor",)  # which rewrites prompts
INSTRUCTION = None
READING_OPTIONS: tuple[str, ...] = ()
CALL_OPTIONS: dict[str, Any] = {"enable_prompt_rewrite": False}  # prompts were learned as they are
GUIDED_OPTIONS: dict[str, Any] = {"enable_cfg_renorm": False}  # guidance was learned as it is
RESCALE_GUIDED = None

# Attention and feed-forward of both streams, and of the blocks in which they are one. `proj_out` follows both there;
# the network's last layer has that name too.
LORA_TARGET_MODULES = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
    "proj_out",
)  # fmt: skip

TIME_EMBEDDER = "time_embed.timestep_embedder"
PROMPT_TOKENS = 512  # the stock pipeline's, which cannot be told another number; pictures' places count from it
blocks = double_and_single_blocks


def load_transformer(folder: Path, variant: str | None = None) -> LongCatImageTransformer2DModel:
    """Load the network of a pipeline folder, in float32; arguments and errors are those of `load_network`."""
    return load_network(LongCatImageTransformer2DModel, folder, "transformer", variant)


def load_text_pipeline(folder: Path, dtype: torch.dtype, variant: str | None = None) -> LongCatImagePipeline:
    """Load what embeds prompts, frozen; arguments and errors are those of `load_prompt_pipeline`."""
    return load_prompt_pipeline(LongCatImagePipeline, folder, dtype, variant, without=OPTIONAL_COMPONENTS)


def prompt_tokens(folder: Path, asked: int | None) -> int:
    """Say how many tokens of a prompt are read.

    Args:
        folder: the pipeline's.
        asked: as many as asked for; None for the stock pipeline's number.

    Returns:
        The stock pipeline's number.

    Raises:
        ValueError: where another one is asked for.
    """
    if asked not in (None, PROMPT_TOKENS):
        raise ValueError(
            f"`max_sequence_length` is {asked}: this teacher's pipeline always reads {PROMPT_TOKENS} tokens; leave it"
            " out"
        )
    return PROMPT_TOKENS


def encode_prompt(
    pipeline: LongCatImagePipeline,
    prompt: str,
    *,
    max_sequence_length: int,
    instruction: list[str] | None = None,
    device: torch.device | str | None = None,
) -> Text:
    """Embed a prompt.

    Args:
        pipeline: with tokenizer and text encoder.
        prompt: the prompt.
        max_sequence_length: 512.
        instruction: None.
        device: where to compute; the text encoder is there.

    Returns:
        Its text, 512 embeddings, padding among them, as the network attends to all.
    """
    embeds, _ = pipeline.encode_prompt([prompt])
    return Text.unmasked(embeds)


def text_arguments(text: Text) -> dict[str, Any]:
    """Give embedded prompts as arguments of the call of `make_pipeline`'s pipeline."""
    return {"prompt_embeds": text.embeds}


class EmbeddedPromptsPipeline(LongCatImagePipeline):
    """The stock pipeline, whose call takes embeddings, but asks for a prompt with them."""

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed prompts, or repeat what is embedded, as the stock method does."""
        if prompt_embeds is not None:
            prompt = [""] * len(prompt_embeds)  # of which it reads the number; a negative prompt is one
        return super().encode_prompt(prompt, num_images_per_prompt, prompt_embeds)


def make_pipeline(vae: Any, transformer: Any, scheduler: Any) -> EmbeddedPromptsPipeline:
    """Make a pipeline that draws embedded prompts."""
    return EmbeddedPromptsPipeline(scheduler, vae, None, None, None, transformer)


def embeds_guidance(transformer: LongCatImageTransformer2DModel) -> bool:
    """Say whether the network takes the guidance scale as an input: its forward has an argument that it ignores.

    Classifier-free guidance is the plain one. The stock pipeline rescales it to the conditional branch's norm unless
    `enable_cfg_renorm` is False, which is no part of what is distilled.
    """
    return False


def velocity(
    transformer: LongCatImageTransformer2DModel,
    sample: torch.Tensor,
    time: torch.Tensor,
    text: Text,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    """Evaluate the network, v(x_s, s), s as it is: by itself the network rounds it to its activations' dtype.

    Args:
        transformer: the network.
        sample: x_s on unit scale, (batch, channels, height, width).
        time: s, (batch,).
        text: of the prompts; batch is a multiple of them.
        guidance: None.

    Returns:
        The velocity, the shape of `sample`, in the network's dtype.
    """
    assert guidance is None
    dtype, text = transformer.dtype, text.for_rows(sample.shape[0])
    rows, columns = sample.shape[2] // PACK, sample.shape[3] // PACK
    length = text.embeds.shape[1]
    exact = transformer.time_embed.register_forward_pre_hook(lambda _, args: (time * PROJECTED_TIME, *args[1:]))
    try:
        output = transformer(
            pack(sample.to(dtype)),
            encoder_hidden_states=text.embeds.to(dtype),
            timestep=time,
            txt_ids=_text_places(length, sample.device),
            img_ids=image_places(rows, columns, sample.device, kind=1, first=PROMPT_TOKENS),
            return_dict=False,
        )[0]
    finally:
        exact.remove()
    return unpack(output, sample.shape)


def _text_places(length: int, device: torch.device) -> torch.Tensor:
    """What a token is, 0 for text, and its place twice, (length, 3)."""
    place = torch.arange(length, dtype=torch.float32, device=device)
    return torch.stack([torch.zeros_like(place), place, place], dim=1)


def embed_time(
    transformer: LongCatImageTransformer2DModel, time: torch.Tensor, guidance: torch.Tensor | None
) -> torch.Tensor:
    """Embed time as the network does.

    Args:
        transformer: the network.
        time: s, (batch,).
        guidance: None.

    Returns:
        The conditioning vector, (batch, inner_dim).
    """
    return transformer.time_embed(time * PROJECTED_TIME, transformer.dtype)
