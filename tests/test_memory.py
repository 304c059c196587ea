"""The memory plan against what autograd really keeps."""

import pytest
import torch
from tiny import TEXT_HIDDEN_SIZE, tiny_sana_pipeline
from torch.autograd.graph import saved_tensors_hooks

from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.loss import LogvarHead, StudentWithLogvar
from diffusers_tbcm.training.memory import activation_bytes, memory_plan, peak_memory, recomputed_bytes
from diffusers_tbcm.trigflow import TrigFlowTransformer


ROWS = 3


@pytest.fixture(scope="module")
def model():
    transformer = make_student(tiny_sana_pipeline().transformer)
    inner_dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    return StudentWithLogvar(TrigFlowTransformer(transformer), LogvarHead(inner_dim)).train()


@pytest.fixture(scope="module")
def inputs(model):
    config = model.student.transformer.config
    sample = torch.randn(ROWS, config.in_channels, config.sample_size, config.sample_size)
    embeds, mask = torch.randn(ROWS, 5, TEXT_HIDDEN_SIZE), torch.ones(ROWS, 5)
    return sample, torch.rand(ROWS), embeds, mask, torch.ones(ROWS)


def test_activations_are_counted_as_autograd_keeps_them(model, inputs):
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept alive: no address twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = model(*inputs)
    assert activation_bytes(model, *inputs) == sum(storage.nbytes() for storage in saved.values())
    assert graph


def test_checkpointing_and_autocast_keep_less(model, inputs):
    plain = activation_bytes(model, *inputs)
    assert activation_bytes(model, *inputs, autocast_dtype=torch.bfloat16) < plain
    model.student.transformer.enable_gradient_checkpointing()
    checkpointed = activation_bytes(model, *inputs)
    block = recomputed_bytes(model, *inputs)
    assert activation_bytes(model, *inputs) == checkpointed  # checkpointing is on again
    model.student.transformer.disable_gradient_checkpointing()
    assert checkpointed < 0.5 * plain
    assert checkpointed + block * len(model.student.transformer.transformer_blocks) == pytest.approx(plain, abs=1)
    assert recomputed_bytes(model, *inputs) == 0
    assert activation_bytes(model, *(value[:1] for value in inputs)) == pytest.approx(plain / ROWS, rel=0.1)


def test_the_plan_adds_up_the_weights(model, inputs):
    weights = sum(parameter.numel() for parameter in model.parameters())
    plan = memory_plan({"student": model}, {"frozen": torch.nn.Linear(3, 1).half()}, inputs, state_bytes=8, ema=True)
    assert plan["frozen"] == 2 * 4
    assert plan["student"] == plan["gradients"] == plan["EMA"] == 4 * weights and plan["optimiser"] == 8 * weights
    model.logvar_head.requires_grad_(False)
    fewer = memory_plan({"student": model}, {}, inputs, state_bytes=4, ema=False)
    model.logvar_head.requires_grad_(True)
    assert fewer["gradients"] == 4 * weights - 4 * sum(p.numel() for p in model.logvar_head.parameters())
    assert fewer["optimiser"] == fewer["gradients"] and fewer["EMA"] == 0 and "frozen" not in fewer
    headless = memory_plan({"student": StudentWithLogvar(model.student, None)}, {}, inputs, state_bytes=4, ema=False)
    assert headless["student"] == headless["gradients"] == fewer["gradients"]


def test_models_that_train_in_turn_hold_one_models_gradients_at_a_time(model, inputs):
    other = torch.nn.Linear(1000, 500, bias=False)  # larger than the model
    own = sum(parameter.numel() for parameter in model.parameters())
    assert own < 500_000
    plan = memory_plan({"student": model, "critic": other}, {}, inputs, state_bytes=8, ema=True)
    assert plan["critic"] == plan["gradients"] == 4 * 500_000
    assert plan["optimiser"] == 8 * (own + 500_000) and plan["EMA"] == plan["student"] == 4 * own


def test_peak_memory_is_bytes_and_grows():
    before = peak_memory(torch.device("cpu"))
    assert 50 * 2**20 < before < 2**40
    block = torch.ones(before // 4 + 2**26)  # more bytes than were ever held
    assert peak_memory(torch.device("cpu")) >= before + 2**26
    assert block[0] == 1


def test_weights_shared_with_the_teacher_count_once(model, inputs):
    plan = memory_plan({"student": model}, {"teacher": model.student}, inputs, state_bytes=8, ema=False)
    assert plan["student"] == 4 * sum(p.numel() for p in model.logvar_head.parameters())
