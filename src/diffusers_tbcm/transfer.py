"""Tensors on their way: to a device without waiting for a GPU's queue, into memory only if whole and finite."""

from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn


ModelT = TypeVar("ModelT", bound=nn.Module)


def load_whole(
    network_class: Any,
    name: str | PathLike[str],
    *,
    may_hold: tuple[str, ...] | None = None,
    **options: Any,
) -> Any:
    """Load a network none of whose weights is random: the libraries fill in what the files lack, and only log it.

    Args:
        network_class: of diffusers or transformers, or an auto class.
        name: folder or Hub id.
        may_hold: how the names begin of weights that may be left out; None where any may.
        options: further arguments of `from_pretrained`.

    Returns:
        The network.

    Raises:
        ValueError: where the files lack a weight, or hold one that the network has no place for.
    """
    network, found = network_class.from_pretrained(name, output_loading_info=True, **options)
    kind = type(network).__name__
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} of the weights of a {kind}, such as {missing[0]}")
    surplus = [] if may_hold is None else [key for key in found["unexpected_keys"] if not key.startswith(may_hold)]
    if surplus:
        raise ValueError(f"it is no {kind}, which has no {min(surplus)}")
    return network


def check_finite_weights(model: ModelT, name: str) -> ModelT:
    """Refuse a teacher's model that would give NaN whatever it is given.

    Args:
        model: as it was loaded.
        name: what it is called in the message.

    Returns:
        The model.

    Raises:
        ValueError: where a weight is NaN or infinite; the message names it.
    """
    for key, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"the teacher cannot be used: its weights are not all finite, {key} of its {name}")
    return model


def to_device(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """Move a tensor; on the way to a GPU the host does not wait for what is queued there, as `Tensor.to` would.

    Args:
        tensor: any.
        device: where to; None leaves it where it is.

    Returns:
        The tensor there.
    """
    if device is not None and _has_queue(torch.device(device)) and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A copy of a tensor that has been asked for and is read later.

    On a GPU, reading waits until the tensor has been computed, and not for the work that was queued since: queue what
    comes next, then read.

    Args:
        tensor: on any device.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        queued = _has_queue(tensor.device)
        self._copy = tensor.to("cpu", non_blocking=queued)
        self._copied = torch.accelerator.current_stream(tensor.device).record_event() if queued else None

    def read(self) -> torch.Tensor:
        """Wait for the copy.

        Returns:
            The tensor, on the CPU.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy


def _has_queue(device: torch.device) -> bool:
    """Whether copies to and from a device can be queued; on MPS such copies give wrong values."""
    return device.type not in ("cpu", "meta", "mps")
