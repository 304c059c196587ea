"""FLUX.2 [klein] base (Black Forest Labs, 2026): all that is this family's own. diffusers has it from 0.37."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

from ..components import MODEL_CONFIG, MODEL_INDEX
from ..files import read_json
from ..text import Text, tokens_read
from .autoencoder_kl import vae_scale_factor as vae_scale_factor
from .guided import guidance_arguments as guidance_arguments
from .loading import load_network, load_prompt_pipeline
from .own_time import DENSE_TIME_SCALE as DENSE_TIME_SCALE
from .own_time import embed_time as embed_time
from .own_time import infer_timestep_scale as infer_timestep_scale
from .own_time import make_student as make_student
from .own_time import name_timestep_scale as name_timestep_scale
from .own_time import time_features as time_features
from .own_time import timestep_scale as timestep_scale
from .packed import PACK, pack, unpack
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


TRANSFORMER_CLASS = Flux2Transformer2DModel
PIPELINE_CLASS = Flux2KleinPipeline
STUDENT_PIPELINE_CLASS = Flux2KleinPipeline
STUDENT_EMBEDS_GUIDANCE = False
TAG = "flux2-klein"
COPIED_COMPONENTS = ("text_encoder", "tokenizer", "vae")
OPTIONAL_COMPONENTS: tuple[str, ...] = ()
INSTRUCTION = None
READING_OPTIONS: tuple[str, ...] = ("max_sequence_length",)
CALL_OPTIONS: dict[str, Any] = {}
GUIDED_OPTIONS: dict[str, Any] = {}
RESCALE_GUIDED = None

# Attention and feed-forward of both streams, and what is both of the blocks in which they are one. Its way out is left
# alone: `attn.to_out` is the name of a list in the other blocks.
LORA_TARGET_MODULES = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",
    "attn.to_qkv_mlp_proj",
)  # fmt: skip

TIME_EMBEDDER = "time_guidance_embed.timestep_embedder"
PROMPT_TOKENS = 512  # that the stock pipeline reads; it is the most that it has been tried with
blocks = double_and_single_blocks


def load_transformer(folder: Path, variant: str | None = None) -> Flux2Transformer2DModel:
    """Load the network of a pipeline folder, in float32; arguments are those of `load_network`.

    Raises:
        ValueError: as `load_network`, and for a network that has no unconditional branch to be guided by.
    """
    if read_json(folder / MODEL_INDEX).get("is_distilled", False):
        raise ValueError(f"teacher {str(folder)!r} is distilled itself (`is_distilled`): give a klein *base*")
    if read_json(folder / "transformer" / MODEL_CONFIG).get("guidance_embeds", True):
        raise ValueError(f"teacher {str(folder)!r} embeds guidance (`guidance_embeds`): give a klein *base*")
    return load_network(Flux2Transformer2DModel, folder, "transformer", variant)


def load_vae(folder: Path, variant: str | None = None) -> AutoencoderKLFlux2:
    """Load the autoencoder of a pipeline folder, in float32; arguments and errors are those of `load_network`."""
    return load_network(AutoencoderKLFlux2, folder, "vae", variant)


def load_text_pipeline(folder: Path, dtype: torch.dtype, variant: str | None = None) -> Flux2KleinPipeline:
    """Load what embeds prompts, frozen; arguments and errors are those of `load_prompt_pipeline`."""
    return load_prompt_pipeline(Flux2KleinPipeline, folder, dtype, variant)


def prompt_tokens(folder: Path, asked: int | None) -> int:
    """Say how many tokens of a prompt are read.

    Args:
        folder: the pipeline's.
        asked: as many as asked for; None for the stock pipeline's number.

    Returns:
        The number.

    Raises:
        ValueError: for more than the stock pipeline's number.
    """
    return tokens_read(asked, usual=PROMPT_TOKENS, most=PROMPT_TOKENS)


def encode_prompt(
    pipeline: Flux2KleinPipeline,
    prompt: str,
    *,
    max_sequence_length: int,
    instruction: list[str] | None = None,
    device: torch.device | str | None = None,
) -> Text:
    """Embed a prompt, inside the text encoder's chat template.

    Args:
        pipeline: with tokenizer and text encoder.
        prompt: the prompt.
        max_sequence_length: tokens kept of it.
        instruction: None.
        device: where to compute.

    Returns:
        Its text, `max_sequence_length` embeddings, padding among them, as the network attends to all.
    """
    embeds, _ = pipeline.encode_prompt(prompt, device=device, max_sequence_length=max_sequence_length)
    return Text.unmasked(embeds)


def text_arguments(text: Text) -> dict[str, Any]:
    """Give embedded prompts as arguments of the call of `make_pipeline`'s pipeline."""
    return {"prompt_embeds": text.embeds}


