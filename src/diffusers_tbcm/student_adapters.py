"""A network that is a student by its LoRA adapters: their guidance embedders come and go with them."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from .backbones.sana import embed_guidance


# Beside diffusers' file and not in it: diffusers takes no file with a weight that is not LoRA's.
GUIDANCE_EMBEDDER_FILE = "guidance_embedder.safetensors"
OFFLOADING_HOOKS = ("_diffusers_hook", "_hf_hook")  # as diffusers and accelerate name them on a layer
EMBEDDER_TENSORS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
GUIDANCE_CHANNELS = 256  # of diffusers' sinusoidal projection in front of it
STUDENT_CONFIG_ENTRIES = ("guidance_embeds_scale", "timestep_scale")  # what a student's config adds to its teacher's

COUNTING = threading.Lock()
CALLS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # under way on a network
SCALED: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()  # networks whose adapters a call has scaled


@dataclass
class StudentAdapters:
    """What a network takes to go from one student to another, and back to itself.

    Args:
        time_embed: the network's own embedding of time, without any student.
        config: the network's own entries of what a student's config changes.
        embedders: what `save_lora` wrote of each student, by the name of its adapter.
        scheduler_configs: entries of a scheduler's config that it wrote beside them.
        weights: those of the students that the network is now, by name; None where an embedder has changed.
        fused: whether a student is merged into the network's weights.
        shares_weights: whether another network holds the same ones.
    """

    time_embed: Any
    config: dict[str, Any]
    embedders: dict[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    scheduler_configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, float] | None = field(default_factory=dict)
    fused: bool = False
    shares_weights: bool = True

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The entries of the students in effect; of several, a later one's win."""
        configs = [self.scheduler_configs.get(name, {}) for name in self.weights or ()]
        return {name: value for config in configs for name, value in config.items()}


