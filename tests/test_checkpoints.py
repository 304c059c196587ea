"""Checkpoints are whole or they are not loaded."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from diffusers_tbcm.files import beside, read_json, write_json
from diffusers_tbcm.owned import MARKER, OwnedFolder
from diffusers_tbcm.training import checkpoints
from diffusers_tbcm.training.checkpoints import (
    AVERAGES,
    MANIFEST,
    RUN_STATE,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_run_state,
    rotate_checkpoints,
    save_checkpoint,
)
from diffusers_tbcm.training.resumption import BATCH, LENGTH
from diffusers_tbcm.training.run_folder import check_way


STATE = {
    "told": dict.fromkeys((LENGTH, *BATCH), 1),
    "content": {},
    "changes": [{"step": 1, "learning_rate": [1e-3, 1e-4]}],
    "averaged_steps": {"student": 2},
    "health": {"recovering": 0, "sound": None},
}


def save(accelerator, folder, step):
    return save_checkpoint(accelerator, folder, step, state=STATE, averages={"student.weight": torch.ones(2)})


@pytest.fixture
def run(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    for step in (2, 10):
        torch.nn.init.constant_(model.weight, step)
        save(accelerator, tmp_path, step)
    return accelerator, model, tmp_path


def weights_file(checkpoint):
    return next(file for file in checkpoint.iterdir() if file.name != MANIFEST and file.stat().st_size > 0)


def test_the_latest_is_found_and_loads(run):
    accelerator, model, folder = run
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-10"]
    for request, step in (("latest", 10), ("checkpoint-2", 2), (str(folder / "checkpoint-2"), 2)):
        checkpoint, found = find_checkpoint(folder, request)
        averages = load_checkpoint(accelerator, checkpoint, partial=False)
        assert found == step and (model.weight == step).all() and averages["student.weight"].tolist() == [1, 1]
        assert load_run_state(checkpoint) == STATE


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("sound", "kept"),
    [(None, [10, 11]), ("checkpoint-10", [10, 11]), ("checkpoint-2", [2, 10, 11]), ("checkpoint-1", [10, 11])],
)
def test_the_oldest_go_but_for_the_sound_one(run, sound, kept):
    accelerator, _, folder = run
    save(accelerator, folder, 11)
    rotate_checkpoints(folder, "checkpoint-11", 2, sound=sound)
    assert names(folder) == [f"checkpoint-{step}" for step in kept]


def test_the_newest_one_stays_where_torn_ones_of_later_steps_lie_about(run):
    accelerator, _, folder = run
    (folder / "checkpoint-10" / MANIFEST).unlink()
    save(accelerator, folder, 8)
    rotate_checkpoints(folder, "checkpoint-8", 1)
    assert names(folder) == ["checkpoint-8"] and find_checkpoint(folder, "latest")[1] == 8


def test_one_that_cannot_be_deleted_is_a_warning(run, monkeypatch, caplog):
    _, _, folder = run

    def refuse(path):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(checkpoints, "discard_checkpoint", refuse)
    rotate_checkpoints(folder, "checkpoint-10", 1)
    assert "could not be deleted: Permission denied" in caplog.text


def test_one_that_cannot_be_written_is_a_warning_and_leaves_the_others(run, monkeypatch, caplog):
    accelerator, _, folder = run

    def full(output_dir):
        Path(output_dir).mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(accelerator, "save_state", full)
    assert save(accelerator, folder, 11) is None
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "checkpoint-10", "checkpoint-2"]
    assert "No space left on device" in caplog.text


def test_one_still_being_written_does_not_count(run):
    _, _, folder = run
    beside(folder / "checkpoint-11").mkdir()
    assert find_checkpoint(folder, "latest")[1] == 10
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` is 'latest', but .* holds no checkpoint"):
        find_checkpoint(folder / "elsewhere", "latest")


@pytest.mark.parametrize("damage", ["cut", "file missing", "manifest missing", "manifest cut"])
def test_a_torn_one_is_named_and_the_one_before_it_taken(run, damage):
    _, _, folder = run
    torn = folder / "checkpoint-10"
    file = torn / MANIFEST if "manifest" in damage else weights_file(torn)
    if "missing" in damage:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-2])  # a manifest ends in a newline, which nobody misses
    with pytest.raises(ValueError, match=r"checkpoint-10'.*(complete|corrupt)"):
        find_checkpoint(folder, "checkpoint-10")
    assert find_checkpoint(folder, "latest")[1] == 2


def test_nothing_is_resumed_where_every_one_is_torn(run):
    _, _, folder = run
    for checkpoint in list_checkpoints(folder):
        (checkpoint / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        find_checkpoint(folder, "latest")
    with pytest.raises(ValueError, match="not complete"):
        checkpoint_step(folder / "checkpoint-10")


@pytest.mark.parametrize("name", ["checkpoint-99", "yes", f"checkpoint-2/{MANIFEST}"])
def test_a_checkpoint_that_is_not_there_is_told_beside_those_there_are(run, name):
    with pytest.raises(
        ValueError, match=r"`resume_from_checkpoint` is .* no such folder; .* checkpoint-2, checkpoint-10"
    ):
        find_checkpoint(run[2], name)


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def full_accelerator():
    """One with everything that accelerate writes files of: two models, two optimisers, a scaler."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        model = torch.nn.Linear(2, 2)
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return accelerator


