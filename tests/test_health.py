"""A run is sound where its steps and weights are finite and its weights have moved."""

import pytest
import torch
from accelerate import Accelerator

from diffusers_tbcm.training.health import STILL, Health, all_finite, fingerprint, untrained


def test_a_checkpoint_is_sound_once_a_step_from_it_is_finite():
    health = Health(patience=2)
    assert not health.note_step(True)  # there is none
    health.newest = "checkpoint-1"
    assert health.note_step(True) and health.sound == "checkpoint-1"
    assert not health.note_step(True)  # it is already


def test_in_trouble_none_becomes_sound_until_the_run_is_well_again():
    health = Health(patience=2, newest="checkpoint-1")
    health.note_step(True)
    health.newest = "checkpoint-2"
    assert not health.note_step(False) and health.sound == "checkpoint-1" and not health.failing
    assert not health.note_step(True) and health.sound == "checkpoint-1" and health.recovering == 1
    health.note_step(False)
    assert health.skipped_in_a_row == 1 and health.recovering == 2
    health.newest = "checkpoint-5"
    assert not health.note_step(True)
    assert health.note_step(True) and health.sound == "checkpoint-5" and health.skipped == 2


def test_too_many_in_a_row_are_failing_and_the_advice_names_the_sound_one():
    health = Health(patience=2, newest="checkpoint-1")
    assert "resume from" not in health.advice() and "no checkpoint is known" in health.advice()
    for finite in (True, False, False):
        health.note_step(finite)
    assert health.failing and "resume from checkpoint-1" in health.advice()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_smallest_change_of_a_weight_is_told(dtype):
    weights = [torch.randn(3, 4).to(dtype), torch.zeros(2, dtype=dtype)]
    before = fingerprint(weights)
    assert torch.equal(fingerprint([weight.clone() for weight in weights]), before)
    changed = weights[0].clone()
    bits = changed.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[changed.element_size()])
    bits[0, 0] ^= 1
    assert not torch.equal(fingerprint([changed, weights[1]]), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_told(value):
    weight = torch.ones(4, 4)
    assert all_finite([weight, torch.ones(2)]) and all_finite([])
    weight[3, 3] = value
    assert not all_finite([torch.ones(2), weight])


def test_weights_are_trained_where_they_are_finite_and_moved():
    accelerator, weight = Accelerator(cpu=True), torch.ones(2, 2)
    before = fingerprint([weight])
    assert untrained(accelerator, [weight], before) == "are still those that it began with"
    assert untrained(accelerator, [weight * 2], before) is None
    assert untrained(accelerator, [weight * float("nan")], before) == "are not finite"


def test_what_next_to_nothing_adds_to_weights_of_zero_is_no_training():
    accelerator, weights = Accelerator(cpu=True), [torch.ones(2), torch.zeros(2)]
    before = fingerprint(weights)
    for weight in weights:
        weight.add_(1e-30)
    assert untrained(accelerator, weights, before) == STILL
    weights[1].add_(1e-9)
    assert untrained(accelerator, weights, before) is None
