"""What a resumed run may change, and what is refused by name."""

import dataclasses
import json
from importlib import import_module
from pathlib import Path

import pytest

from diffusers_tbcm.training.resumption import (
    BATCH,
    BEFORE,
    BY_CONTENT,
    CHANGEABLE,
    FREE,
    LENGTH,
    PROCESSES,
    History,
    changed_settings,
    check_content,
)


SCRIPTS = {
    "train_tbcm_distill": "TBCMSettings",
    "train_scm": "SCMSettings",
    "train_sana_sprint": "SanaSprintSettings",
    "train_lcm": "LCMSettings",
    "train_cdm": "CDMSettings",
    "train_dmd": "DMDSettings",
    "prepare_teacher": "PreparationSettings",
}
THEN = {
    "max_train_steps": 10,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_processes": 1,
    "learning_rate": 1e-3,
    "mixed_precision": "no",
    "rank": None,
    "guidance_scales": [4.5],
    "logging_steps": 10,
    "replay_buffer_size": 0,
    "prompts_file": "a.txt",
}


def compare(*, allowed=(), step=4, then=THEN, **changes):
    return changed_settings("run/checkpoint-4", then, {**THEN, **changes}, step=step, allowed=allowed)


def test_the_same_command_changes_nothing():
    assert compare() == {} and compare(step=10) == {}


@pytest.mark.parametrize("changes", [{"logging_steps": 1}, {"prompts_file": "b.txt"}, {"new_in_this_version": 3}])
def test_what_leaves_the_weights_as_they_are_may_change_in_silence(changes):
    assert compare(**changes) == {}


def test_more_steps_are_applied_and_recorded_and_fewer_than_done_are_refused():
    assert compare(max_train_steps=12) == {"max_train_steps": [10, 12]}
    assert compare(max_train_steps=5) == {"max_train_steps": [10, 5]}
    with pytest.raises(ValueError, match="`max_train_steps` is 3, but checkpoint 'run/checkpoint-4' is already at"):
        compare(max_train_steps=3)


@pytest.mark.parametrize("changes", [{"rank": 4}, {"guidance_scales": [4.5, 5.0]}, {"learning_rate": 1e-4}])
def test_what_changes_the_result_is_refused_by_name_with_both_values(changes):
    (name,) = changes
    with pytest.raises(
        ValueError, match=rf"was trained with `{name}` .*, now .* train in another `output_dir`"
    ) as error:
        compare(**changes)
    assert ("resume_with_changed" in str(error.value)) == (name in CHANGEABLE)


def test_every_refused_one_is_named_and_those_that_may_change_are_marked():
    with pytest.raises(ValueError) as error:
        compare(rank=2, learning_rate=1e-4, mixed_precision="bf16")
    assert "`rank` null, now 2" in str(error.value)
    assert "(learning_rate mixed_precision)" in str(error.value)


def test_what_is_named_may_change():
    assert compare(learning_rate=1e-4, allowed=["learning_rate"]) == {"learning_rate": [1e-3, 1e-4]}
    with pytest.raises(ValueError, match="`rank`"):
        compare(rank=2, learning_rate=1e-4, allowed=["learning_rate"])


def test_what_a_checkpoint_does_not_name_is_what_it_was_before_there_was_a_setting():
    warm = {"endpoint_warmup_steps": 8}
    then = {**THEN, **warm}
    message = r'`endpoint_loss_type` "l2", now "norm": give its values again \(`endpoint_loss_type` l2\)'
    with pytest.raises(ValueError, match=message):
        compare(then=then, endpoint_loss_type="norm", **warm)
    assert compare(then=then, endpoint_loss_type="l2", **warm) == {}
    changed = {"endpoint_loss_type": ["l2", "norm"]}
    assert compare(then=then, endpoint_loss_type="norm", allowed=["endpoint_loss_type"], **warm) == changed
    assert compare(endpoint_loss_type="norm", endpoint_warmup_steps=0) == {}  # no step was or will be of that loss
    with pytest.raises(ValueError, match=r"`noise_share` 0.0, now 0.5: give its values again \(`noise_share` 0.0\)"):
        compare(noise_share=0.5)
    assert compare(noise_share=0.0) == {}
    assert compare(then=then, **warm) == {}  # of a method without these


def test_fp16_cannot_begin_on_the_way():
    assert compare(mixed_precision="bf16", allowed=["mixed_precision"])
    with pytest.raises(ValueError, match=r"`mixed_precision` is fp16, .* has no loss scale"):
        compare(mixed_precision="fp16", allowed=["mixed_precision"])


def test_a_batch_may_be_cut_in_another_way_where_rows_are_keyed_by_their_draw():
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "num_processes": 2}
    assert compare(**split) == {name: [THEN[name], value] for name, value in split.items()}
    for refused in ({"train_batch_size": 2}, {"num_processes": 2}, {**split, "replay_buffer_size": 8}):
        then = {**THEN, **{name: value for name, value in refused.items() if name == "replay_buffer_size"}}
        with pytest.raises(ValueError, match=r"train_batch_size|num_processes"):
            compare(then=then, **refused)
    with pytest.raises(ValueError, match="train_batch_size"):
        compare(then={**THEN, "replay_steps": 2}, replay_steps=2, **split)


def test_other_content_is_refused_by_name():
    then = {"method": "TBCM", "prompts": "ab", "teacher": "cd"}
    check_content("run/checkpoint-4", then, {**then, "pictures": "ef"})
    with pytest.raises(ValueError, match=r"another method \(method: TBCM, now sCM\).*train in another `output_dir`"):
        check_content("run/checkpoint-4", then, {"method": "sCM"})
    with pytest.raises(ValueError, match="another prompts, another teacher"):
        check_content("run/checkpoint-4", then, {**then, "prompts": "x", "teacher": "y"})


def test_every_name_is_a_setting_of_a_script_and_stands_in_one_list():
    settings = [getattr(import_module(f"diffusers_tbcm.scripts.{name}"), kind) for name, kind in SCRIPTS.items()]
    names = {field.name for kind in settings for field in dataclasses.fields(kind)} | {PROCESSES}
    lists = [FREE, BY_CONTENT, CHANGEABLE, [LENGTH], BATCH]
    assert {*BEFORE, *(name for part in lists for name in part)} <= names
    assert sum(map(len, lists)) == len({name for part in lists for name in part})


def test_a_history_goes_through_checkpoints_and_tells_its_changes():
    first = History({**THEN, "scales": (1, 2)})
    first.depends_on({"method": "TBCM"})
    assert first.changes == [] and str(first) == ""
    second = History(
        {**THEN, "scales": [1, 2], "learning_rate": 1e-4, "max_train_steps": 12},
        checkpoint=Path("run/checkpoint-4"),
        then=json.loads(json.dumps(first.state())),
        step=4,
        allowed=["learning_rate"],
    )
    second.depends_on({"method": "TBCM"})
    third = History(second.state()["told"], checkpoint=Path("run/checkpoint-8"), then=second.state(), step=8)
    expected = [{"step": 4, "max_train_steps": [10, 12], "learning_rate": [1e-3, 1e-4]}]
    assert second.changes == third.changes == expected
    assert str(third) == "max_train_steps 10 until step 4, then 12; learning_rate 0.001 until step 4, then 0.0001"
    with pytest.raises(ValueError, match=r"'run/checkpoint-8' was trained with another method"):
        third.depends_on({"method": "sCM"})
