"""Sana (arXiv 2410.10629): all that is this family's own."""

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaCombinedTimestepGuidanceEmbeddings
from torch import nn

from ..files import read_json
from ..text import Text
from .guided import guidance_arguments as guidance_arguments
from .loading import load_network, load_prompt_pipeline
from .patched import after_blocks as after_blocks
from .patched import blocks as blocks
from .patched import image_tokens as image_tokens
from .patched import latent_size
from .sana_attention import deal_out
from .sana_attention import keep_text as keep_text
from .sana_attention import make_ready as make_ready


TRANSFORMER_CLASS = SanaTransformer2DModel
PIPELINE_CLASS = SanaPipeline
STUDENT_PIPELINE_CLASS = SanaSprintPipeline
STUDENT_EMBEDS_GUIDANCE = True
TAG = "sana"
COPIED_COMPONENTS = ("text_encoder", "tokenizer", "vae")  # the student's are its teacher's, byte for byte
OPTIONAL_COMPONENTS: tuple[str, ...] = ()
INSTRUCTION: list[str] = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
READING_OPTIONS: tuple[str, ...] = ("max_sequence_length", "complex_human_instruction")
CALL_OPTIONS: dict[str, Any] = {"use_resolution_binning": False}  # draw the size that was asked for
GUIDED_OPTIONS: dict[str, Any] = {}
RESCALE_GUIDED = None
PROMPT_TOKENS = 300

# diffusers' SanaPipeline feeds the network 1000 s times `config.timestep_scale`, and its SanaSprintPipeline feeds s
# itself whatever the config says. A checkpoint with this scale is therefore one whose network was trained on s.
DENSE_TIME_CONFIG_SCALE = 0.001
PLAIN_SANA_SCALE = 1000.0
DENSE_TIME_SCALE = 1.0

# LoRA adapts every large matrix, as diffusers' LCM-LoRA script does: attention is only half of a Sana block's weights,
# the pointwise convolutions of its Mix-FFN the other half, and a student answers to time otherwise than its teacher,
# hence the modulation layer. The depthwise convolution is small and has no low rank.
LORA_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "time_embed.linear")
GUIDANCE_EMBEDDER = "time_embed.guidance_embedder"
# The layers that embed time, as a network without a guidance embedder calls them, and the last of them.
TIME_EMBEDDER = "time_embed.emb.timestep_embedder"
TEACHER_TIME_LAYER = f"{TIME_EMBEDDER}.linear_2"


def load_transformer(folder: Path, variant: str | None = None) -> SanaTransformer2DModel:
    """Load the network of a pipeline folder, in float32; arguments and errors are those of `load_network`."""
    return load_network(SanaTransformer2DModel, folder, "transformer", variant)


def load_vae(folder: Path, variant: str | None = None) -> AutoencoderDC:
    """Load the autoencoder of a pipeline folder, in float32; arguments and errors are those of `load_network`."""
    return load_network(AutoencoderDC, folder, "vae", variant)


def load_text_pipeline(folder: Path, dtype: torch.dtype, variant: str | None = None) -> SanaPipeline:
    """Load what embeds prompts, frozen; arguments and errors are those of `load_prompt_pipeline`."""
    return load_prompt_pipeline(SanaPipeline, folder, dtype, variant)


def prompt_tokens(folder: Path, asked: int | None) -> int:
    """Say how many tokens of a prompt are read.

    Args:
        folder: the pipeline's.
        asked: as many as asked for; None for the stock pipeline's number.

    Returns:
        The number.

    Raises:
        ValueError: where the text encoder reads fewer.
    """
    context = read_json(folder / "text_encoder" / "config.json").get("max_position_embeddings")
    if asked is not None and context is not None and asked > context:
        raise ValueError(f"`max_sequence_length` is {asked}: the teacher's text encoder reads {context} tokens")
    return PROMPT_TOKENS if asked is None else asked


