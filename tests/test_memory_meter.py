"""The meter of the memory benchmark against bytes counted by hand, and its fake tensors against real ones."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from benchmarks import cdm_memory
from benchmarks.memory_meter import ACTIVATIONS, GRADIENTS, STATES, TEMPORARIES, WEIGHTS, MemoryMeter
from benchmarks.memory_step import SETTINGS, EightBitStates, Setting, make_states, run


CPU = torch.device("cpu")
MIB = 2**20
SCALARS = 1024  # bytes for the loss, its gradient, step counters and norms


@pytest.mark.parametrize(("options", "temporaries"), [({"fused": True}, 0), ({"foreach": True}, 4 * MIB)])
def test_a_step_is_counted_as_by_hand(options, temporaries):
    network = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.ReLU())  # 4 MiB of weights
    sample = torch.randn(256, 1024)  # 1 MiB, as are both layers' outputs
    weight = network[0].weight
    optimizer = torch.optim.AdamW([weight], **options)
    meter = MemoryMeter(CPU)
    meter.label(WEIGHTS, [weight])
    meter.label(ACTIVATIONS, [sample])
    with meter:
        make_states(optimizer, [weight], meter)
        meter.begin("forward")
        loss = network(sample).sum()
        meter.label_rest(ACTIVATIONS)
        meter.begin("backward")
        loss.backward()
        meter.label(GRADIENTS, [weight.grad])
        meter.begin("optimiser")
        optimizer.step()
        meter.begin("")
    expected = {
        # The output of the linear layer goes as soon as the ReLU has kept its own, for its backward.
        "forward": {WEIGHTS: 4, STATES: 8, ACTIVATIONS: 2, TEMPORARIES: 1},
        # The ReLU's output is gone when the weight's gradient is made of the sample and the output's gradient.
        "backward": {WEIGHTS: 4, STATES: 8, ACTIVATIONS: 1, TEMPORARIES: 1, GRADIENTS: 4},
        "optimiser": {WEIGHTS: 4, STATES: 8, ACTIVATIONS: 1, TEMPORARIES: temporaries // MIB, GRADIENTS: 4},
    }
    peaks = meter.peaks()
    assert peaks.keys() == expected.keys()
    for stage, kinds in peaks.items():
        for kind, size in kinds.items():
            assert size == pytest.approx(expected[stage].get(kind, 0) * MIB, abs=SCALARS), (stage, kind)


def test_eight_bit_states_are_two_bytes_and_two_scales_a_block():
    large, small = nn.Parameter(torch.zeros(512, 512)), nn.Parameter(torch.zeros(100))
    optimizer, meter = EightBitStates([large, small]), MemoryMeter(CPU)
    make_states(optimizer, [large, small], meter)
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in states) == 2 * (512 * 512 + 4 * 1024) + 2 * 4 * 100


@pytest.mark.parametrize(
    "setting",
    ["full, no checkpointing, AdamW", "full, checkpointing, AdamW, two passes", "LoRA, checkpointing, AdamW"],
)
def test_a_step_without_data_counts_as_the_real_one(setting):
    size = Namespace(model="0.6b", resolution=64, rows=2, route_steps=2, rank=4, layers=1)
    real, fake = (run(SETTINGS[setting], size, CPU, fake=fake)["stages"] for fake in (False, True))
    assert fake.keys() == real.keys()
    for stage in real:
        assert sum(fake[stage].values()) == pytest.approx(sum(real[stage].values()), rel=1e-3), stage
        assert fake[stage] == pytest.approx(real[stage], rel=1e-2, abs=MIB), stage


@pytest.mark.parametrize("training", ["full", "LoRA"])
def test_a_step_of_cdm_without_data_counts_as_the_real_one(training):
    size, setting = Namespace(resolution=64, prompts=2, rank=4, layers=1), Setting(training, True, "AdamW")
    real, fake = (cdm_memory.run("0.6b", setting, size, fake=fake)["stages"] for fake in (False, True))
    assert {"rollout", "critic", "student"} < fake.keys() == real.keys()
    for stage in real:
        assert fake[stage] == pytest.approx(real[stage], rel=1e-2, abs=MIB), stage
    networks = cdm_memory.build("0.6b", setting, size, CPU)
    weights = {parameter for module in networks.modules for parameter in module.parameters()}
    held = sum(weight.nbytes for weight in weights) / sum(weight.nbytes for weight in networks.teacher.parameters())
    assert held == pytest.approx(5) if training == "full" else 1 < held < 1.2  # bf16 alone, and twice in float32
    assert real["rollout"][WEIGHTS] == pytest.approx(sum(weight.nbytes for weight in weights), rel=1e-3)  # and buffers
