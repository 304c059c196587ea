"""The same run on one process, on two, with accumulation, and sharded: the same weights. CPU, gloo."""

import json

import pytest
import torch
from runs import largest_relative_difference, launch
from tiny import student_weights

from diffusers_tbcm.scripts.train_tbcm_distill import main


BRIGHTNESS_THRESHOLD = 6.0  # drops about half of the tiny teacher's prompts
# What `accelerate config` writes for FSDP2, as the environment that `accelerate launch` makes of it.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "SanaTransformerBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


# accelerate shards on accelerators only: this lets it do so on a CPU, with everything else as it is.
SHARD_ON_CPU = """
import runpy, sys
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
import diffusers_tbcm.training.averaging as averaging

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
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def long_flags(flags):
    def build(**changes):
        # The filter drops some prompts: the mean over those kept must not depend on who holds them.
        defaults = {
            "max_train_steps": 10,
            "use_ema": True,
            "ema_decay": 0.5,
            "brightness_threshold": BRIGHTNESS_THRESHOLD,
            "logging_steps": 10,
            "learning_rate": 1e-4,
        }
        return flags(**(defaults | changes))

    return build


@pytest.fixture
def one_process(long_flags, tmp_path):
    main(long_flags(output_dir=tmp_path / "one", train_batch_size=4))
    last = json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.1 < last["filtered_share"] < 0.9
    return student_weights(tmp_path / "one")


def test_two_processes_two_nodes_and_accumulation_give_the_weights_of_one_process(long_flags, one_process, tmp_path):
    main(long_flags(output_dir=tmp_path / "sum", train_batch_size=2, gradient_accumulation_steps=2))
    assert largest_relative_difference(student_weights(tmp_path / "sum"), one_process) < 1e-5
    for nodes, name in ((1, "two"), (2, "nodes")):
        launch(long_flags(output_dir=tmp_path / name, train_batch_size=2), nodes=nodes)
        assert largest_relative_difference(student_weights(tmp_path / name), one_process) < 1e-5


def test_fsdp2_gives_the_weights_of_one_process_and_resumes(long_flags, one_process, tmp_path):
    launcher = tmp_path / "shard_on_cpu.py"
    launcher.write_text(SHARD_ON_CPU)
    arguments = long_flags(output_dir=tmp_path / "sharded", train_batch_size=2, checkpointing_steps=5)
    launch(arguments, launcher, **FSDP2)
    assert largest_relative_difference(student_weights(tmp_path / "sharded"), one_process) < 1e-4
    assert list((tmp_path / "sharded").rglob("*.distcp")) == []  # whose index is a pickle that may hold code
    for leftover in ("checkpoint-10", "model_index.json"):
        (tmp_path / "sharded" / leftover).rename(tmp_path / leftover)
    launch([*arguments, "--resume_from_checkpoint", "latest"], launcher, **FSDP2)
    resumed = student_weights(tmp_path / "sharded")
    assert largest_relative_difference(resumed, one_process) < 1e-4
    assert all(torch.isfinite(value).all() for value in resumed.values())
