"""The EMA's checkpoint is whole, whether its weights are or not."""

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from runs import fork
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from diffusers_tbcm.training.averaging import ShardedEMA


def test_whole_weights_are_averaged_as_diffusers_does():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 5)
    ours, theirs = (kind(model.parameters(), decay=0.5) for kind in (ShardedEMA, EMAModel))
    with torch.no_grad():
        model.weight.zero_()
    for ema in (ours, theirs):
        ema.step(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours.full_weights(), theirs.shadow_params, strict=True))
    restored = ShardedEMA(model.parameters(), decay=0.5)
    restored.load([weight * 2 for weight in ours.full_weights()], ours.optimization_step)
    assert restored.optimization_step == 1 and torch.equal(restored.full_weights()[0], 2 * ours.full_weights()[0])


def average_sharded_weights(rank, meeting):
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    model, other = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    whole = [p.detach().clone() for p in model.parameters()]
    for module in (model, other):
        fully_shard(module, mesh=mesh)
    ema = ShardedEMA(model.parameters(), decay=0.5)
    ema.step(model.parameters())  # diffusers' first step takes the weights as they are, its second a decay of 2 / 11
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    ema.step(model.parameters())
    averages = ema.full_weights()
    assert all(isinstance(p, DTensor) for p in ema.shadow_params)
    for start, averaged in zip(whole, averages, strict=True):
        assert not isinstance(averaged, DTensor)
        torch.testing.assert_close(averaged, start * 2 / 11)
    restored = ShardedEMA(other.parameters(), decay=0.5)
    restored.load(averages, ema.optimization_step)
    assert restored.optimization_step == 2 and all(isinstance(p, DTensor) for p in restored.shadow_params)
    for actual, expected in zip(restored.full_weights(), averages, strict=True):
        assert torch.equal(actual, expected)
    restored.copy_to(other.parameters())
    dist.destroy_process_group()


def test_sharded_weights_are_saved_whole_and_come_back_sharded(tmp_path):
    fork(2, average_sharded_weights, tmp_path / "meeting")
