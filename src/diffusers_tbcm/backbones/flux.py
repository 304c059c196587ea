"""FLUX.1-dev (Black Forest Labs, 2024): all that is this family's own.

The network was distilled to take the guidance scale as an input, and has no unconditional branch. Its students learn
one scale, as those of other families do, and are told 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from ..text import Text, tokens_read
from .autoencoder_kl import decode_latents as decode_latents
from .autoencoder_kl import encode_pixels as encode_pixels
from .autoencoder_kl import load_vae as load_vae
from .autoencoder_kl import vae_scale_factor as vae_scale_factor
from .guided import guidance_arguments as guidance_arguments
from .loading import load_network, load_prompt_pipeline
from .own_time import DENSE_TIME_SCALE as DENSE_TIME_SCALE
from .own_time import embed_time as embed_time
from .own_time import infer_timestep_scale as infer_timestep_scale
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
from .time_embedding import make_student as make_student
from .time_embedding import modulation as modulation


TRANSFORMER_CLASS = FluxTransformer2DModel
PIPELINE_CLASS = FluxPipeline
STUDENT_PIPELINE_CLASS = FluxPipeline
STUDENT_EMBEDS_GUIDANCE = False
TAG = "flux"
COPIED_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
OPTIONAL_COMPONENTS: tuple[str, ...] = ()
INSTRUCTION = None
READING_OPTIONS: tuple[str, ...] = ("max_sequence_length",)
CALL_OPTIONS: dict[str, Any] = {}
GUIDED_OPTIONS: dict[str, Any] = {}
RESCALE_GUIDED = None

# Attention and feed-forward of both streams, and of the blocks in which they are one. `proj_out` follows both there;
# the network's last layer has that name too.
LORA_TARGET_MODULES = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
    "proj_out",
)  # fmt: skip

TIME_EMBEDDER = "time_text_embed.timestep_embedder"
PROMPT_TOKENS = 512  # that the stock pipeline gives T5, and the most that it allows
blocks = double_and_single_blocks


def load_transformer(folder: Path, variant: str | None = None) -> FluxTransformer2DModel:
    """Load the network of a pipeline folder, in float32; arguments are those of `load_network`.

    Raises:
        ValueError: as `load_network`, and for a network that takes no guidance, such as FLUX.1-schnell.
    """
    transformer = load_network(FluxTransformer2DModel, folder, "transformer", variant)
    if not embeds_guidance(transformer):
        raise ValueError(f"teacher {str(folder)!r} takes no guidance, as a FLUX.1-schnell: give a FLUX.1-dev")
    return transformer


def load_text_pipeline(folder: Path, dtype: torch.dtype, variant: str | None = None) -> FluxPipeline:
    """Load what embeds prompts, frozen; arguments and errors are those of `load_prompt_pipeline`."""
    return load_prompt_pipeline(FluxPipeline, folder, dtype, variant)


def prompt_tokens(folder: Path, asked: int | None) -> int:
    """Say how many tokens of a prompt T5 reads; CLIP reads its own 77.

    Args:
        folder: the pipeline's.
        asked: as many as asked for; None for the stock pipeline's number.

    Returns:
        The number.

    Raises:
        ValueError: where the stock pipeline allows no prompt of that length.
    """
    return tokens_read(asked, usual=PROMPT_TOKENS, most=PROMPT_TOKENS)


def encode_prompt(
    pipeline: FluxPipeline,
    prompt: str,
    *,
    max_sequence_length: int,
    instruction: list[str] | None = None,
    device: torch.device | str | None = None,
) -> Text:
    """Embed a prompt.

    Args:
        pipeline: with tokenizers and text encoders.
        prompt: the prompt.
        max_sequence_length: tokens that T5 reads.
        instruction: None.
        device: where to compute; the text encoders are there.

    Returns:
        Its text, T5's embeddings, padding among them, as the network attends to all, and CLIP's pooled one.
    """
    embeds, pooled, _ = pipeline.encode_prompt(prompt, None, device, max_sequence_length=max_sequence_length)
    return Text.unmasked(embeds, pooled)


def text_arguments(text: Text) -> dict[str, Any]:
    """Give embedded prompts as arguments of the stock pipeline's call."""
    return {"prompt_embeds": text.embeds, "pooled_prompt_embeds": text.pooled}


def make_pipeline(vae: Any, transformer: Any, scheduler: Any) -> FluxPipeline:
    """Make a pipeline that draws embedded prompts."""
    return FluxPipeline(scheduler, vae, None, None, None, None, transformer)


def embeds_guidance(transformer: FluxTransformer2DModel) -> bool:
    """Say whether the network takes the guidance scale as an input."""
    return transformer.config["guidance_embeds"]


def velocity(
    transformer: FluxTransformer2DModel,
    sample: torch.Tensor,
    time: torch.Tensor,
    text: Text,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    """Evaluate the network, v(x_s, s), s and guidance as they are: the network rounds both to its activations' dtype.

    Args:
        transformer: the network.
        sample: x_s on unit scale, (batch, channels, height, width).
        time: s, (batch,).
        text: of the prompts, with pooled embeddings; batch is a multiple of them.
        guidance: the scale, (batch,); None for a student's 1.

    Returns:
        The velocity, the shape of `sample`, in the network's dtype.
    """
    dtype, text, device = transformer.dtype, text.for_rows(sample.shape[0]), sample.device
    assert text.pooled is not None
    if guidance is None:
        guidance = torch.ones(sample.shape[0], dtype=time.dtype, device=device)
    wide = time * PROJECTED_TIME, guidance * PROJECTED_TIME
    exact = transformer.time_text_embed.register_forward_pre_hook(lambda _, args: (*wide, args[2]))
    try:
        output = transformer(
            pack(sample.to(dtype)),
            encoder_hidden_states=text.embeds.to(dtype),
            pooled_projections=text.pooled.to(dtype),
            timestep=time,
            img_ids=image_places(sample.shape[2] // PACK, sample.shape[3] // PACK, device),
            txt_ids=torch.zeros(text.embeds.shape[1], 3, device=device),
            guidance=guidance,
            return_dict=False,
        )[0]
    finally:
        exact.remove()
    return unpack(output, sample.shape)
