"""A trained model of a run, and what trains with it: optimiser, schedule, average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from .averaging import ShardedEMA
from .health import all_finite, fingerprint
from .optimizers import build_optimizer, build_schedule, moments
from .settings import RunSettings


@dataclass
class Trained:
    """A trained model, and what trains with it.

    Args:
        name: what its figures are called.
        model: prepared by accelerate.
        optimizer: prepared by accelerate.
        lr_scheduler: steps with every update; None keeps the rate.
        every: the model is updated in every so many steps of the run.
        exported: the part that is exported, by its module path.
        averaged: what of that part trains, by its name there.
        before: fingerprint of these, before training.
        ema: their average.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    every: int
    exported: str
    averaged: dict[str, nn.Parameter]
    before: torch.Tensor
    ema: ShardedEMA | None

    @property
    def to_export(self) -> list[torch.Tensor]:
        """What trains of the exported part, averaged where it has an average; sharded where the weights are."""
        return list(self.averaged.values()) if self.ema is None else self.ema.shadow_params

    def averages(self) -> dict[str, torch.Tensor]:
        """Gather what a checkpoint holds of the average, by the model's name and the weights'."""
        if self.ema is None:
            return {}
        names = [f"{self.name}.{name}" for name in self.averaged]
        return dict(zip(names, self.ema.full_weights(), strict=True))

    def load_averages(self, averages: Mapping[str, torch.Tensor], steps: Mapping[str, int]) -> None:
        """Take over what `averages` gave, and the steps that each average is of, by the model's name.

        Raises:
            ValueError: where some are missing, or are of another model.
        """
        if self.ema is None:
            return
        found = {name: averages.get(f"{self.name}.{name}") for name in self.averaged}
        shapes = {name: None if whole is None else whole.shape for name, whole in found.items()}
        if self.name not in steps or shapes != {name: weight.shape for name, weight in self.averaged.items()}:
            raise ValueError(f"it lacks averages of the {self.name}, or they have other shapes than its weights")
        self.ema.load([averages[f"{self.name}.{name}"] for name in self.averaged], steps[self.name])

    def check(self) -> None:
        """Refuse what training cannot go on from in this process.

        Raises:
            ValueError: where weights, averages or the optimiser's states are not finite, or of another shape.
        """
        if not all_finite([*self.averaged.values(), *self.to_export]):
            raise ValueError(f"weights of the {self.name} are not finite")
        states = moments(self.optimizer)
        if any(state.shape not in shapes for state, shapes in states):
            raise ValueError(f"states of the {self.name}'s optimiser have other shapes than its weights")
        if not all_finite(state for state, _ in states):
            raise ValueError(f"states of the {self.name}'s optimiser are not finite")


def prepare_trained(
    accelerator: Accelerator,
    settings: RunSettings,
    name: str,
    model: nn.Module,
    *,
    exported: str,
    learning_rate: float,
    lr_scheduler: str | None,
    every: int,
    ema: bool,
    steps_done: int,
) -> Trained:
    """Prepare a model to train: all of its parameters that require a gradient.

    Args:
        accelerator: of the run.
        settings: of the run.
        name: the model's.
        model: on any device.
        exported: the part of it that is averaged and exported.
        learning_rate: before any schedule.
        lr_scheduler: name of a schedule, over the model's updates; None keeps the rate.
        every: it is updated in every so many steps of the run.
        ema: average its weights.
        steps_done: of the run.

    Returns:
        The model and what trains with it.
    """
    optimizer = build_optimizer(
        settings.optimizer,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        learning_rate,
        weight_decay=settings.weight_decay,
        in_8_bits=settings.use_8bit_adam,
    )
    schedule = None
    if lr_scheduler is not None:
        schedule = build_schedule(
            lr_scheduler,
            optimizer,
            warmup_steps=settings.lr_warmup_steps,
            total_steps=settings.max_train_steps // every,
            done=steps_done // every,
        )
    model, optimizer = accelerator.prepare(model, optimizer)
    part = accelerator.unwrap_model(model).get_submodule(exported)
    averaged = {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}
    average = ShardedEMA(averaged.values(), decay=settings.ema_decay) if ema else None
    before = fingerprint(averaged.values())
    return Trained(name, model, optimizer, schedule, every, exported, averaged, before, average)
