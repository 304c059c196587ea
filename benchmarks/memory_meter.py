"""Peak memory of a step by stage and kind, counted from the life of every tensor's storage.

Works on real tensors of any device and on fake ones (`FakeTensorMode`), which have shapes and no data, so that a step
of any size can be modelled on any machine. What a kernel allocates inside itself (cuBLAS and cuDNN workspaces) and
what the caching allocator loses to rounding and fragmentation is not counted.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


aten = torch.ops.aten

WEIGHTS = "weights"
CASTS = "autocast copies of weights"
TEMPORARIES = "temporaries"
GRADIENTS = "gradients"
STATES = "optimiser states"
ACTIVATIONS = "activations"
KINDS = (WEIGHTS, CASTS, GRADIENTS, STATES, ACTIVATIONS, TEMPORARIES)


@dataclass
class Storage:
    """A storage that lives or has lived; its kind may be known only later, as a gradient's is."""

    size: int
    kind: str = TEMPORARIES


class MemoryMeter(TorchDispatchMode):
    """Records when storages appear and go, while it is active, stage by stage.

    Args:
        device: on a GPU, the allocator's own peaks are read too.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.measured: dict[str, int] = {}  # bytes allocated at most, by stage; empty on a CPU
        self._alive: dict[int, Storage] = {}  # by the address of the storage
        self._events: list[tuple[str, Storage, int]] = []  # stage, storage, +1 or -1
        self._stage = ""

    def begin(self, stage: str) -> None:
        """End the stage that runs and begin another, or with "" none."""
        if self.device.type == "cuda":
            if self._stage:
                peak = torch.cuda.max_memory_allocated(self.device)
                self.measured[self._stage] = max(peak, self.measured.get(self._stage, 0))
            torch.cuda.reset_peak_memory_stats(self.device)
        self._stage = stage
        self._events.append((stage, Storage(0), 1))  # a stage that allocates nothing has a peak too

    def label(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say what kind of `KINDS` tensors are; those that the meter has not seen are counted from now on."""
        for tensor in tensors:
            self._see(tensor).kind = kind

    def label_rest(self, kind: str) -> None:
        """Say what everything is that lives now and has not been labelled."""
        for storage in self._alive.values():
            if storage.kind == TEMPORARIES:
                storage.kind = kind

    def peaks(self) -> dict[str, dict[str, int]]:
        """Find every stage's moment with the most bytes.

        Returns:
            For each stage the bytes by kind at that moment.
        """
        now = dict.fromkeys(KINDS, 0)
        most: dict[str, int] = {}
        peaks: dict[str, dict[str, int]] = {}
        total = 0
        for stage, storage, sign in self._events:
            now[storage.kind] += sign * storage.size
            total += sign * storage.size
            if stage and total > most.get(stage, 0):
                most[stage], peaks[stage] = total, now.copy()
        return peaks

    def _see(self, tensor: torch.Tensor) -> Storage:
        untyped = tensor.untyped_storage()
        key = untyped._cdata
        if key not in self._alive:
            self._alive[key] = storage = Storage(untyped.nbytes())
            self._events.append((self._stage, storage, 1))
            weakref.finalize(untyped, self._forget, key).atexit = False
        return self._alive[key]

    def _forget(self, key: int) -> None:
        self._events.append((self._stage, self._alive.pop(key), -1))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = self._see(tensor)
                if func is aten._efficientzerotensor.default:  # a tangent that is zero, without memory
                    storage.size = 0
                elif func is aten._to_copy.default and self._see(args[0]).kind == WEIGHTS:
                    storage.kind = CASTS
        return result


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let autocast on a CPU run layer norms in float32, as on a GPU; Sana's other functions have the same dtypes."""
    layer_norm = F.layer_norm

    @wraps(layer_norm)  # dual numbers know it by its name
    def wide_layer_norm(sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return layer_norm(sample.float() if torch.is_autocast_enabled("cpu") else sample, *args, **kwargs)

    with patch.object(F, "layer_norm", wide_layer_norm):
        yield


def fake_weights(*modules: nn.Module) -> None:
    """Replace all parameters and buffers by fake ones, in place; call it inside a `FakeTensorMode`.

    Args:
        modules: built on the device `meta`, where casts and copies work; what they share stays shared.
    """
    fakes: dict[torch.Tensor, torch.Tensor] = {}
    for module in (part for whole in modules for part in whole.modules()):
        of_module: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in of_module:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fakes[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = fakes[tensor]
