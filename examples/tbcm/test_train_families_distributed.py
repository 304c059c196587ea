"""Networks that are no Sana on two processes, whole and sharded: the weights of one process. CPU, gloo."""

import pytest
import torch
from families import FAMILIES
from runs import fork_two, largest_relative_difference
from safetensors.torch import load_file
from tiny import student_weights

from diffusers_tbcm.scripts import prepare_teacher, train_cdm, train_tbcm_distill
from examples.tbcm.conftest import arguments


TOLERANCE = 1e-5
RATES = {"learning_rate": 1e-5, "max_train_steps": 4, "use_ema": True, "ema_decay": 0.5}


@pytest.fixture(params=[name for name in FAMILIES if name not in ("sana", "flux")])  # flux: neither prepared nor CDM's
def family(request, tmp_path):
    """A family, its tiny teacher saved."""
    family = FAMILIES[request.param]
    family.make_pipeline().save_pretrained(tmp_path / "teacher")
    return family


@pytest.fixture
def shard(family):
    """Starts a script on two processes that share every weight, as a user who names the family's blocks."""
    transformer = family.make_pipeline().transformer
    blocks = sorted({type(block).__name__ for block in family.backbone.blocks(transformer)})
    return lambda main, flags: fork_two(main, flags, sharded=True, FSDP_TRANSFORMER_CLS_TO_WRAP=",".join(blocks))


@pytest.fixture
def own(family, tmp_path):
    """Flags that a family's runs share, with changes."""
    shared = {"resolution": 64, "max_sequence_length": family.tokens, "precompute_embeddings": tmp_path / "embeddings"}
    return lambda **changes: shared | {"pretrained_model_name_or_path": tmp_path / "teacher"} | RATES | changes


@pytest.fixture
def same_training(tmp_path):
    """Asserts that runs have moved their weights, and all alike."""

    def check(start, one, *others):
        start, one = (load(tmp_path / name) for name in (start, one))
        assert largest_relative_difference(one, start) > 5 * TOLERANCE
        for other in others:
            assert largest_relative_difference(load(tmp_path / other), one) < TOLERANCE, other

    def load(folder):
        average = folder / "ema.safetensors"  # of a checkpoint
        return load_file(average) if average.exists() else student_weights(folder)

    return check


def test_preparation_and_tbcm(own, flags, shared_flags, prompts_file, shard, same_training, tmp_path):
    """The student of the prepared teacher is sharded; preparation is whole on both."""
    prepare = {"prompts_file": prompts_file, "route_steps": 3, "held_out_prompts": 2, "checkpointing_steps": 2}

    def preparation(name, **changes):
        return arguments(**(shared_flags | prepare | own(output_dir=tmp_path / name, **changes)))

    prepare_teacher.main(preparation("prepared", train_batch_size=2))
    fork_two(prepare_teacher.main, preparation("prepared by two", train_batch_size=1))
    same_training("prepared/checkpoint-2", "prepared/checkpoint-4", "prepared by two/checkpoint-4")

    def tbcm(name, **changes):
        teacher = {"pretrained_model_name_or_path": tmp_path / "prepared", "guidance_scales": 4.5}
        return flags(**own(output_dir=tmp_path / name, **teacher, **changes))

    train_tbcm_distill.main(tbcm("one", train_batch_size=4))
    fork_two(train_tbcm_distill.main, tbcm("two", train_batch_size=2))
    shard(train_tbcm_distill.main, tbcm("sharded", train_batch_size=2))
    same_training("prepared", "one", "two", "sharded")


def test_cdm(own, cdm_flags, shard, same_training, tmp_path):
    def cdm(name, **changes):
        return cdm_flags(**own(output_dir=tmp_path / name, critic_learning_rate=1e-5, **changes))

    train_cdm.main(cdm("one", train_batch_size=4))
    shard(train_cdm.main, cdm("sharded"))
    same_training("teacher", "one", "sharded")
    whole = student_weights(tmp_path / "sharded")
    (tmp_path / "sharded" / "model_index.json").unlink()
    shard(train_cdm.main, [*cdm("sharded"), "--resume_from_checkpoint", "checkpoint-2"])
    resumed = student_weights(tmp_path / "sharded")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
