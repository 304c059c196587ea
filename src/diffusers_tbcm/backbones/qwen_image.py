"""Qwen-Image (arXiv 2508.02324): all that is this family's own. From diffusers 0.37 it knows padding from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import nn

from ..components import MODEL_CONFIG
from ..files import read_json
from ..text import Text, tokens_read
from .loading import load_network, load_prompt_pipeline
from .own_time import DENSE_TIME_SCALE as DENSE_TIME_SCALE
from .own_time import embed_time as embed_time
from .own_time import infer_timestep_scale as infer_timestep_scale
from .own_time import make_student as make_student
from .own_time import name_timestep_scale as name_timestep_scale
from .own_time import time_features as time_features
from .own_time import timestep_scale as timestep_scale
from .packed import PACK, pack, shape_before_packing, unpack
from .packed import image_tokens as image_tokens
from .packed import native_size as native_size
from .patched import after_blocks as after_blocks
from .patched import blocks as blocks
from .patched import inner_dim as inner_dim
from .patched import keep_text as keep_text
from .time_embedding import in_dense_time as in_dense_time


TRANSFORMER_CLASS = QwenImageTransformer2DModel
PIPELINE_CLASS = QwenImagePipeline
STUDENT_PIPELINE_CLASS = QwenImagePipeline
STUDENT_EMBEDS_GUIDANCE = False
TAG = "qwen-image"
COPIED_COMPONENTS = ("text_encoder", "tokenizer", "vae")
OPTIONAL_COMPONENTS: tuple[str, ...] = ()
INSTRUCTION = None
READING_OPTIONS: tuple[str, ...] = ("max_sequence_length",)
CALL_OPTIONS: dict[str, Any] = {}
GUIDED_OPTIONS: dict[str, Any] = {}

# Attention and feed-forward of both streams
LORA_TARGET_MODULES = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
)  # fmt: skip

TIME_EMBEDDER = "time_text_embed.timestep_embedder"
PROMPT_TOKENS, MAX_PROMPT_TOKENS = 512, 1024  # that the stock pipeline keeps of a prompt, and the most that it allows


def load_transformer(folder: Path, variant: str | None = None) -> QwenImageTransformer2DModel:
    """Load the network of a pipeline folder, in float32; arguments are those of `load_network`.

    Raises:
        ValueError: as `load_network`, and for a network of pictures in layers.
    """
    if read_json(folder / "transformer" / MODEL_CONFIG).get("use_layer3d_rope", False):
        raise ValueError(f"teacher {str(folder)!r} draws pictures in layers (`use_layer3d_rope`): give a Qwen-Image")
    return load_network(QwenImageTransformer2DModel, folder, "transformer", variant)


def load_vae(folder: Path, variant: str | None = None) -> AutoencoderKLQwenImage:
    """Load the autoencoder of a pipeline folder, in float32; arguments and errors are those of `load_network`."""
    return load_network(AutoencoderKLQwenImage, folder, "vae", variant)


def load_text_pipeline(folder: Path, dtype: torch.dtype, variant: str | None = None) -> QwenImagePipeline:
    """Load what embeds prompts, frozen; arguments and errors are those of `load_prompt_pipeline`."""
    return load_prompt_pipeline(QwenImagePipeline, folder, dtype, variant)


def prompt_tokens(folder: Path, asked: int | None) -> int:
    """Say how many tokens of a prompt are read.

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
    pipeline: QwenImagePipeline,
    prompt: str,
    *,
    max_sequence_length: int,
    instruction: list[str] | None = None,
    device: torch.device | str | None = None,
) -> Text:
    """Embed a prompt, inside the stock pipeline's template.

    Args:
        pipeline: with tokenizer and text encoder.
        prompt: the prompt.
        max_sequence_length: tokens kept of it, the end of the template among them.
        instruction: None.
        device: where to compute.

    Returns:
        Its text, as many embeddings as it has tokens.
    """
    embeds, _ = pipeline.encode_prompt(prompt, device=device, max_sequence_length=max_sequence_length)
    return Text.unmasked(embeds)


def text_arguments(text: Text) -> dict[str, Any]:
    """Give embedded prompts as arguments of the stock pipeline's call."""
    return {"prompt_embeds": text.embeds, "prompt_embeds_mask": text.mask}


def guidance_arguments(guidance_scale: float, prompts: int) -> dict[str, Any]:
    """Give a guidance scale as arguments of the stock pipeline's call, which guides where it is given what to avoid.

    Args:
        guidance_scale: classifier-free guidance weight; 1 for none.
        prompts: how many the call is given.

    Returns:
        The arguments.
    """
    return {"true_cfg_scale": guidance_scale, **({"negative_prompt": [""] * prompts} if guidance_scale > 1 else {})}