class EmbeddedPromptsPipeline(Flux2KleinPipeline):
    """The stock pipeline, whose call takes an embedded negative prompt, but no words of one."""

    def __call__(self, *args: Any, negative_prompt: None = None, **options: Any) -> Any:
        """Draw, as the stock method does."""
        return super().__call__(*args, **options)


def make_pipeline(vae: Any, transformer: Any, scheduler: Any) -> EmbeddedPromptsPipeline:
    """Make a pipeline that draws embedded prompts."""
    return EmbeddedPromptsPipeline(scheduler, vae, None, None, transformer)


@torch.no_grad()
def encode_pixels(vae: AutoencoderKLFlux2, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pictures, each to the mean of its distribution.

    Args:
        vae: the autoencoder.
        pixels: in [-1, 1], (batch, 3, height, width).

    Returns:
        Latents on unit scale, (latent - mean) / deviation of each channel of a token, (batch, channels, height,
        width), float32, on the autoencoder's device.
    """
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, deviation = _scale(vae)
    return unpack((pack(latents) - mean) / deviation, latents.shape)


@torch.no_grad()
def decode_latents(vae: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents.

    Args:
        vae: the autoencoder.
        latents: on unit scale, (batch, channels, height, width).

    Returns:
        Pixels in [-1, 1], (batch, 3, height, width), float32, on the autoencoder's device.
    """
    mean, deviation = _scale(vae)
    latents = unpack(pack(latents.to(vae.device)) * deviation + mean, latents.shape)
    return vae.decode(latents.to(vae.dtype)).sample.float().clamp(-1, 1)


def _scale(vae: AutoencoderKLFlux2) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel of a token, (4 channels,), which a batch norm holds for it."""
    return vae.bn.running_mean.float(), torch.sqrt(vae.bn.running_var.float() + vae.config["batch_norm_eps"])


def embeds_guidance(transformer: Flux2Transformer2DModel) -> bool:
    """Say whether the network takes the guidance scale as an input: one that does is refused."""
    return False


def velocity(
    transformer: Flux2Transformer2DModel,
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
    embed = transformer.time_guidance_embed
    sinusoids = embed.time_proj(time * PROJECTED_TIME).to(dtype)
    exact = embed.timestep_embedder.register_forward_pre_hook(lambda _, args: (sinusoids, *args[1:]))
    try:
        output = transformer(
            pack(sample.to(dtype)),
            encoder_hidden_states=text.embeds.to(dtype),
            timestep=time,
            txt_ids=_places(1, 1, length, sample.device),
            img_ids=_places(rows, columns, 1, sample.device),
            return_dict=False,
        )[0]
    finally:
        exact.remove()
    return unpack(output, sample.shape)


def _places(rows: int, columns: int, length: int, device: torch.device) -> torch.Tensor:
    """Picture, row, column and place in the text of every token, (tokens, 4)."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, rows, columns, length)))


def modulation(transformer: Flux2Transformer2DModel, embedded: torch.Tensor) -> torch.Tensor:
    """Give what the network's blocks are modulated by, all of a kind alike.

    Args:
        transformer: the network.
        embedded: the conditioning vector, as `embed_time` gives it, (batch, inner_dim).

    Returns:
        Shifts, scales and gates, (batch, features).
    """
    layers = (
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
    )
    return torch.cat([layer(embedded) for layer in layers], dim=1)