def take_students(transformer: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """Make a network of another's very parameters that students can be loaded into.

    Args:
        transformer: the teacher, or a student of it; it is left as it is.

    Returns:
        The network; the one that was given if it takes students already.

    Raises:
        ValueError: if the transformer has hooks, such as those of offloading.
    """
    if any(hasattr(module, hook) for module in transformer.modules() for hook in OFFLOADING_HOOKS):
        raise ValueError("`transformer` has offloading hooks: load the LoRA first and enable offloading after that.")
    if students_of(transformer) is not None:
        return transformer
    taking = copy.deepcopy(transformer, {id(parameter): parameter for parameter in transformer.parameters()})
    config = {name: taking.config[name] for name in ("guidance_embeds", *STUDENT_CONFIG_ENTRIES)}
    taking.student_adapters = StudentAdapters(taking.time_embed, config)
    return taking


def students_of(transformer: nn.Module) -> StudentAdapters | None:
    """Give what is known of a network's students; None where it takes none."""
    return getattr(transformer, "student_adapters", None)


def follow_adapters(transformer: SanaTransformer2DModel, scale: float = 1.0) -> None:
    """Give a network the guidance embedder of the adapters that are in effect, at their weights.

    Each student adds weight * (its embedding of guidance - the network's own), as its LoRA layers add theirs; a
    network that is no student now has its own embedding of time, and its own config.

    Args:
        transformer: the network.
        scale: of all adapters, as `attention_kwargs` of a call has it.

    Raises:
        ValueError: if students are in effect whose configs differ.
    """
    students = students_of(transformer)
    if students is None:
        return
    adapters = getattr(transformer, "peft_config", {})
    if not adapters and students.fused:  # the layers are gone, what they were is in the weights
        del transformer.student_adapters
        return
    students.embedders = {name: tensors for name, tensors in students.embedders.items() if name in adapters}
    weights = {name: scale * _weight(transformer, name) for name in students.embedders}
    weights = {name: weight for name, weight in weights.items() if weight != 0}
    students.fused = bool(weights) and any(getattr(layer, "merged_adapters", ()) for layer in transformer.modules())
    if weights == students.weights:
        return
    if any(hasattr(layer, hook) for layer in transformer.time_embed.modules() for hook in OFFLOADING_HOOKS):
        raise ValueError(
            "`transformer` has hooks on its layers, such as those of offloading: choose its adapters before that."
        )
    if weights:
        _become_students(transformer, students, weights)
    else:
        _become_itself(transformer, students)
    students.weights = weights


@contextmanager
def drawing_with(transformer: SanaTransformer2DModel, lora_scale: float | None) -> Iterator[None]:
    """Let a network embed guidance as its adapters in effect do, for the time of a call.

    Args:
        transformer: the network.
        lora_scale: of all adapters, during this call; None for none.

    Yields:
        Nothing.

    Raises:
        ValueError: while another call is under way, if one of them scales adapters or the network is offloaded.
    """
    scale = 1.0 if lora_scale is None or not getattr(transformer, "peft_config", None) else lora_scale
    with COUNTING:
        others = CALLS.get(transformer, 0)
        if others and (scale != 1 or transformer in SCALED):
            raise ValueError(
                "`attention_kwargs` of a call has a `scale`, which the LoRA layers take on for all calls, and another"
                " call is under way: wait for it, or give each thread a transformer of its own."
            )
        if others and any(hook in vars(layer) for layer in transformer.modules() for hook in OFFLOADING_HOOKS):
            raise ValueError(
                "`transformer` has hooks that move or cast its weights, such as those of offloading, and another call"
                " is under way: wait for it, or give each thread a transformer of its own."
            )
        follow_adapters(transformer, scale)
        CALLS[transformer] = others + 1
        if scale != 1:
            SCALED[transformer] = scale
    try:
        yield
    finally:
        with COUNTING:
            CALLS[transformer] -= 1
            if SCALED.pop(transformer, None) is not None:
                follow_adapters(transformer)


def own_weights(transformer: SanaTransformer2DModel) -> None:
    """Copy the weights that adapters are about to be merged into, where another network holds the same ones.

    Args:
        transformer: the network.
    """
    students = students_of(transformer)
    if students is None or not students.shares_weights:
        return
    for layer in transformer.modules():
        if hasattr(layer, "merged_adapters"):
            base = layer.get_base_layer()
            for name, weight in list(base.named_parameters(recurse=False)):
                setattr(base, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    students.shares_weights = False


def check_unfused(transformer: nn.Module) -> None:
    """Refuse to change adapters that are merged into the weights: what they added would stay there.

    Args:
        transformer: the network.

    Raises:
        ValueError: if a student is merged.
    """
    students = students_of(transformer)
    if students is not None and students.fused:
        raise ValueError("`transformer` has a student's LoRA fused into its weights: call `unfuse_lora()` first.")


def check_can_be_saved(transformer: SanaTransformer2DModel | None) -> None:
    """Refuse what a checkpoint cannot hold.

    Args:
        transformer: the network.

    Raises:
        ValueError: if it has adapters beside its weights, or a blend of several guidance embedders.
    """
    if getattr(transformer, "peft_config", None):
        raise ValueError(
            "`transformer` has LoRA adapters beside its weights, which a pipeline's folder does not hold: call"
            " `fuse_lora()` and then `unload_lora_weights()`, or only the latter."
        )
    embedder = getattr(getattr(transformer, "time_embed", None), "guidance_embedder", None)
    if embedder is not None and embedder.linear_1.out_features != embedder.linear_2.out_features:
        raise ValueError(
            "`transformer` has the guidance embedders of several students, which a pipeline's folder does not hold:"
            " fuse one of them alone, at weight 1."
        )


def check_embedder(transformer: SanaTransformer2DModel, embedder: Mapping[str, torch.Tensor]) -> None:
    """Refuse a guidance embedder that is another network's.

    Args:
        transformer: the network.
        embedder: what `save_lora` wrote.

    Raises:
        ValueError: if it lacks a tensor, or one is of another size or kind.
    """
    width = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    hidden = len(embedder["linear_1.weight"]) if embedder.get("linear_1.weight", torch.empty(())).ndim else 0
    shapes: dict[str, tuple[int, ...]] = {
        "linear_1.weight": (hidden, GUIDANCE_CHANNELS),
        "linear_1.bias": (hidden,),
        "linear_2.weight": (width, hidden),
        "linear_2.bias": (width,),
        **dict.fromkeys(STUDENT_CONFIG_ENTRIES, ()),
    }
    fits = all(
        name in embedder and tuple(embedder[name].shape) == shape and embedder[name].is_floating_point()
        for name, shape in shapes.items()
    )
    if not fits or not all(0 < embedder[name].item() < math.inf for name in STUDENT_CONFIG_ENTRIES):
        raise ValueError(
            f"{GUIDANCE_EMBEDDER_FILE} of the LoRA does not fit `transformer`: it is of another network, or not whole."
        )


def check_layers(
    transformer: SanaTransformer2DModel, layers: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None
) -> None:
    """Refuse a student's LoRA layers that are another network's: diffusers would leave out those it does not find.

    Args:
        transformer: the network.
        layers: what `pytorch_lora_weights.safetensors` holds.
        metadata: the adapter's config in that file's header; None where there is none.

    Raises:
        ValueError: if the network lacks a layer or has it in another size, or the config adapts more layers of it.
    """
    found = {name.partition(".lora_A.")[0].removeprefix("transformer.") for name in layers if ".lora_A." in name}
    networks = {
        name.removesuffix(".base_layer"): module  # of a layer that has adapters already
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }
    targets = (metadata or {}).get("transformer.target_modules", ())
    named = {name for name in networks if any(f".{name}".endswith(f".{target}") for target in targets)}
    for name in sorted(found | named):
        down, up = (layers.get(f"transformer.{name}.{part}.weight") for part in ("lora_A", "lora_B"))
        if name not in networks or down is None or up is None or not _fits(networks[name], down, up):
            raise ValueError(
                f"the LoRA does not fit `transformer`: it is a student of another network, as {name} shows. Load it"
                " into its own teacher."
            )


def _fits(layer: nn.Linear | nn.Conv2d, down: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether an adapter goes from what a layer takes to what it gives."""
    if isinstance(layer, nn.Linear):
        return down.shape[1:] == (layer.in_features,) and len(up) == layer.out_features
    return down.shape[1] in (layer.in_channels, layer.in_channels // layer.groups) and len(up) == layer.out_channels


def _weight(transformer: SanaTransformer2DModel, adapter: str) -> float:
    """The weight of an adapter, 0 where it is not in effect: what its first layer has."""
    for layer in transformer.modules():
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, dict) and adapter in scaling:
            in_effect = adapter in (layer.merged_adapters or layer.active_adapters) and not layer.disable_adapters
            return scaling[adapter] * layer.r[adapter] / layer.lora_alpha[adapter] if in_effect else 0.0
    return 0.0


def _become_itself(transformer: SanaTransformer2DModel, students: StudentAdapters) -> None:
    """Put back the network's own embedding of time, with the layers that it has now: they may have adapters."""
    now, own = transformer.time_embed, students.time_embed
    if now is not own:
        own.linear = now.linear
        if students.config["guidance_embeds"]:
            own.timestep_embedder = now.timestep_embedder
            own.guidance_embedder.to(transformer.device, transformer.dtype)
        else:
            own.emb.timestep_embedder = now.timestep_embedder
        transformer.time_embed = own
    transformer.register_to_config(**students.config)


def _become_students(
    transformer: SanaTransformer2DModel, students: StudentAdapters, weights: Mapping[str, float]
) -> None:
    """Let the network embed guidance as the students do that are in effect."""
    in_effect = [students.embedders[name] for name in weights]
    config = {name: in_effect[0][name].item() for name in STUDENT_CONFIG_ENTRIES}
    if any(embedder[name].item() != config[name] for embedder in in_effect for name in config):
        raise ValueError(
            f"`adapter_names` has students of different {' or '.join(STUDENT_CONFIG_ENTRIES)}, which cannot draw"
            f" together: {', '.join(weights)}. Set one of them."
        )
    parts = list(zip(weights.values(), in_effect, strict=True))
    rest = 1 - sum(weights.values())
    if students.config["guidance_embeds"] and rest != 0:
        if students.config["guidance_embeds_scale"] != config["guidance_embeds_scale"]:
            raise ValueError(
                "`adapter_weights` blends a student with a network of another `guidance_embeds_scale`: give weight 1."
            )
        own = students.time_embed.guidance_embedder.state_dict()
        parts.append((rest, {name: weight.cpu() for name, weight in own.items()}))  # as the students' are
    embed_guidance(transformer, config["guidance_embeds_scale"])
    transformer.time_embed.guidance_embedder = _blend(parts).to(transformer.device, transformer.dtype)
    transformer.register_to_config(**config)


def _blend(parts: list[tuple[float, Mapping[str, torch.Tensor]]]) -> TimestepEmbedding:
    """The weighted sum of embedders, which is one embedder with the hidden units of all."""
    tensors = {name: torch.cat([part[name] for _, part in parts]) for name in EMBEDDER_TENSORS[:2]}
    tensors["linear_2.weight"] = torch.cat([weight * part["linear_2.weight"] for weight, part in parts], dim=1)
    tensors["linear_2.bias"] = torch.stack([weight * part["linear_2.bias"] for weight, part in parts]).sum(0)
    width, (hidden, channels) = len(tensors["linear_2.bias"]), tensors["linear_1.weight"].shape
    embedder = TimestepEmbedding(channels, hidden, out_dim=width)
    embedder.load_state_dict(tensors)
    return embedder.requires_grad_(False)
