"""The optimisers that a run may use."""

from collections.abc import Sequence

import torch


STATE_BYTES = {"adamw": 8, "came": 4}  # per trained weight
STATE_BYTES_8BIT = 2


def build_optimizer(
    name: str,
    parameters: Sequence[torch.nn.Parameter],
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    in_8_bits: bool = False,
) -> torch.optim.Optimizer:
    """Build an optimiser.

    Args:
        name: `"adamw"` or `"came"`.
        parameters: to train.
        learning_rate: before any schedule.
        weight_decay: decoupled, as AdamW's.
        in_8_bits: AdamW's states as bitsandbytes keeps them.

    Returns:
        The optimiser.
    """
    if name == "came":
        from came_pytorch import CAME

        # Betas and epsilons of the reference.
        return CAME(
            parameters,
            lr=learning_rate,
            weight_decay=weight_decay,
            betas=(0.9, 0.999, 0.9999),
            eps=(1e-30, 1e-16),
        )
    if in_8_bits:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    # Fused: one pass over the weights, and no temporary copies of them.
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def state_bytes(name: str, *, in_8_bits: bool = False) -> int:
    """Say how many bytes an optimiser keeps for every trained weight."""
    return STATE_BYTES_8BIT if in_8_bits else STATE_BYTES[name]
