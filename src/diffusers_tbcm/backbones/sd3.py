"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): all that is this family's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from ..text import Text, tokens_read
from .autoencoder_kl import decode_latents as decode_latents
from .autoencoder_kl import encode_pixels as encode_pixels
from .autoencoder_kl import load_vae as load_vae
from .autoencoder_kl import vae_scale_factor as vae_scale_factor
from .guided import guidance_arguments as guidance_arguments
from .loading import load_network, load_prompt_pipeline
from .patched import after_blocks as after_blocks
from .patched import blocks as blocks
from .patched import image_tokens as image_tokens
from .patched import inner_dim as inner_dim
from .patched import keep_text as keep_text
from .patched import latent_size
from .patched import make_ready as make_ready
from .time_embedding import in_dense_time as in_dense_time
from .time_embedding import make_student as make_student
from .time_embedding import modulation as modulation
from .time_embedding import slow_features


TRANSFORMER_CLASS = SD3Transformer2DModel
PIPELINE_CLASS = StableDiffusion3Pipeline
STUDENT_PIPELINE_CLASS = StableDiffusion3Pipeline
STUDENT_EMBEDS_GUIDANCE = False
TAG = "stable-diffusion-3"
COPIED_COMPONENTS = (
    "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "vae",
)  # fmt: skip
OPTIONAL_COMPONENTS: tuple[str, ...] = ()
INSTRUCTION = None
READING_OPTIONS: tuple[str, ...] = ("max_sequence_length",)
CALL_OPTIONS: dict[str, Any] = {}
GUIDED_OPTIONS: dict[str, Any] = {}
RESCALE_GUIDED = None

# Attention and feed-forward of both streams. The last block has no feed-forward for the text.
LORA_TARGET_MODULES = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip

TIME_SCALE = 1000.0  # the network sees 1000 s; nothing in a folder can say otherwise
DENSE_TIME_SCALE = TIME_SCALE
TIME_EMBEDDER = "time_text_embed.timestep_embedder"
PROMPT_TOKENS, MAX_PROMPT_TOKENS = 256, 512  # that the stock pipeline gives T5, and the most that it allows


def load_transformer(folder: Path, variant: str | None = None) -> SD3Transformer2DModel:
    """Load the network of a pipeline folder, in float32; arguments and errors are those of `load_network`."""
    return load_network(SD3Transformer2DModel, folder, "transformer", variant)


def load_text_pipeline(folder: Path, dtype: torch.dtype, variant: str | None = None) -> StableDiffusion3Pipeline:
    """Load what embeds prompts, frozen; arguments and errors are those of `load_prompt_pipeline`."""
    return load_prompt_pipeline(StableDiffusion3Pipeline, folder, dtype, variant)


def prompt_tokens(folder: Path, asked: int | None) -> int:
    """Say how many tokens of a prompt T5 reads; both CLIPs read their own 77.

    Args:
        folder: the pipeline's.
        asked: as many as asked for; None for the stock pipeline's number.

    Returns:
        The number.

    Raises:
        ValueError: where the stock pipeline allows no prompt of that length.
    """
    return tokens_read(asked, usual=PROMPT_TOKENS, most=MAX_PROMPT_TOKENS)


def encode_prompt(
    pipeline: StableDiffusion3Pipeline,
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
        max_sequence_length: tokens kept of it for T5.
        instruction: None.
        device: where to compute.

    Returns:
        Its text, 77 + `max_sequence_length` embeddings, padding among them, as the network attends to all, and the
        pooled embedding.
    """
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt, None, None, do_classifier_free_guidance=False, device=device, max_sequence_length=max_sequence_length
    )
    return Text.unmasked(embeds, pooled)


def text_arguments(text: Text) -> dict[str, Any]:
    """Give embedded prompts as arguments of the stock pipeline's call."""
    return {"prompt_embeds": text.embeds, "pooled_prompt_embeds": text.pooled}


def make_pipeline(vae: Any, transformer: Any, scheduler: Any) -> StableDiffusion3Pipeline:
    """Make a stock pipeline that draws embedded prompts."""
    return StableDiffusion3Pipeline(transformer, scheduler, vae, None, None, None, None, None, None)


def latent_shape(folder: Path, transformer: SD3Transformer2DModel, resolution: int | None) -> tuple[int, ...]:
    """Say what shape a picture's latents have, from the autoencoder's config alone.

    Args:
        folder: the pipeline's folder.
        transformer: its transformer.
        resolution: pixels a side; None for the transformer's own.

    Returns:
        (channels, height, width).

    Raises:
        ValueError: where the autoencoder or the position embedding does not allow the resolution.
    """
    config, factor = transformer.config, vae_scale_factor(folder)
    patch = config["patch_size"]
    size = latent_size(
        resolution,
        native=native_size(transformer),
        factor=factor,
        patch=patch,
        largest=factor * patch * config["pos_embed_max_size"],
    )
    return config["in_channels"], size, size


def native_size(transformer: SD3Transformer2DModel) -> int:
    """Say how many latent pixels a side a network's own pictures have."""
    return transformer.config["sample_size"]


def embeds_guidance(transformer: SD3Transformer2DModel) -> bool:
    """Say whether the network takes the guidance scale as an input: none does."""
    return False


def velocity(
    transformer: SD3Transformer2DModel,
    sample: torch.Tensor,
    time: torch.Tensor,
    text: Text,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    """Evaluate the network, v(x_s, s).

    Args:
        transformer: the network.
        sample: x_s on unit scale, (batch, channels, height, width).
        time: 1000 s, (batch,).
        text: of the prompts, with pooled embeddings; batch is a multiple of them.
        guidance: None.

    Returns:
        The velocity, the shape of `sample`, in the network's dtype.
    """
    dtype, text = transformer.dtype, text.for_rows(sample.shape[0])
    assert text.pooled is not None and guidance is None
    return transformer(
        sample.to(dtype),
        encoder_hidden_states=text.embeds.to(dtype),
        pooled_projections=text.pooled.to(dtype),
        timestep=time,
        return_dict=False,
    )[0]


def embed_time(transformer: SD3Transformer2DModel, time: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
    """Embed time as the network does before it adds the pooled prompt.

    Args:
        transformer: the network.
        time: 1000 s, (batch,).
        guidance: None.

    Returns:
        The conditioning vector, (batch, inner_dim).
    """
    embed = transformer.time_text_embed
    return embed.timestep_embedder(embed.time_proj(time).to(transformer.dtype))


def timestep_scale(transformer: SD3Transformer2DModel) -> float:
    """Say what s is multiplied by before the network sees it."""
    return TIME_SCALE


def name_timestep_scale(transformer: SD3Transformer2DModel, scale: float) -> None:
    """Write nothing: the stock pipeline feeds every network 1000 s."""
    assert scale == TIME_SCALE


def infer_timestep_scale(transformer: SD3Transformer2DModel, text: Text) -> float:
    """As `timestep_scale`."""
    return TIME_SCALE


def time_features(transformer: SD3Transformer2DModel, time: torch.Tensor) -> torch.Tensor:
    """Give the sinusoids through which `TIME_EMBEDDER` sees time in a network in dense time.

    Args:
        transformer: the network.
        time: 1000 s, (batch,).

    Returns:
        (batch, channels), float32.
    """
    return slow_features(transformer.time_text_embed.time_proj, time)
