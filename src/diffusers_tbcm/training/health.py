"""Whether a run is sound: its steps are finite, its weights too, and they have moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor


STILL = "are still those that it began with"
DUST = 1e-12  # far below what one step of any learning rate in use adds
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass
class Health:
    """Counts the steps that were not finite, and knows the checkpoint from before them.

    A checkpoint is sound once a step that starts from it is finite. In trouble, which a step that is not finite begins
    and `patience` finite steps in a row end, none becomes so.

    Args:
        patience: `max_skipped_steps` of the run.
        skipped: steps that were not finite.
        skipped_in_a_row: the latest of them.
        recovering: finite steps until trouble is over.
        newest: name of the newest checkpoint.
        sound: name of the newest sound one.
    """

    patience: int
    skipped: int = 0
    skipped_in_a_row: int = 0
    recovering: int = 0
    newest: str | None = None
    sound: str | None = None

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint is to hold, JSON values by name."""
        return {"recovering": self.recovering, "sound": self.sound}

    def go_on(self, state: Mapping[str, Any], newest: str) -> None:
        """Take over what a checkpoint holds.

        Args:
            state: from `state`.
            newest: the checkpoint's name.
        """
        self.recovering, self.sound, self.newest = state["recovering"], state["sound"], newest

    @property
    def failing(self) -> bool:
        """Whether too many steps in a row were not finite."""
        return self.skipped_in_a_row >= self.patience

    def note_step(self, finite: bool) -> bool:
        """Count a step.

        Args:
            finite: whether its gradients were.

        Returns:
            Whether the newest checkpoint has just become the sound one.
        """
        if not finite:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.recovering = self.patience
            return False
        self.skipped_in_a_row = 0
        self.recovering = max(0, self.recovering - 1)
        if self.recovering or self.newest in (None, self.sound):
            return False
        self.sound = self.newest
        return True

    def advice(self) -> str:
        """Say what to go on from."""
        start = "" if self.sound is None else f"resume from {self.sound}, which is from before the trouble, and "
        end = "; if that does not help, start again, as no checkpoint is known to be from before the trouble"
        return (
            f"{start}try a lower `learning_rate`, or `mixed_precision` bf16 or no, and name what you change in"
            f" `resume_with_changed`{end if self.sound is None else ''}"
        )


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Say whether every value is finite.

    Args:
        tensors: of any shapes; of a sharded one, this process's shard.

    Returns:
        Whether there is neither an infinity nor a NaN.
    """
    found = [_local(tensor).isfinite().all() for tensor in tensors]
    return not found or bool(torch.stack(found).all())


def fingerprint(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum up the bits of every tensor, so that one which changes is told; values that are as good as 0 are 0.

    Args:
        tensors: of any shapes; of a sharded one, this process's shard.

    Returns:
        One integer a tensor, on the CPU.
    """
    sums = [_without_dust(tensor).view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums).cpu() if sums else torch.empty(0, dtype=torch.int64)


def untrained(accelerator: Accelerator, weights: Sequence[torch.Tensor], before: torch.Tensor) -> str | None:
    """Say what is wrong with trained weights; every process calls this.

    Args:
        accelerator: of the run.
        weights: those trained; of a sharded one, this process's shard.
        before: their `fingerprint` from before training.

    Returns:
        What to say of them; None where they are finite and have moved.
    """
    bad = torch.tensor([not all_finite(weights), not torch.equal(fingerprint(weights), before)])
    infinite, moved = accelerator.reduce(bad.int().to(accelerator.device)).tolist()
    if infinite:
        return "are not finite"
    return None if moved else STILL


def _without_dust(tensor: torch.Tensor) -> torch.Tensor:
    """What a learning rate of next to nothing adds to weights of 0 is no training."""
    tensor = _local(tensor)
    return tensor.masked_fill(tensor.abs() < DUST, 0)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