def files_of_a_checkpoint():
    return [
        "model.safetensors", "model_1.safetensors", "optimizer.bin", "optimizer_1.bin", "scaler.pt",
        "random_states_0.pkl", AVERAGES, RUN_STATE, MANIFEST,
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize(
    "name", [*files_of_a_checkpoint(), "custom_checkpoint_0.pkl", "scheduler.bin", "sampler.bin", "model.bin"]
)
def test_no_file_of_a_checkpoint_can_run_code(tmp_path, name, how):
    accelerator, trap = full_accelerator(), tmp_path / "trap"
    checkpoint = save(accelerator, tmp_path, 3)
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(files_of_a_checkpoint())
    if how == "pickle":
        (checkpoint / name).write_bytes(pickle.dumps({"state": Bomb(trap)}))
    else:
        torch.save({"state": Bomb(trap), "numpy": np.ones(2)}, checkpoint / name)
    if name == "model.bin":  # what accelerate takes where there are no safetensors
        (checkpoint / "model.safetensors").unlink()
    try:
        checkpoint_step(checkpoint)  # which looks at sizes, and whose file a thief may write too
    except ValueError:
        assert name in {*files_of_a_checkpoint(), "model.bin"}
    errors = []
    for read in (load_run_state, lambda folder: load_checkpoint(accelerator, folder, partial=False)):
        try:
            read(checkpoint)
        except ValueError as error:
            errors.append(str(error))
    assert not trap.exists()
    assert all("\n" not in error and "checkpoint-3" in error for error in errors)
    if name not in (MANIFEST, "random_states_0.pkl", "scheduler.bin", "sampler.bin"):  # what is not asked for
        assert len(errors) == 1


@pytest.mark.parametrize("content", [None, "{}", "[]", '{"told": {}, "content": [], "changes": []}', "\x00\x00"])
def test_a_checkpoint_of_an_earlier_version_is_refused_by_a_clear_line(run, content):
    _, _, folder = run
    (folder / "checkpoint-10" / RUN_STATE).unlink()
    if content is not None:
        (folder / "checkpoint-10" / RUN_STATE).write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint-10' has no readable run.json, .* earlier versions"):
        load_run_state(folder / "checkpoint-10")


@pytest.mark.parametrize("lost", ["model", "optimizer"])
def test_one_whose_files_were_deleted_while_it_was_written_is_none(run, monkeypatch, caplog, lost):
    accelerator, model, folder = run
    accelerator.prepare(torch.optim.SGD(model.parameters()))
    save_state = accelerator.save_state

    def rob(output_dir):
        save_state(output_dir)
        for file in Path(output_dir).glob(f"*{lost}*"):
            file.unlink()

    monkeypatch.setattr(accelerator, "save_state", rob)
    assert save(accelerator, folder, 11) is None
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-10"]
    assert f"it has files of 0 {lost}s, not of 1" in caplog.text


def test_one_without_weights_is_not_loaded(run):
    _, _, folder = run
    manifest = read_json(folder / "checkpoint-10" / MANIFEST)
    sizes = {name: size for name, size in manifest["files"].items() if "model" not in name}
    write_json(folder / "checkpoint-10" / MANIFEST, manifest | {"files": sizes})
    with pytest.raises(ValueError, match="checkpoint-10' is corrupt: it has files of 0 models"):
        find_checkpoint(folder, "checkpoint-10")
    assert find_checkpoint(folder, "latest")[1] == 2


def test_what_else_lies_in_an_old_one_stays_and_is_no_longer_ours(run):
    accelerator, _, folder = run
    (folder / "checkpoint-2" / "notes.txt").write_text("mine")
    manifest = read_json(folder / "checkpoint-2" / MANIFEST)
    (folder / "mine").write_text("mine")
    manifest["files"]["../mine"] = 4  # somebody's idea of a manifest
    write_json(folder / "checkpoint-2" / MANIFEST, manifest)
    for step in (11, 12):
        save(accelerator, folder, step)
        rotate_checkpoints(folder, f"checkpoint-{step}", 1)
    (folder / "mine").unlink()
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "checkpoint-12", "checkpoint-2"]
    assert [path.name for path in (folder / "checkpoint-2").iterdir()] == ["notes.txt"]


