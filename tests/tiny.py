"""Real components made tiny: the classes of a Sana checkpoint, offline, in about a second on a CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
)


TEXT_HIDDEN_SIZE = 16
LATENT_CHANNELS = 4
SAMPLE_SIZE = 8  # latent pixels; images are 64 x 64 through the 8x autoencoder
TRAINED_WITH = {
    "height": 64,
    "width": 64,
    "max_sequence_length": 16,
    "complex_human_instruction": None,
}  # flow students

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
CHARACTERS = list("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;'\"!?()-\n")
MERGES = [("i", "n"), ("in", "g"), ("t", "h"), ("th", "e"), ("the", "▁"), ("a", "n"), ("e", "r"), ("o", "r")]


def tiny_tokenizer() -> GemmaTokenizerFast:
    """A byte-fallback BPE tokenizer with a few merges, so that unequal prompts have unequal token counts."""
    tokens = SPECIAL_TOKENS + BYTE_TOKENS + CHARACTERS + [left + right for left, right in MERGES]
    vocab = {token: index for index, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    return GemmaTokenizerFast(tokenizer_object=bpe, add_bos_token=True)


def tiny_text_encoder() -> Gemma2Model:
    """A one-layer Gemma 2 that attends to every earlier token."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(SPECIAL_TOKENS + BYTE_TOKENS + CHARACTERS + MERGES),
        hidden_size=TEXT_HIDDEN_SIZE,
        intermediate_size=2 * TEXT_HIDDEN_SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        initializer_range=0.5,  # tokens far enough apart for prompts to matter
    )
    return Gemma2Model(config).eval()


def tiny_vae() -> AutoencoderDC:
    """A DC-AE with 8x compression and the tiny transformer's latent channels."""
    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(4, 4, 8, 8),
        decoder_block_out_channels=(4, 4, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        scaling_factor=0.41407,
    ).eval()


def tiny_transformer(**overrides: Any) -> SanaTransformer2DModel:
    """A two-layer Sana transformer whose output depends on latent, time and prompt.

    Args:
        overrides: entries of the `SanaTransformer2DModel` config to change, such as `guidance_embeds=True`.
    """
    torch.manual_seed(0)
    config = {
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": TEXT_HIDDEN_SIZE,
        "sample_size": SAMPLE_SIZE,
        "qk_norm": "rms_norm_across_heads",
        "guidance_embeds": False,
    }
    transformer = SanaTransformer2DModel(**{**config, **overrides}).eval()
    with torch.no_grad():  # the default initialisation barely reacts to time and guidance
        for weight in transformer.time_embed.parameters():
            weight.mul_(3)
    return transformer


def tiny_sana_pipeline(**transformer_overrides: Any) -> SanaPipeline:
    """An ordinary Sana pipeline of the tiny components: what the trainer takes as teacher."""
    return SanaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        transformer=tiny_transformer(**transformer_overrides),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def tiny_tbcm_pipeline():
    """A `SanaTBCMPipeline` of the tiny components, its transformer taking the guidance scale as an input."""
    from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler

    return SanaTBCMPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        transformer=tiny_transformer(guidance_embeds=True),
        scheduler=TBCMScheduler(),
    )


def write_tiny_pipeline(folder: str | Path) -> Path:
    """Save the tiny Sana pipeline and give its folder back.

    Args:
        folder: where to write; created where it does not exist.
    """
    tiny_sana_pipeline().save_pretrained(folder)
    return Path(folder)


def write_tiny_flow_student(folder: str | Path, **call_options: Any) -> Path:
    """Save a flow student of the tiny components, as CDM's are saved, and give its folder back.

    Args:
        folder: where to write.
        call_options: what it was distilled with; changes to `TRAINED_WITH`.
    """
    from diffusers_tbcm.scheduling_flow import FlowStudentScheduler

    pipeline = tiny_sana_pipeline()
    pipeline.scheduler = FlowStudentScheduler(3.0, TRAINED_WITH | call_options).to_stock()
    pipeline.save_pretrained(folder)
    return Path(folder)


