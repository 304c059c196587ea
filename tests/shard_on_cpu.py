"""Lets accelerate shard on a CPU, with everything else as it is; started with a script and its flags, runs it so."""

import runpy
import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from diffusers_tbcm.training import averaging


def shard_on_cpu():
    """Accelerate itself shards on accelerators only."""
    initialise, plugins = AcceleratorState.__init__, []

    def initialise_sharded(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugins.extend([fsdp_plugin] if fsdp_plugin is not None else [])
        if plugins:  # the state is made anew, from the processes' own, wherever accelerate asks for it
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[-1]

    AcceleratorState.__init__ = initialise_sharded
    full_weights = averaging.ShardedEMA.full_weights

    def full_weights_of_shards(self):
        assert all(isinstance(weight, DTensor) for weight in self.shadow_params)
        return full_weights(self)

    averaging.ShardedEMA.full_weights = full_weights_of_shards


if __name__ == "__main__":
    shard_on_cpu()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