def rescale_guided(guided: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """Give every token of a guided v the norm that it has without guidance, as the stock pipeline always does.

    Args:
        guided: v_uncond + w (v_cond - v_uncond), (batch, channels, height, width).
        conditional: v_cond, the shape of `guided`.

    Returns:
        The guided v, the shape of `guided`.
    """
    tokens = pack(guided)
    norm, guided_norm = (part.norm(dim=-1, keepdim=True) for part in (pack(conditional), tokens))
    return unpack(tokens * (norm / guided_norm), guided.shape)


RESCALE_GUIDED = rescale_guided


def make_pipeline(vae: Any, transformer: Any, scheduler: Any) -> QwenImagePipeline:
    """Make a stock pipeline that draws embedded prompts."""
    return QwenImagePipeline(scheduler, vae, None, None, transformer)


@torch.no_grad()
def encode_pixels(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pictures, each to the mean of its distribution, as videos of one frame.

    Args:
        vae: the autoencoder.
        pixels: in [-1, 1], (batch, 3, height, width).

    Returns:
        Latents on unit scale, (latent - mean) / deviation of each channel, (batch, channels, height, width), float32,
        on the autoencoder's device.
    """
    latents = vae.encode(pixels[:, :, None].to(vae.device, vae.dtype)).latent_dist.mode()[:, :, 0].float()
    mean, deviation = _scale(vae)
    return (latents - mean) / deviation


@torch.no_grad()
def decode_latents(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents.

    Args:
        vae: the autoencoder.
        latents: on unit scale, (batch, channels, height, width).

    Returns:
        Pixels in [-1, 1], (batch, 3, height, width), float32, on the autoencoder's device.
    """
    mean, deviation = _scale(vae)
    latents = latents.to(vae.device) * deviation + mean
    return vae.decode(latents[:, :, None].to(vae.dtype)).sample[:, :, 0].float().clamp(-1, 1)


def _scale(vae: AutoencoderKLQwenImage) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel of latents, (channels, 1, 1)."""
    mean, deviation = (
        torch.tensor(vae.config[name], device=vae.device)[:, None, None] for name in ("latents_mean", "latents_std")
    )
    return mean, deviation


def vae_scale_factor(folder: Path) -> int:
    """Read how many pixels a side a latent pixel stands for, without loading the autoencoder.

    Args:
        folder: a pipeline's folder.

    Returns:
        The autoencoder's compression, usually 8.
    """
    return 2 ** len(read_json(folder / "vae" / "config.json")["temperal_downsample"])


def latent_shape(folder: Path, transformer: QwenImageTransformer2DModel, resolution: int | None) -> tuple[int, ...]:
    """As `packed.latent_shape`, with this family's autoencoder."""
    return shape_before_packing(transformer, resolution, vae_scale_factor(folder))


def embeds_guidance(transformer: QwenImageTransformer2DModel) -> bool:
    """Say whether the network takes the guidance scale as an input: its forward has an argument, but no layer."""
    return False


class Places(nn.Module):
    """diffusers' rotary embedding of where tokens are, computed in every call.

    diffusers keeps what it has once computed for a size, be it of tensors without data, as the memory plan's are.

    Args:
        embed: diffusers' module, whose constants it takes over.
    """

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.theta, self.axes_dim = embed.theta, embed.axes_dim

    def forward(
        self, img_shapes: list[list[tuple[int, int, int]]], max_txt_seq_len: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed the places of a picture's tokens and of a text's.

        Args:
            img_shapes: for each row frames, of which there is one, rows and columns; all alike.
            max_txt_seq_len: tokens of the text.
            device: where to compute.

        Returns:
            Complex numbers of norm 1, (tokens, channels / 2), of the picture and of the text.
        """
        ((_, rows, columns),) = img_shapes[0]
        # The picture's middle is 0; the text goes on from its border along all axes
        row, column = (torch.arange(size, device=device) - (size - size // 2) for size in (rows, columns))
        row, column = torch.meshgrid(row, column, indexing="ij")
        image = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
        text = torch.arange(max_txt_seq_len, device=device)[:, None] + max(rows, columns) // 2
        return self._rotations(image), self._rotations(text.expand(-1, len(self.axes_dim)))

    def _rotations(self, places: torch.Tensor) -> torch.Tensor:
        angles = []
        for place, dim in zip(places.unbind(1), self.axes_dim, strict=True):
            exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=places.device) / dim
            angles.append(torch.outer(place, 1 / torch.pow(self.theta, exponents)))
        together = torch.cat(angles, dim=1)
        return torch.polar(torch.ones_like(together), together)


def make_ready(transformer: QwenImageTransformer2DModel) -> None:
    """Let the network embed `Places`, and freeze what its last block makes of the text.

    Nothing reads that: it would have no gradient, for which several processes would wait.

    Prompts are not shared, as the picture changes the text of every row.
    """
    if not isinstance(transformer.pos_embed, Places):
        transformer.pos_embed = Places(transformer.pos_embed)
    last = transformer.transformer_blocks[-1]
    for layers in (last.attn.to_add_out, last.txt_mlp):
        layers.requires_grad_(False)


def velocity(
    transformer: QwenImageTransformer2DModel,
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
    exact = transformer.time_text_embed.register_forward_pre_hook(lambda _, args: (time, *args[1:]))
    try:
        output = transformer(
            pack(sample.to(dtype)),
            encoder_hidden_states=text.embeds.to(dtype),
            encoder_hidden_states_mask=text.mask,
            timestep=time,
            img_shapes=[[(1, rows, columns)]] * sample.shape[0],
            return_dict=False,
        )[0]
    finally:
        exact.remove()
    return unpack(output, sample.shape)


def modulation(transformer: QwenImageTransformer2DModel, embedded: torch.Tensor) -> torch.Tensor:
    """Give what the network's blocks are modulated by.

    Args:
        transformer: the network.
        embedded: the conditioning vector, as `embed_time` gives it, (batch, inner_dim).

    Returns:
        Shifts, scales and gates of all blocks, (batch, features).
    """
    layers = [layer for block in transformer.transformer_blocks for layer in (block.img_mod, block.txt_mod)]
    return torch.cat([layer(embedded) for layer in layers], dim=1)
