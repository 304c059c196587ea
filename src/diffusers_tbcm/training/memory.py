"""What a run will need and has needed: bytes of weights, states and saved activations."""

import resource
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from ..backbones import FAMILIES, backbone_of


def peak_memory(device: torch.device) -> int:
    """Read the most memory held so far.

    Args:
        device: a GPU, or the CPU.

    Returns:
        Bytes: allocated by torch on a GPU, resident in this process on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Sum up the memory of parameters.

    Args:
        parameters: of any shapes and dtypes.

    Returns:
        Bytes.
    """
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def activation_bytes(
    model: nn.Module,
    *inputs: torch.Tensor,
    autocast_dtype: torch.dtype | None = None,
    **named: torch.Tensor,
) -> int:
    """Count what autograd keeps between a forward and its backward, without computing or allocating it.

    Args:
        model: the module; with gradient checkpointing, what its backward recomputes is not counted.
        inputs: its inputs, tensors of the right shape, dtype and device.
        autocast_dtype: dtype of autocast; None for none.
        named: inputs by name.

    Returns:
        Bytes of all saved tensors that are not parameters, each storage once.
    """
    mode = FakeTensorMode()
    state: dict[str, torch.Tensor] = {
        name: mode.from_tensor(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    own = {tensor.untyped_storage()._cdata for tensor in state.values()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    device_type = inputs[0].device.type
    with mode, saved_tensors_hooks(pack, lambda tensor: tensor):
        fake_inputs = tuple(mode.from_tensor(value) for value in inputs)
        fake_named = {name: mode.from_tensor(value) for name, value in named.items()}
        with torch.autocast(device_type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            # The graph has to live while its tensors are counted: a freed storage's address is used again.
            graph = functional_call(model, state, fake_inputs, fake_named)
        total = sum(saved.values())
        del graph
    return total


def recomputed_bytes(
    model: nn.Module,
    *inputs: torch.Tensor,
    autocast_dtype: torch.dtype | None = None,
    **named: torch.Tensor,
) -> int:
    """Count what the backward of one checkpointed block makes again.

    Args:
        model: the module, a backbone's transformer or with some in it; their blocks are alike.
        inputs: its inputs, tensors of the right shape, dtype and device.
        autocast_dtype: dtype of autocast; None for none.
        named: inputs by name.

    Returns:
        Bytes; 0 without gradient checkpointing.
    """
    classes = tuple(family.TRANSFORMER_CLASS for family in FAMILIES)
    transformers = [module for module in model.modules() if isinstance(module, classes)]
    parts: list[Any] = [transformer for transformer in transformers if transformer.gradient_checkpointing]
    if not parts:
        return 0
    kept = activation_bytes(model, *inputs, autocast_dtype=autocast_dtype, **named)
    try:
        for part in parts:
            part.gradient_checkpointing = False
        everything = activation_bytes(model, *inputs, autocast_dtype=autocast_dtype, **named)
    finally:
        for part in parts:
            part.gradient_checkpointing = True
    return (everything - kept) // sum(len(backbone_of(part).blocks(part)) for part in parts)


def memory_plan(
    models: Mapping[str, nn.Module],
    frozen: Mapping[str, nn.Module],
    inputs: tuple[torch.Tensor, ...],
    named: Mapping[str, torch.Tensor] = MappingProxyType({}),
    *,
    state_bytes: int,
    ema: bool,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, int]:
    """Say what one process of a training run holds in its backward, before anything is sharded.

    Args:
        models: the modules that are trained, by name, and updated one after another, so that the gradients of one are
            there at a time; the first one is averaged, and its backward is looked at.
        frozen: modules that are only run, by name.
        inputs, named: a batch for the first of `models`, by place and by name.
        state_bytes: what the optimisers keep for every trained weight.
        ema: whether a second copy of the first model's trained weights is averaged.
        autocast_dtype: dtype of autocast; None for none.

    Returns:
        Bytes by part. Weights that a model shares with a frozen module count there. Their sum is an upper bound of
        those parts, as gradients come while activations go; the transient memory of a single layer is not counted.
    """
    shared = {parameter for module in frozen.values() for parameter in module.parameters()}
    trained = {
        name: [parameter for parameter in model.parameters() if parameter.requires_grad]
        for name, model in models.items()
    }
    everything = [parameter for parameters in trained.values() for parameter in parameters]
    first, *_ = models
    return (
        {name: parameter_bytes(module.parameters()) for name, module in frozen.items()}
        | {
            name: parameter_bytes(parameter for parameter in model.parameters() if parameter not in shared)
            for name, model in models.items()
        }
        | {
            "gradients": max(map(parameter_bytes, trained.values())),
            "optimiser": sum(parameter.numel() for parameter in everything) * state_bytes,
            "EMA": parameter_bytes(trained[first]) * ema,
            "activations": activation_bytes(models[first], *inputs, autocast_dtype=autocast_dtype, **named),
            "recomputed block": recomputed_bytes(models[first], *inputs, autocast_dtype=autocast_dtype, **named),
        }
    )
