"""Networks as low-rank adapters (LoRA, arXiv 2106.09685) on their teacher's own weights: memory holds them once.

Of a flow network the adapters are all that trains. A consistency student has a guidance embedder beside them. The
teacher lacks it, so it is no low-rank change of anything: it trains, and travels, in full. For a stock pipeline,
which cannot take it, one guidance scale of it travels as a bias.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import SanaTransformer2DModel
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from .backbones import backbone_of
from .backbones.sana import GUIDANCE_EMBEDDER, TEACHER_TIME_LAYER, embed_guidance
from .student_adapters import GUIDANCE_EMBEDDER_FILE, STUDENT_CONFIG_ENTRIES


N = TypeVar("N", bound=nn.Module)

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name


def adapt(
    transformer: N,
    *,
    rank: int,
    alpha: int | None = None,
    target_modules: Sequence[str] | None = None,
) -> N:
    """Make a network of another's very parameters and of LoRA adapters, equal to it at first.

    Moving or casting either network moves or casts the parameters of both. Adapters are float32: over a base of lower
    precision the network runs under autocast.

    Args:
        transformer: the network to adapt; its parameters become frozen, otherwise it is left as it is.
        rank: of the adapters.
        alpha: the adapters' output is multiplied by alpha / rank; None for `rank`.
        target_modules: linear and convolution layers to adapt, each by the end of its name, such as `"attn1.to_q"`;
            None for those that the network's family names.

    Returns:
        The adapted network; its parameters with `requires_grad` are all that trains.

    Raises:
        ValueError: if `rank` or `alpha` is not positive, or a target names no layer.
    """
    adapted = _sharing(transformer, transformer.parameters())
    _add_adapters(adapted, transformer, rank, alpha, target_modules)
    cast_training_params(adapted, dtype=torch.float32)
    return adapted


def copy_trained(network: N) -> N:
    """Copy a network, except for what is frozen in it: both hold the same of that.

    Args:
        network: with or without frozen parameters.

    Returns:
        The copy.
    """
    return _sharing(network, (parameter for parameter in network.parameters() if not parameter.requires_grad))


def make_lora_student(
    teacher: SanaTransformer2DModel,
    *,
    rank: int,
    alpha: int | None = None,
    target_modules: Sequence[str] | None = None,
) -> SanaTransformer2DModel:
    """Make a student of the teacher's very parameters, LoRA adapters and a guidance embedder, equal to it at first.

    Args:
        teacher: the network to adapt, as `adapt` takes it.
        rank, alpha, target_modules: as `adapt` takes them.

    Returns:
        The student; its parameters with `requires_grad` are all that trains, in float32.

    Raises:
        ValueError: as of `adapt`, and if a target names the guidance embedder or a layer that the teacher has under
            another name.
    """
    shared = [weight for name, weight in teacher.named_parameters() if not name.startswith(GUIDANCE_EMBEDDER)]
    student = _sharing(teacher, shared)
    embed_guidance(student, student.config["guidance_embeds_scale"])
    _add_adapters(student, teacher, rank, alpha, target_modules)
    student.get_submodule(GUIDANCE_EMBEDDER).requires_grad_(True)
    cast_training_params(student, dtype=torch.float32)
    return student


def merge_lora(student: Any) -> Any:
    """Add the adapters into a copy of the weights: a plain student that needs neither peft nor its teacher.

    Args:
        student: made by `adapt` or `make_lora_student`; it and its teacher are left as they are.

    Returns:
        The merged student, every weight its own and float32, as an adapter's share can be less than bfloat16's step.
    """
    merged = copy.deepcopy(student).float()
    merged.fuse_lora()
    merged.unload_lora()
    return merged


def save_lora(
    student: SanaTransformer2DModel,
    folder: str | PathLike[str],
    guidance_scale: float | None = 4.5,
    scheduler_config: Mapping[str, Any] | None = None,
) -> Path:
    """Save the adapters and the guidance embedder for `load_lora_weights` of a pipeline of the teacher.

    `pytorch_lora_weights.safetensors` is diffusers' own and makes the student of a stock `SanaPipeline`, at one
    guidance scale: there the guidance embedding is a constant, which a bias adds to the time embedding. peft cannot
    merge it into the weights. `SanaTBCMPipeline` takes the guidance embedder beside it, and not the bias.

    Args:
        student: made by `make_lora_student`.
        folder: where to write; created where it does not exist.
        guidance_scale: the one that the stock pipeline will draw with; None leaves the bias out, as a teacher with a
            guidance embedder has no use for it.
        scheduler_config: entries for the config of the pipeline's scheduler, JSON values by name; they travel in the
            header of the guidance embedder's file.

    Returns:
        `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = student.get_submodule(GUIDANCE_EMBEDDER).state_dict()
    config = {name: torch.tensor(student.config[name], dtype=torch.float64) for name in STUDENT_CONFIG_ENTRIES}
    header = {} if scheduler_config is None else {LORA_ADAPTER_METADATA_KEY: json.dumps(scheduler_config)}
    save_file({**weights, **config}, folder / GUIDANCE_EMBEDDER_FILE, metadata={"format": "pt", **header})
    return save_adapters(student, folder, guidance_scale)


def save_adapters(network: Any, folder: str | PathLike[str], guidance_scale: float | None = None) -> Path:
    """Save the adapters alone for `load_lora_weights` of a pipeline of the teacher, as diffusers does.

    Args:
        network: made by `adapt` or `make_lora_student`.
        folder: where to write; created where it does not exist.
        guidance_scale: of a student with a guidance embedder, the one that a bias is to hold; None for no bias.

    Returns:
        `folder`.
    """
    lora = network.peft_config["default"]
    layers = get_peft_model_state_dict(network)
    # Not all of the config: other versions of peft refuse the entries that they do not know.
    metadata = {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": sorted(lora.target_modules),
        "rank_pattern": {},  # diffusers before 0.40 loads none without
    }
    if guidance_scale is not None:
        layers |= _guidance_bias(network, layers, guidance_scale)
        metadata |= {"target_modules": [*metadata["target_modules"], TEACHER_TIME_LAYER], "lora_bias": True}
    SanaLoraLoaderMixin.save_lora_weights(  # diffusers writes every transformer's adapters alike
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata, weight_name=LORA_FILE
    )
    return Path(folder)


def _guidance_bias(
    student: SanaTransformer2DModel, layers: Mapping[str, torch.Tensor], guidance_scale: float
) -> dict[str, torch.Tensor]:
    """Adapter layers that add the embedding of one guidance scale to the teacher's embedding of time."""
    lora, time_embed = student.peft_config["default"], student.time_embed
    guidance = torch.tensor([guidance_scale * student.config["guidance_embeds_scale"]], device=student.device)
    with torch.no_grad():
        embedding = time_embed.guidance_embedder(time_embed.guidance_condition_proj(guidance))[0]
    # peft gives biases to all adapters or to none, and multiplies them by alpha / r as it does the product.
    biases = {
        name.removesuffix("weight") + "bias": layer.new_zeros(len(layer))
        for name, layer in layers.items()
        if name.endswith(".lora_B.weight")
    }
    return biases | {
        f"{TEACHER_TIME_LAYER}.lora_A.weight": embedding.new_zeros(lora.r, len(embedding)),
        f"{TEACHER_TIME_LAYER}.lora_B.weight": embedding.new_zeros(len(embedding), lora.r),
        f"{TEACHER_TIME_LAYER}.lora_B.bias": embedding * (lora.r / lora.lora_alpha),
    }


def drop_frozen_weights(
    models: Sequence[nn.Module], weights: Sequence[dict[str, torch.Tensor]], output_dir: str
) -> None:
    """Keep frozen parameters out of checkpoints, as a hook for `Accelerator.register_save_state_pre_hook`.

    `Accelerator.load_state(folder, strict=False)` loads such a checkpoint.

    Args:
        models: the prepared models.
        weights: their state dicts, which lose the frozen entries.
        output_dir: the checkpoint's folder, without effect.
    """
    for model, state in zip(models, weights, strict=True):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                state.pop(name)


def _sharing(network: N, shared: Iterable[nn.Parameter]) -> N:
    """Build a second network that holds these very parameters of the first one, and copies of the others."""
    return copy.deepcopy(network, {id(parameter): parameter for parameter in shared})


def _add_adapters(
    network: Any, teacher: nn.Module, rank: int, alpha: int | None, target_modules: Sequence[str] | None
) -> None:
    """Add adapters to a network of the teacher's parameters, and freeze all else."""
    alpha = rank if alpha is None else alpha
    targets = backbone_of(teacher).LORA_TARGET_MODULES if target_modules is None else target_modules
    for name, value in (("rank", rank), ("alpha", alpha)):
        if not value > 0:
            raise ValueError(f"`{name}` is {value}, but it has to be positive.")
    _check_targets(network, teacher, targets)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))


def _check_targets(network: nn.Module, teacher: nn.Module, target_modules: Sequence[str]) -> None:
    """Refuse what peft passes over in silence: it minds only if none of the targets is found."""
    teachers = {name for name, _ in teacher.named_modules()}
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in target_modules:
        found = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not found:
            raise ValueError(
                f"`target_modules` has {target!r}, but no linear or convolution layer of the transformer has a name"
                " that ends so."
            )
        if any(name.startswith(GUIDANCE_EMBEDDER) for name in found):
            raise ValueError(
                f"`target_modules` has {target!r}, which takes in the guidance embedder; that trains in full. Name"
                f" the layers apart: {', '.join(found)}."
            )
        if renamed := sorted({*found} - teachers):
            raise ValueError(
                f"`target_modules` has {target!r}, which takes in {renamed[0]}: the teacher has that layer under"
                " another name, where the adapters would not be found again. Leave it out."
            )
