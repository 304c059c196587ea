"""The same run on one process, on two, with accumulation, and sharded: the same weights. CPU, gloo."""

import json

import pytest
import torch
from runs import fork_two, largest_relative_difference, launch, launch_sharded
from tiny import student_weights

from diffusers_tbcm.scripts.train_tbcm_distill import main


BRIGHTNESS_THRESHOLD = 6.0  # drops about half of the tiny teacher's prompts


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
    fork_two(main, long_flags(output_dir=tmp_path / "two", train_batch_size=2))
    launch(long_flags(output_dir=tmp_path / "nodes", train_batch_size=2), nodes=2)
    for name in ("two", "nodes"):
        assert largest_relative_difference(student_weights(tmp_path / name), one_process) < 1e-5


def test_fsdp2_gives_the_weights_of_one_process_and_resumes(long_flags, one_process, tmp_path):
    arguments = long_flags(output_dir=tmp_path / "sharded", train_batch_size=2, checkpointing_steps=5)
    launch_sharded(arguments)
    assert largest_relative_difference(student_weights(tmp_path / "sharded"), one_process) < 1e-4
    assert list((tmp_path / "sharded").rglob("*.distcp")) == []  # whose index is a pickle that may hold code
    for leftover in ("checkpoint-10", "model_index.json"):
        (tmp_path / "sharded" / leftover).rename(tmp_path / leftover)
    fork_two(main, [*arguments, "--resume_from_checkpoint", "latest"], sharded=True)
    resumed = student_weights(tmp_path / "sharded")
    assert largest_relative_difference(resumed, one_process) < 1e-4
    assert all(torch.isfinite(value).all() for value in resumed.values())
