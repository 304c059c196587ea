"""A tiny random pipeline of stock classes for every family, and what its tests have to know beside its adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.embeddings import Timesteps
from tiny import CHARACTERS, tiny_sana_pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from diffusers_tbcm import backbones
from diffusers_tbcm.backbones import Backbone, flux, sana, sd3


LATENT_CHANNELS = 16  # of the tiny autoencoders
WIDTH = 32


def kl_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode by an autoencoder whose unit scale is a shift and a factor: its own latents, and those on unit scale."""
    encoded = vae.encode(pixels)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return latents, (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def plain_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Noise in the order of latents."""
    return torch.randn(1, *shape, generator=generator)


@dataclass(frozen=True)
class Family:
    """A family as the shared tests see it; its pictures are 64 x 64 pixels, its latents 8 x 8.

    Args:
        backbone: the adapter.
        make_pipeline: makes the tiny pipeline.
        tokens: as `max_sequence_length`.
        published: the transformer's config at a size that is published, and latents and text there: (channels, height,
            width), (length, dim), and the pooled embedding's size.
        billions: of weights at that size.
        unguided_call: what makes a stock call read a plain prompt.
        guided_call: what makes a stock call guide by the plain formula.
        stock_latents: the result of a stock call of `output_type="latent"` as (batch, channels, height, width).
        given_text: the embeddings that a stock call of one prompt hands to the network, (1, length, dim), from its
            positional and named arguments.
        sinusoids: those of a network, None for those beside `TIME_EMBEDDER`.
        encode: gives pictures' latents by the stock autoencoder, as it has them and on unit scale.
        first_noise: draws the stock pipeline's first noise of a picture, (1, channels, height, width), of that shape.
        step_noise: draws that of its later steps.
    """

    backbone: Backbone
    make_pipeline: Callable[[], DiffusionPipeline]
    tokens: int
    published: tuple[dict[str, Any], tuple[int, ...], tuple[int, ...], int | None]
    billions: float
    unguided_call: dict[str, Any] = field(default_factory=dict)
    guided_call: dict[str, Any] = field(default_factory=dict)
    stock_latents: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents
    given_text: Callable[..., torch.Tensor] = lambda *_, **named: named["encoder_hidden_states"]
    sinusoids: Callable[[Any], Timesteps] | None = None
    encode: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = kl_latents
    first_noise: Callable[[tuple[int, ...], torch.Generator], torch.Tensor] = plain_noise
    step_noise: Callable[[tuple[int, ...], torch.Generator], torch.Tensor] = plain_noise

    def sinusoids_of(self, transformer: Any) -> Timesteps:
        """What a network's `TIME_EMBEDDER` sees of times."""
        if self.sinusoids is not None:
            return self.sinusoids(transformer)
        return transformer.get_submodule(f"{self.backbone.TIME_EMBEDDER.rpartition('.')[0]}.time_proj")


def tiny_kl() -> AutoencoderKL:
    """An 8x AutoencoderKL whose latents have a shift."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).eval()


def tiny_clip(seed: int) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    """CLIP's text half with a projection."""
    tokens = ["<|startoftext|>", *CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), "<|endoftext|>"]
    with TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=0, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1,
        initializer_factor=10.0,
    )  # fmt: skip
    return tokenizer, CLIPTextModelWithProjection(config).eval()


def tiny_t5() -> tuple[T5TokenizerFast, T5EncoderModel]:
    """T5's encoder, and a tokenizer that knows single characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((character, -2.0) for character in CHARACTERS)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(pieces), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5TokenizerFast(tokenizer_object=unigram, extra_ids=0), T5EncoderModel(config).eval()


def tiny_sd3(**overrides: Any) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 of two blocks.

    Args:
        overrides: entries of the transformer's config to change.
    """
    config: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS,
        "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": WIDTH,
        "caption_projection_dim": WIDTH, "pooled_projection_dim": 32, "pos_embed_max_size": 12,
    }  # fmt: skip
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**{**config, **overrides}).eval()
    (tokenizer, encoder), (tokenizer_2, encoder_2), (tokenizer_3, encoder_3) = tiny_clip(0), tiny_clip(1), tiny_t5()
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_kl(), encoder, tokenizer, encoder_2, tokenizer_2,
        encoder_3, tokenizer_3,
    )  # fmt: skip


