"""The optimisers that a run may use, and the schedules of their learning rates."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler


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


def build_schedule(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int, done: int = 0
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build a schedule and go to a place in it: a learning rate depends on its number and on nothing before.

    Args:
        name: diffusers' name of it.
        optimizer: with the learning rate that the schedule multiplies.
        warmup_steps: of those schedules that have them.
        total_steps: where it ends.
        done: updates before the next one.

    Returns:
        The schedule.
    """
    if done > 0:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps, last_epoch=done - 1
    )


def moments(optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, set[torch.Size]]]:
    """Give the moments that an optimiser has gathered.

    Args:
        optimizer: `build_optimizer`'s.

    Returns:
        Each with the shapes that it can have: its weight's or, as CAME's, those of its rows or columns.
    """
    return [
        (state, {weight.shape, weight.shape[:-1], weight.shape[:-2] + weight.shape[-1:]})
        for weight, states in optimizer.state.items()
        for name, state in states.items()
        if name.startswith("exp_avg")
    ]


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Give everything of an optimiser's groups that is no parameter."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
