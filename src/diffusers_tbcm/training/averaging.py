"""The exponential moving average of the trained weights, kept like the weights: whole, or sharded by FSDP2."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedEMA(EMAModel):
    """diffusers' EMA, whose state is whole in a checkpoint even where every process holds a shard of the weights.

    `state_dict` and `load_state_dict` are then collective: every process calls them.
    """

    shadow_params: list[torch.Tensor]

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.Tensor]) -> None:
        """Move every average towards its weight, all in one go and in place.

        Args:
            parameters: the weights, in the order of the averages.
        """
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"shadow_params": self.full_weights()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        layouts = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [
            distribute_tensor(whole.to(layout.device), layout.device_mesh, layout.placements)
            if isinstance(layout, DTensor)
            else whole
            for whole, layout in zip(self.shadow_params, layouts, strict=True)
        ]

    def full_weights(self) -> list[torch.Tensor]:
        """Gather the averaged weights.

        Returns:
            One whole tensor per averaged parameter.
        """
        return [
            weight.full_tensor().clone() if isinstance(weight, DTensor) else weight for weight in self.shadow_params
        ]
