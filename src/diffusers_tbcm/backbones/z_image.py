"""Z-Image (Alibaba, arXiv 2511.22699): all that is this family's own. Taken from diffusers 0.38 on.

The network's time is 1 - s, its output -v, and pictures and prompts are lists, as every prompt has its own length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, TimestepEmbedder
from torch import nn

from ..components import MODEL_CONFIG
from ..files import read_json
from ..text import Text
from .autoencoder_kl import decode_latents as decode_latents
from .autoencoder_kl import encode_pixels as encode_pixels
from .autoencoder_kl import load_vae as load_vae
from .autoencoder_kl import vae_scale_factor as vae_scale_factor
from .loading import load_network, load_prompt_pipeline
from .own_time import DENSE_TIME_SCALE as DENSE_TIME_SCALE
from .own_time import infer_timestep_scale as infer_timestep_scale
from .own_time import name_timestep_scale as name_timestep_scale
from .own_time import timestep_scale as timestep_scale
from .packed import NATIVE_SIZE, PACK
from .packed import image_tokens as image_tokens
from .packed import native_size as native_size
from .patched import keep_text as keep_text
from .patched import latent_size
from .patched import make_ready as make_ready
from .time_embedding import PROJECTED_TIME, copy_wide, sees_slow_sinusoids_only, slow_features


TRANSFORMER_CLASS = ZImageTransformer2DModel
PIPELINE_CLASS = ZImagePipeline
STUDENT_PIPELINE_CLASS = ZImagePipeline
STUDENT_EMBEDS_GUIDANCE = False
TAG = "z-image"
COPIED_COMPONENTS = ("text_encoder", "tokenizer", "vae")
OPTIONAL_COMPONENTS: tuple[str, ...] = ()
INSTRUCTION = None
READING_OPTIONS: tuple[str, ...] = ("max_sequence_length",)
CALL_OPTIONS: dict[str, Any] = {}
GUIDED_OPTIONS: dict[str, Any] = {}  # the pipeline neither rescales guidance nor cuts it off by default
RESCALE_GUIDED = None

# Attention and feed-forward of all blocks, also of those that refine pictures and prompts apart.
LORA_TARGET_MODULES = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1", "feed_forward.w2",
    "feed_forward.w3",
)  # fmt: skip

TIME_EMBEDDER = "t_embedder.mlp"
PROMPT_TOKENS = 512  # the stock pipeline's


def load_transformer(folder: Path, variant: str | None = None) -> ZImageTransformer2DModel:
    """Load the network of a pipeline folder, in float32; arguments and errors are those of `load_network`."""
    return load_network(ZImageTransformer2DModel, folder, "transformer", variant)


def load_text_pipeline(folder: Path, dtype: torch.dtype, variant: str | None = None) -> ZImagePipeline:
    """Load what embeds prompts, frozen; arguments and errors are those of `load_prompt_pipeline`."""
    return load_prompt_pipeline(ZImagePipeline, folder, dtype, variant)


def prompt_tokens(folder: Path, asked: int | None) -> int:
    """Say how many tokens of a prompt are read.

    Args:
        folder: the pipeline's.
        asked: as many as asked for; None for the stock pipeline's number.

    Returns:
        The number.

    Raises:
        ValueError: where the network knows no places for so many: they precede the picture's, in whole groups.
    """
    places = read_json(folder / "transformer" / MODEL_CONFIG)["axes_lens"][0]
    largest = (places - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF
    tokens = PROMPT_TOKENS if asked is None else asked
    if tokens > largest:
        raise ValueError(f"`max_sequence_length` is {tokens}: this teacher reads {largest} tokens at most")
    return tokens


def encode_prompt(
    pipeline: ZImagePipeline,
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
        instruction: None.
        device: where to compute; the text encoder is there.

    Returns:
        Its text, without padding.
    """
    (embeds,), _ = pipeline.encode_prompt(
        [prompt], device, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    return Text.unmasked(embeds[None])


def text_arguments(text: Text) -> dict[str, Any]:
    """Give embedded prompts as arguments of the stock pipeline's call."""
    return {"prompt_embeds": _prompts(text)}


def guidance_arguments(guidance_scale: float, prompts: int) -> dict[str, float]:
    """Give a guidance scale as arguments of the stock pipeline's call, which draws with v + g (v - v_uncond).

    Args:
        guidance_scale: classifier-free guidance weight w of v_uncond + w (v - v_uncond), g + 1; 1 for none.
        prompts: how many the call is given.

    Returns:
        The arguments.
    """
    return {"guidance_scale": guidance_scale - 1}


def make_pipeline(vae: Any, transformer: Any, scheduler: Any) -> ZImagePipeline:
    """Make a pipeline that draws embedded prompts."""
    return ZImagePipeline(scheduler, vae, None, None, transformer)


def latent_shape(folder: Path, transformer: ZImageTransformer2DModel, resolution: int | None) -> tuple[int, ...]:
    """Say what shape a picture's latents have, from the autoencoder's config alone.

    Args:
        folder: the pipeline's folder.
        transformer: its transformer.
        resolution: pixels a side; None for the stock pipeline's.

    Returns:
        (channels, height, width).

    Raises:
        ValueError: where the autoencoder, the patches and the places do not allow the resolution.
    """
    factor = vae_scale_factor(folder)
    largest = factor * PACK * min(transformer.config["axes_lens"][1:])
    size = latent_size(resolution, native=NATIVE_SIZE, factor=factor, patch=PACK, largest=largest)
    return transformer.config["in_channels"], size, size


def blocks(transformer: ZImageTransformer2DModel) -> list[nn.Module]:
    """Give the network's blocks that pictures pass, in order: those that refine prompts apart are not among them."""
    return [*transformer.noise_refiner, *transformer.layers]


def after_blocks(transformer: ZImageTransformer2DModel) -> nn.Module:
    """Give what a forward calls after the last block."""
    return transformer.all_final_layer[f"{PACK}-1"]


def inner_dim(transformer: ZImageTransformer2DModel) -> int:
    """Give the size of the network's hidden states; its conditioning vector is smaller."""
    return transformer.dim


def embeds_guidance(transformer: ZImageTransformer2DModel) -> bool:
    """Say whether the network takes the guidance scale as an input: none does."""
    return False


def velocity(
    transformer: ZImageTransformer2DModel,
    sample: torch.Tensor,
    time: torch.Tensor,
    text: Text,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    """Evaluate the network, v(x_s, s).

    Args:
        transformer: the network.
        sample: x_s on unit scale, (batch, channels, height, width).
        time: s, (batch,).
        text: of the prompts, padded at their ends; batch is a multiple of them. The host waits for their lengths.
        guidance: None.

    Returns:
        The velocity, the shape of `sample`, in the network's dtype.
    """
    assert guidance is None
    dtype, text = transformer.dtype, text.for_rows(sample.shape[0])
    prompts = [prompt.to(dtype) for prompt in _prompts(text)]
    one_frame = list(sample.to(dtype).unsqueeze(2).unbind())
    with _own_places(transformer, text):
        output = transformer(one_frame, _reversed(time), prompts, return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


def _reversed(time: torch.Tensor) -> torch.Tensor:
    """1 - s, rounded as the stock pipeline rounds it, which has it from 1000 s."""
    return (PROJECTED_TIME - PROJECTED_TIME * time) / PROJECTED_TIME


@contextmanager
def _own_places(transformer: ZImageTransformer2DModel, text: Text) -> Iterator[None]:
    """Keep a memory plan's tensors, which hold no values, out of what the network remembers of tokens' places."""
    rope = transformer.rope_embedder
    remembered = rope.freqs_cis
    if not text.holds_values:
        rope.freqs_cis = None
    try:
        yield
    finally:
        if not text.holds_values:
            rope.freqs_cis = remembered


def _prompts(text: Text) -> list[torch.Tensor]:
    """Each prompt without its padding, (length, dim)."""
    return [embeds[:length] for embeds, length in zip(text.embeds, text.lengths(), strict=True)]


def embed_time(
    transformer: ZImageTransformer2DModel, time: torch.Tensor, guidance: torch.Tensor | None
) -> torch.Tensor:
    """Embed time as the network does.

    Args:
        transformer: the network.
        time: s, (batch,).
        guidance: None.

    Returns:
        The conditioning vector, (batch, 256 or less).
    """
    return transformer.t_embedder(_reversed(time) * transformer.t_scale)


def modulation(transformer: ZImageTransformer2DModel, embedded: torch.Tensor) -> torch.Tensor:
    """Give what the network's blocks are modulated by.

    Args:
        transformer: the network.
        embedded: the conditioning vector, as `embed_time` gives it.

    Returns:
        Scales and gates of all blocks, (batch, features).
    """
    modulated: list[Any] = [*blocks(transformer), after_blocks(transformer)]
    return torch.cat([block.adaLN_modulation(embedded) for block in modulated], dim=1)


def time_features(transformer: ZImageTransformer2DModel, time: torch.Tensor) -> torch.Tensor:
    """Give the sinusoids through which `TIME_EMBEDDER` sees time in a network in dense time.

    Args:
        transformer: the network.
        time: s, (batch,).

    Returns:
        (batch, channels), float32.
    """
    return slow_features(sinusoids(transformer), _reversed(time) * transformer.t_scale)


def in_dense_time(transformer: ZImageTransformer2DModel, scale: float) -> bool:
    """Say whether the network sees slow sinusoids of 1000 (1 - s) alone, as consistency training wants it."""
    return sees_slow_sinusoids_only(sinusoids(transformer), transformer.t_embedder.mlp)


def sinusoids(transformer: ZImageTransformer2DModel) -> Timesteps:
    """Give the sinusoids of 1000 (1 - s), the network's own, as other families have them."""
    return Timesteps(transformer.t_embedder.frequency_embedding_size, flip_sin_to_cos=True, downscale_freq_shift=0)


class WideTimeEmbedder(TimestepEmbedder):
    """diffusers' embedding of time, in float32 under autocast too, as `WideTimestepEmbedding` is.

    Args:
        embedder: whose parts it takes over.
    """

    seen: torch.Tensor

    def __init__(self, embedder: TimestepEmbedder) -> None:
        nn.Module.__init__(self)
        self.mlp, self.frequency_embedding_size = embedder.mlp, embedder.frequency_embedding_size
        self.register_buffer("seen", self.mlp[0].weight.detach().any(dim=0), persistent=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embed times, (batch,), in the layers' own dtype."""
        with torch.autocast(t.device.type, enabled=False):
            features = self.timestep_embedding(t, self.frequency_embedding_size) * self.seen
            return self.mlp(features.to(self.mlp[0].weight.dtype))


def make_student(teacher: ZImageTransformer2DModel) -> ZImageTransformer2DModel:
    """As `time_embedding.copy_wide`."""
    return copy_wide(teacher, "t_embedder", WideTimeEmbedder)