def encode_prompt(
    pipeline: SanaPipeline,
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
        max_sequence_length: tokens kept of it.
        instruction: lines put before it.
        device: where to compute.

    Returns:
        Its text, without padding.
    """
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompt,
        do_classifier_free_guidance=False,
        device=device,
        max_sequence_length=max_sequence_length,
        complex_human_instruction=instruction,
    )
    return Text.unmasked(embeds[:, : int(mask.sum())])


def text_arguments(text: Text) -> dict[str, Any]:
    """Give embedded prompts as arguments of the stock pipelines' call."""
    return {"prompt_embeds": text.embeds, "prompt_attention_mask": text.mask}


def make_pipeline(vae: Any, transformer: Any, scheduler: Any) -> SanaPipeline:
    """Make a stock pipeline that draws embedded prompts."""
    return SanaPipeline(None, None, vae, transformer, scheduler)


@torch.no_grad()
def encode_pixels(vae: AutoencoderDC, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pictures.

    Args:
        vae: the autoencoder.
        pixels: in [-1, 1], (batch, 3, height, width).

    Returns:
        Latents on unit scale, (batch, channels, height, width), float32, on the autoencoder's device.
    """
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent.float() * vae.config["scaling_factor"]


@torch.no_grad()
def decode_latents(vae: AutoencoderDC, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents.

    Args:
        vae: the autoencoder.
        latents: on unit scale, (batch, channels, height, width).

    Returns:
        Pixels in [-1, 1], (batch, 3, height, width), float32, on the autoencoder's device.
    """
    latents = latents.to(vae.device, vae.dtype) / vae.config["scaling_factor"]
    return vae.decode(latents).sample.float().clamp(-1, 1)


def vae_scale_factor(folder: Path) -> int:
    """Read how many pixels a side a latent pixel stands for, without loading the autoencoder.

    Args:
        folder: a pipeline's folder.

    Returns:
        The autoencoder's compression, 32 for Sana's own.
    """
    return 2 ** (len(read_json(folder / "vae" / "config.json")["encoder_block_out_channels"]) - 1)


def latent_shape(folder: Path, transformer: SanaTransformer2DModel, resolution: int | None) -> tuple[int, ...]:
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
    size = latent_size(resolution, native=config["sample_size"], factor=factor, patch=config["patch_size"])
    if config["interpolation_scale"] is not None and size != config["sample_size"]:
        native = config["sample_size"] * factor
        raise ValueError(f"`resolution` is {resolution}: this teacher's position embedding is for {native} pixels")
    return config["in_channels"], size, size


def native_size(transformer: SanaTransformer2DModel) -> int:
    """Say how many latent pixels a side a network's own pictures have."""
    return transformer.config["sample_size"]


def inner_dim(transformer: SanaTransformer2DModel) -> int:
    """Give the size of the network's hidden states."""
    return transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]


def embeds_guidance(transformer: SanaTransformer2DModel) -> bool:
    """Say whether the network takes the guidance scale as an input."""
    return transformer.config["guidance_embeds"]


def velocity(
    transformer: SanaTransformer2DModel,
    sample: torch.Tensor,
    time: torch.Tensor,
    text: Text,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    """Evaluate the network, v(x_s, s).

    Args:
        transformer: the network, prepared by `make_ready`.
        sample: x_s on unit scale, (batch, channels, height, width).
        time: s in the network's own units, (batch,).
        text: of the prompts; batch is a multiple of them.
        guidance: unscaled classifier-free guidance weight, (batch,), for a network that embeds it.

    Returns:
        The velocity, the shape of `sample`, in the network's dtype.
    """
    dtype = transformer.dtype
    embeds, mask = deal_out(text.embeds.to(dtype), text.mask, sample.shape[0])
    return transformer(
        sample.to(dtype),
        encoder_hidden_states=embeds,
        timestep=time,
        guidance=_scaled(transformer, guidance),
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]


def embed_time(transformer: SanaTransformer2DModel, time: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
    """Embed time, and guidance where the network takes it, as it does before its modulation layers.

    Args:
        transformer: the network.
        time: s in the network's own units, (batch,).
        guidance: unscaled classifier-free guidance weight, (batch,), for a network that embeds it.

    Returns:
        The conditioning vector, (batch, inner_dim).
    """
    condition = {} if guidance is None else {"guidance": _scaled(transformer, guidance)}
    _, embedded = transformer.time_embed(time, hidden_dtype=transformer.dtype, **condition)
    return embedded


def time_features(transformer: SanaTransformer2DModel, time: torch.Tensor) -> torch.Tensor:
    """Give the sinusoids through which `TIME_EMBEDDER` sees time.

    Args:
        transformer: a network without a guidance embedder.
        time: s in the network's own units, (batch,).

    Returns:
        (batch, channels), float32.
    """
    return transformer.time_embed.emb.time_proj(time)


def modulation(transformer: SanaTransformer2DModel, embedded: torch.Tensor) -> torch.Tensor:
    """Give what all blocks are modulated by, beside tables of their own.

    Args:
        transformer: the network.
        embedded: the conditioning vector, as `embed_time` gives it, (batch, inner_dim).

    Returns:
        Shifts, scales and gates, (batch, 6 inner_dim).
    """
    time_embed = transformer.time_embed
    return time_embed.linear(time_embed.silu(embedded))


def timestep_scale(transformer: SanaTransformer2DModel) -> float:
    """Read what s is multiplied by before the network sees it, where its config tells.

    Args:
        transformer: the network.

    Returns:
        `config.timestep_scale`, or 1 where that is 0.001, the mark of a network trained on s itself.
    """
    scale = transformer.config["timestep_scale"]
    return 1.0 if scale == DENSE_TIME_CONFIG_SCALE else scale


def in_dense_time(transformer: SanaTransformer2DModel, scale: float) -> bool:
    """Say whether a network sees s itself, as consistency training wants it.

    Args:
        transformer: the network.
        scale: the factor on s, as `infer_timestep_scale` finds it.

    Returns:
        Whether it is no larger than that of dense time.
    """
    return scale <= DENSE_TIME_SCALE


def name_timestep_scale(transformer: SanaTransformer2DModel, scale: float) -> None:
    """Write into a network's config what the stock pipeline needs to feed it its own times.

    Args:
        transformer: the network.
        scale: the factor on s: 1 for dense time, 1000 for a plain Sana, as `infer_timestep_scale` finds it.
    """
    transformer.register_to_config(timestep_scale=scale / PLAIN_SANA_SCALE)


@torch.no_grad()
def infer_timestep_scale(transformer: SanaTransformer2DModel, text: Text) -> float:
    """Find out what a network's time input is in units of s: its config alone does not tell 1 from 1000.

    A config with `timestep_scale=1.0` is a dense-time network (fed s) in a Sana-Sprint pipeline and a plain Sana (fed
    1000 s) in a SanaPipeline. So both are tried on pure noise e, where v = e - E[x_0] is close to e: told another
    time than that of pure noise, a network takes the noise for signal and misses it.

    Args:
        transformer: the network in flow-matching form.
        text: of any prompt, the empty one for example.

    Returns:
        The factor on s for `TrigFlowTransformer`: 1 for dense time, 1000 for a plain Sana.
    """
    config = transformer.config
    if config["guidance_embeds"] or config["timestep_scale"] != 1:
        return timestep_scale(transformer)
    size = config["sample_size"]
    noise = torch.randn((1, config["in_channels"], size, size), generator=torch.Generator().manual_seed(0))
    noise = noise.to(transformer.device, transformer.dtype)

    def error(time: float) -> float:
        velocity = transformer(
            noise,
            encoder_hidden_states=text.embeds.to(transformer.dtype),
            timestep=torch.full((1,), time, device=transformer.device),
            encoder_attention_mask=text.mask,
            return_dict=False,
        )[0]
        return (velocity - noise).float().square().mean().item()

    # By a clear margin: a network that was not trained tells nothing, and counts as dense.
    return PLAIN_SANA_SCALE if error(PLAIN_SANA_SCALE) < 0.5 * error(1.0) else 1.0


class WideTimeEmbedding(SanaCombinedTimestepGuidanceEmbeddings):
    """diffusers' time and guidance embedding, in float32 under autocast too: its tangent spikes in bf16."""

    def forward(
        self, timestep: torch.Tensor, guidance: torch.Tensor, hidden_dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed times and guidance; `hidden_dtype`, the activations', is followed by half-precision weights only."""
        dtype = self.timestep_embedder.linear_1.weight.dtype
        if dtype in (torch.float16, torch.bfloat16):
            return super().forward(timestep, guidance, hidden_dtype)
        with torch.autocast(timestep.device.type, enabled=False):
            return super().forward(timestep, guidance, dtype)


def make_student(
    teacher: SanaTransformer2DModel, guidance_embeds_scale: float | None = None
) -> SanaTransformer2DModel:
    """Copy a teacher into a trainable student that takes the guidance scale as an input and starts equal to it.

    A teacher without a guidance embedder gets one whose last layer is zero, so the copy computes the same function for
    every guidance. The weights `time_embed.emb.timestep_embedder.*` are `time_embed.timestep_embedder.*` in the copy.

    Args:
        teacher: the network to copy; it is left as it is.
        guidance_embeds_scale: what the student multiplies guidance by; None keeps the teacher's.

    Returns:
        The student, on the teacher's device and in its dtype, every parameter trainable.

    Raises:
        ValueError: if the teacher already embeds guidance with another scale than `guidance_embeds_scale`.
    """
    scale = teacher.config["guidance_embeds_scale"] if guidance_embeds_scale is None else guidance_embeds_scale
    if teacher.config["guidance_embeds"] and scale != teacher.config["guidance_embeds_scale"]:
        raise ValueError(
            f"`guidance_embeds_scale` is {scale}, but the teacher embeds guidance with scale "
            f"{teacher.config['guidance_embeds_scale']}."
        )
    student = copy.deepcopy(teacher)
    embed_guidance(student, scale)
    return student.requires_grad_(True)


def embed_guidance(transformer: SanaTransformer2DModel, guidance_embeds_scale: float) -> None:
    """Let a transformer take the guidance scale as an input, in place and without changing what it computes.

    Its embedders and modulation layer are kept, the first renamed from `time_embed.emb.timestep_embedder` to
    `time_embed.timestep_embedder`; a new `time_embed.guidance_embedder` has a last layer of zeros.

    Args:
        transformer: a network with or without a guidance embedder.
        guidance_embeds_scale: what it is to multiply guidance by.
    """
    inner_dim = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    old, time_embed = transformer.time_embed, WideTimeEmbedding(inner_dim)
    if transformer.config["guidance_embeds"]:
        time_embed.timestep_embedder, time_embed.guidance_embedder = old.timestep_embedder, old.guidance_embedder
    else:
        nn.init.zeros_(time_embed.guidance_embedder.linear_2.weight)
        nn.init.zeros_(time_embed.guidance_embedder.linear_2.bias)
        time_embed.to(device=transformer.device, dtype=transformer.dtype)
        time_embed.timestep_embedder = old.emb.timestep_embedder
    time_embed.linear = old.linear
    transformer.time_embed = time_embed
    transformer.register_to_config(guidance_embeds=True, guidance_embeds_scale=guidance_embeds_scale)


def _scaled(transformer: SanaTransformer2DModel, guidance: torch.Tensor | None) -> torch.Tensor | None:
    """Guidance as the network's embedding takes it."""
    return None if guidance is None else guidance * transformer.config["guidance_embeds_scale"]