def tiny_flux(guidance_embeds: bool = True) -> FluxPipeline:
    """A FLUX.1-dev of a double and two single blocks, whose shift is dynamic.

    Args:
        guidance_embeds: whether it takes guidance, as FLUX.1-schnell does not.
    """
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=16, axes_dims_rope=[4, 6, 6],
        guidance_embeds=guidance_embeds,
    ).eval()  # fmt: skip
    (tokenizer, with_projection), (tokenizer_2, encoder_2) = tiny_clip(0), tiny_t5()
    encoder = CLIPTextModel(with_projection.config).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(scheduler, tiny_kl(), encoder, tokenizer, encoder_2, tokenizer_2, transformer)


def tiny_qwen_tokenizer() -> Qwen2TokenizerFast:
    """Qwen's, which knows bytes."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Qwen2TokenizerFast(tokenizer_object=bpe)


def tiny_qwen() -> tuple[Qwen2TokenizerFast, Qwen2_5_VLForConditionalGeneration]:
    """Qwen2.5-VL and its tokenizer."""
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            **sizes,
            "num_key_value_heads": 2,
            "vocab_size": 264,
            "bos_token_id": 256,
            "eos_token_id": 258,
            "rope_scaling": rope,
            "rope_theta": 1e6,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        vocab_size=264,
        hidden_size=16,
        bos_token_id=256,
        eos_token_id=258,
    )
    return tiny_qwen_tokenizer(), Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_longcat() -> DiffusionPipeline:
    """A LongCat-Image of a double and two single blocks, whose shift is dynamic."""
    from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 6, 6],
    ).eval()  # fmt: skip
    tokenizer, encoder = tiny_qwen()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return LongCatImagePipeline(scheduler, tiny_kl(), encoder, tokenizer, None, transformer)


def tiny_z_image(**overrides: Any) -> DiffusionPipeline:
    """A Z-Image of two blocks beside two that refine pictures and prompts apart.

    Args:
        overrides: entries of the transformer's config to change.
    """
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    config: dict[str, Any] = {
        "in_channels": LATENT_CHANNELS, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [128, 16, 16],
    }  # fmt: skip
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(**{**config, **overrides}).eval()
    for padding in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(padding)
    tokenizer = tiny_qwen_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = Qwen3Model(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=264)).eval()
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=6.0), tiny_kl(), encoder, tokenizer, transformer)


def tiny_qwen_image() -> DiffusionPipeline:
    """A Qwen-Image of two blocks, whose shift is dynamic and ends above 0 as the published one's does."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    vae = AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    tokenizer, encoder = tiny_qwen()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
    )
    return QwenImagePipeline(scheduler, vae, encoder, tokenizer, transformer)