def test_a_folder_of_that_name_that_is_not_ours_stays(run, caplog):
    accelerator, _, folder = run
    (folder / "checkpoint-11").mkdir()
    (folder / "checkpoint-11" / "notes.txt").write_text("mine")
    assert save(accelerator, folder, 11) is None
    assert "did not write, or what was changed since (checkpoint-11): move it" in caplog.text
    assert [path.name for path in (folder / "checkpoint-11").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("changes", [
    {"told": {}}, {"told": {**STATE["told"], LENGTH: "ten"}}, {"health": {}},
    {"health": {"recovering": -1, "sound": None}},
    {"health": {"recovering": 0, "sound": 3}}, {"changes": [{"x": 1}]}, {"changes": [{"step": 1, "x": 1}]},
    {"changes": ["x"]}, {"averaged_steps": {"student": "two"}}, {"averaged_steps": {"student": True}},
])  # fmt: skip
def test_a_state_that_was_edited_is_refused_in_words(run, changes):
    _, _, folder = run
    write_json(folder / "checkpoint-10" / RUN_STATE, {**STATE, **changes})
    with pytest.raises(ValueError, match=r"has no readable run\.json"):
        load_run_state(folder / "checkpoint-10")


@pytest.mark.parametrize("step", [-5, "x", None, True, 1.5])
def test_a_step_that_is_no_count_makes_a_checkpoint_none(run, step):
    _, _, folder = run
    manifest = folder / "checkpoint-10" / MANIFEST
    write_json(manifest, {**read_json(manifest), "step": step})
    with pytest.raises(ValueError, match="is not complete"):
        checkpoint_step(folder / "checkpoint-10")


def test_other_digits_name_no_checkpoint(run):
    _, _, folder = run
    for name in ("checkpoint-²", "checkpoint-٣"):
        (folder / name).mkdir()
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-10"]


@pytest.mark.parametrize("kind", ["file", "link", "link to nowhere"])
def test_what_is_set_aside_goes_through_no_link(run, tmp_path, kind):
    _, _, folder = run
    aside = folder / "abandoned"
    if kind == "file":
        aside.write_text("mine")
    else:
        aside.symlink_to(tmp_path if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"abandoned' is no folder, .*: move it to another place"):
        check_way(OwnedFolder(folder), 2, 10)
    check_way(OwnedFolder(folder), 0, 1)  # a run that begins leaves nothing behind
