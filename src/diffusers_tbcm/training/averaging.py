"""The exponential moving average of the trained weights, kept like the weights: whole, or sharded by FSDP2."""

from collections.abc import Iterable, Sequence

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedEMA(EMAModel):
    """diffusers' EMA, where every process may hold a shard of the weights.

    `full_weights` and `load` are then collective: every process calls them.
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

    def load(self, weights: Sequence[torch.Tensor], optimization_step: int) -> None:
        """Take over averages.

        Args:
            weights: whole ones, in the order of the averages.
            optimization_step: steps that they are an average of.
        """
        self.optimization_step = optimization_step
        self.shadow_params = [
            distribute_tensor(whole.to(average.device), average.device_mesh, average.placements)
            if isinstance(average, DTensor)
            else whole.to(average)
            for whole, average in zip(weights, self.shadow_params, strict=True)
        ]

    def full_weights(self) -> list[torch.Tensor]:
        """Gather the averaged weights.

        Returns:
            One whole tensor per averaged parameter.
        """
        return [
            weight.full_tensor().clone() if isinstance(weight, DTensor) else weight for weight in self.shadow_params
        ]