def video_latents(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode by an autoencoder of videos, as `kl_latents` does: every channel has a mean and a deviation."""
    latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
    mean, deviation = (torch.tensor(vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return latents, (latents.squeeze(2) - mean) / deviation


def tiny_flux2_vae() -> Any:
    """FLUX.2's autoencoder, whose tokens have a mean and a deviation of each channel."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=2
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def tiny_flux2_klein() -> DiffusionPipeline:
    """A FLUX.2 [klein] base of a double and two single blocks, whose shift is dynamic."""
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval()  # fmt: skip
    with torch.no_grad():  # the blocks hardly do anything by the default initialisation
        for name, weight in transformer.named_parameters():
            if "modulation" in name:
                weight.mul_(5)
    tokenizer, _ = tiny_qwen()
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = Qwen3Config(
        vocab_size=264, hidden_size=8, intermediate_size=8, num_hidden_layers=27, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, bos_token_id=256, eos_token_id=258,
    )  # fmt: skip
    encoder = Qwen3ForCausalLM(config).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return Flux2KleinPipeline(scheduler, tiny_flux2_vae(), encoder, tokenizer, transformer)


def flux2_latents(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode by FLUX.2's autoencoder, as `kl_latents` does."""
    latents = vae.encode(pixels).latent_dist.mode()
    return latents, flux2_unit(latents, vae)


def flux2_unit(latents: torch.Tensor, vae: Any = None) -> torch.Tensor:
    """The autoencoder's latents on unit scale; of a stock call's, whose `output_type="latent"` gives the former."""
    from diffusers import Flux2KleinPipeline

    norm = (tiny_flux2_vae() if vae is None else vae).bn
    tokens = Flux2KleinPipeline._patchify_latents(latents)
    deviation = torch.sqrt(norm.running_var + norm.eps)
    return Flux2KleinPipeline._unpatchify_latents(
        (tokens - norm.running_mean[:, None, None]) / deviation[:, None, None]
    )


def noise_of_tokens(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Noise in the order of tokens' channels before their places."""
    from diffusers import Flux2KleinPipeline

    channels, height, width = shape
    return Flux2KleinPipeline._unpatchify_latents(
        torch.randn(1, 4 * channels, height // 2, width // 2, generator=generator)
    )


def unpacked(latents: torch.Tensor) -> torch.Tensor:
    """Packed latents of 64 x 64 pixels as (batch, channels, height, width)."""
    return FluxPipeline._unpack_latents(latents, 64, 64, 8)


def packed_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Noise in the order of packed latents."""
    channels, height, width = shape
    return unpacked(torch.randn(1, height * width // 4, 4 * channels, generator=generator))


FAMILIES = {
    "sana": Family(
        sana,
        partial(tiny_sana_pipeline, timestep_scale=sana.DENSE_TIME_CONFIG_SCALE),
        tokens=16,
        published=({}, (32, 32, 32), (300, 2304), None),
        billions=1.6,
        unguided_call={"complex_human_instruction": None, "max_sequence_length": 16, "use_resolution_binning": False},
    ),
    "sd3": Family(
        sd3,
        tiny_sd3,
        tokens=16,
        published=(  # SD3-Medium
            {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
            (16, 128, 128),
            (77 + 256, 4096),
            2048,
        ),
        billions=2.0,
        unguided_call={"max_sequence_length": 16},
    ),
    "flux": Family(
        flux,
        tiny_flux,
        tokens=16,
        published=({"guidance_embeds": True}, (16, 128, 128), (512, 4096), 768),  # FLUX.1-dev
        billions=11.9,
        unguided_call={"max_sequence_length": 16},
        stock_latents=unpacked,
        step_noise=packed_noise,
    ),
}
if hasattr(backbones, "longcat_image"):  # diffusers is new enough
    FAMILIES["longcat_image"] = Family(
        backbones.longcat_image,
        tiny_longcat,
        tokens=512,
        published=({"num_layers": 10, "num_single_layers": 20}, (16, 128, 128), (512, 3584), None),
        billions=6.3,
        unguided_call={"enable_prompt_rewrite": False},
        guided_call={"enable_cfg_renorm": False},
        stock_latents=unpacked,
        step_noise=packed_noise,
    )
    FAMILIES["qwen_image"] = Family(
        backbones.qwen_image,
        tiny_qwen_image,
        tokens=256,  # the template's characters are tokens to the tiny tokenizer
        published=({}, (16, 128, 128), (512, 3584), None),
        billions=20.4,
        unguided_call={"max_sequence_length": 256},
        stock_latents=unpacked,
        encode=video_latents,
        step_noise=packed_noise,
    )
    FAMILIES["flux2_klein"] = Family(
        backbones.flux2_klein,
        tiny_flux2_klein,
        tokens=64,
        published=(  # klein base 4B
            {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
             "guidance_embeds": False},
            (32, 128, 128),
            (512, 7680),
            None,
        ),
        billions=3.9,
        unguided_call={"max_sequence_length": 64},
        stock_latents=flux2_unit,
        encode=flux2_latents,
        first_noise=noise_of_tokens,
        step_noise=packed_noise,
    )  # fmt: skip
if hasattr(backbones, "z_image"):
    FAMILIES["z_image"] = Family(
        backbones.z_image,
        tiny_z_image,
        tokens=64,
        published=({}, (16, 128, 128), (512, 2560), None),
        billions=6.2,
        unguided_call={"max_sequence_length": 64},
        given_text=lambda sample, time, prompts, **_: prompts[0][None],
        sinusoids=backbones.z_image.sinusoids,
    )