def write_plain_pipeline(folder: str | Path, **overrides: Any) -> Path:
    """Save a tiny plain Sana: one that has learned, a little, that time 1000 is pure noise, and 1 hardly any.

    Between them its embedding of time goes over smoothly, but for the jitter of sinusoids of 1000 s.

    Args:
        folder: where to write; created where it does not exist.
        overrides: entries of the transformer's config to change.
    """
    wide = {"attention_head_dim": 32, "cross_attention_dim": 64, "cross_attention_head_dim": 32}
    pipeline = tiny_sana_pipeline(**wide, **overrides)
    transformer, generator = pipeline.transformer, torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(transformer.parameters(), lr=3e-3)
    times = torch.tensor([1.0, 1000.0]).repeat_interleave(4)
    for _ in range(60):
        sample = torch.randn(8, LATENT_CHANNELS, SAMPLE_SIZE, SAMPLE_SIZE, generator=generator)
        text = torch.randn(8, 3, TEXT_HIDDEN_SIZE, generator=generator)
        velocity = transformer(sample, encoder_hidden_states=text, timestep=times, return_dict=False)[0]
        target = torch.where(times.view(-1, 1, 1, 1) > 1, sample, -sample)  # v = e, and v = -x_0 on average
        optimizer.zero_grad()
        (velocity - target).square().mean().backward()
        optimizer.step()
    _smooth_embedding(transformer)
    pipeline.save_pretrained(folder)
    return Path(folder)


@torch.no_grad()
def _smooth_embedding(transformer: SanaTransformer2DModel) -> None:
    """Fit the embedder of 1000 s to a smooth way between its ends."""
    from diffusers_tbcm.backbones.sana import TIME_EMBEDDER, embed_time, time_features
    from diffusers_tbcm.dense_time import ridge_regression

    s = torch.linspace(0, 1, 1001)
    first, last = embed_time(transformer, torch.tensor([1.0, 1000.0]), None)
    target = first + (3 * s**2 - 2 * s**3)[:, None] * (last - first)
    embedder = transformer.get_submodule(TIME_EMBEDDER)
    torch.manual_seed(0)
    embedder.linear_1.reset_parameters()
    embedder.linear_1.weight.div_(1 + 10 * 10000 ** (-torch.arange(128) / 128).repeat(2))  # less of fast sinusoids
    hidden = embedder.act(embedder.linear_1(time_features(transformer, 1000 * s)))
    weight, offset = ridge_regression(hidden.double(), target.double())
    embedder.linear_2.weight.copy_(weight.T)
    embedder.linear_2.bias.copy_(offset)


def write_tiny_flow_lora(folder: str | Path, teacher: str | Path, *, timestep_scale: float = 1.0) -> Path:
    """Save the adapters of a flow student far from its teacher, as CDM's are saved, and give their folder back.

    Args:
        folder: where to write.
        teacher: that of `write_tiny_pipeline`.
        timestep_scale: of the time that the student knows.
    """
    from diffusers_tbcm.export.folders import save_flow_lora
    from diffusers_tbcm.export.record import StudentDescription
    from diffusers_tbcm.lora import adapt
    from diffusers_tbcm.scheduling_flow import FlowStudentScheduler

    student = adapt(SanaPipeline.from_pretrained(teacher).transformer, rank=2)
    student.register_to_config(timestep_scale=timestep_scale)
    generator = torch.Generator().manual_seed(0)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    description = StudentDescription("a dog", {"steps": 1})
    return save_flow_lora(student, teacher, folder, description, scheduler=FlowStudentScheduler(3.0, TRAINED_WITH))


def save_tiny_clip(
    folder: Path,
    *,
    text: Mapping[str, int] | None = None,
    vision: Mapping[str, int] | None = None,
    projection_dim: int = 8,
    hidden_act: str = "quick_gelu",
) -> Path:
    """Save a CLIP of random weights, for pictures of 32 x 32 pixels, as `save_pretrained` writes it.

    Args:
        folder: where to write.
        text, vision: sizes of the two networks.
        projection_dim: of their common space.
        hidden_act: of both.
    """
    tokens = ["<|startoftext|>", *CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": len(tokens) - 1}
    torch.manual_seed(1)  # some prompts are like some pictures, and some are not
    config = CLIPConfig(
        text_config={**(text or sizes), **ends, "hidden_act": hidden_act},
        vision_config={**(vision or sizes), "image_size": 32, "patch_size": 8, "hidden_act": hidden_act},
        projection_dim=projection_dim,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer).save_pretrained(folder)
    return folder


def student_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The transformer of a pipeline folder, by weight name."""
    return load_file(Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors")


def generate(pipeline, prompt: str | list[str] | None = "a red fox", seed: int = 0, **arguments: Any) -> Any:
    """Images as a tensor, from short prompts without the long instruction before them.

    Args:
        pipeline: any Sana pipeline of the tiny components.
        prompt: what to generate.
        seed: of the noise, where `arguments` have no `generator`.
        arguments: of the pipeline's call.
    """
    arguments = {"output_type": "pt", "complex_human_instruction": None, "max_sequence_length": 32, **arguments}
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipeline(prompt, **arguments).images
