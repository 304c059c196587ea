"""The training script's optimisers; those of other packages are imported where they are asked for."""

from collections.abc import Iterable

from torch import nn, optim


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float, use_8bit: bool
) -> optim.Optimizer:
    if name == "adamw":
        if use_8bit:
            from bitsandbytes.optim import AdamW8bit as AdamW
        else:
            from torch.optim import AdamW
        return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    from came_pytorch import CAME

    # Betas and epsilons of the reference.
    return CAME(
        parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16)
    )
