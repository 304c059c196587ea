"""Weights as HPSv2 and ImageReward are published, under the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import BlipVisionConfig


HEAD_SIZE = 64  # of the attention in ImageReward's vision transformer


def clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an `open_clip` model, such as HPSv2's, to those of transformers' `CLIPModel`.

    Args:
        weights: by name; a common `module.` before the names is passed over.

    Returns:
        The weights in float32, `in_proj` split into query, key and value, projections turned.
    """
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        name, value = name.removeprefix("module."), weight.float()
        side, rest = ("vision", name.removeprefix("visual.")) if name.startswith("visual.") else ("text", name)
        whole = _CLIP_NAMES.get(name)
        if whole is not None:
            found[whole] = value.T.contiguous() if name in ("visual.proj", "text_projection") else value
            continue
        if not rest.startswith("transformer.resblocks."):
            found[name] = value  # nothing of a CLIP's: loading names it
            continue
        _, _, number, *parts = rest.split(".")
        layer, part = f"{side}_model.encoder.layers.{number}", ".".join(parts)
        if part.startswith("attn.in_proj_"):
            kind = part.removeprefix("attn.in_proj_")
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                found[f"{layer}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
        else:
            for old, new in _CLIP_PARTS.items():
                part = part.replace(old, new)
            found[f"{layer}.{part}"] = value
    return found


_CLIP_NAMES = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_CLIP_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def blip_weights(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort ImageReward's weights by what they are of, under the names that transformers has for them.

    Args:
        weights: by name, as in `ImageReward.pt`.

    Returns:
        Weights in float32: `"vision"` of a `BlipVisionModel`, `"text"` of a `BlipTextModel`, `"head"` of the linear
        maps behind them, numbered from 0.
    """
    found: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    linear: list[str] = []
    for name, weight in weights.items():
        if name.startswith("blip.visual_encoder."):
            renamed = name.removeprefix("blip.visual_encoder.")
            for old, new in _BLIP_PARTS.items():
                renamed = renamed.replace(old, new)
            found["vision"][renamed] = weight.float()
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            found["text"][name.removeprefix("blip.text_encoder.")] = weight.float()
        elif name.startswith("mlp.layers."):
            number, kind = name.removeprefix("mlp.layers.").split(".")
            if number not in linear:
                linear.append(number)
            found["head"][f"{linear.index(number)}.{kind}"] = weight.float()
    return found


_BLIP_PARTS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    "attn.proj": "self_attn.projection",
    "attn.qkv": "self_attn.qkv",
    "norm.": "post_layernorm.",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}


def blip_vision_config(weights: Mapping[str, Tensor]) -> BlipVisionConfig:
    """Say which vision transformer weights are of: their shapes tell.

    Args:
        weights: `"vision"` of `blip_weights`.

    Returns:
        Its config.
    """
    hidden, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    patches = weights["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=hidden,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}),
        num_attention_heads=hidden // HEAD_SIZE,
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,  # timm's
    )
