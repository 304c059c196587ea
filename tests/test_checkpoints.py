"""Checkpoints are whole or they are not loaded."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from diffusers_tbcm.files import beside, read_json, write_json
from diffusers_tbcm.owned import MARKER
from diffusers_tbcm.training.checkpoints import (
    MANIFEST,
    checkpoint_step,
    cut_log,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
)


@pytest.fixture
def run(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    for step in (2, 10):
        torch.nn.init.constant_(model.weight, step)
        save_checkpoint(accelerator, tmp_path, step)
    return accelerator, model, tmp_path


def weights_file(checkpoint):
    return next(file for file in checkpoint.iterdir() if file.name != MANIFEST and file.stat().st_size > 0)


def test_the_latest_is_found_and_loads(run):
    accelerator, model, folder = run
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-10"]
    for request, step in (("latest", 10), ("checkpoint-2", 2), (str(folder / "checkpoint-2"), 2)):
        checkpoint, found = find_checkpoint(folder, request)
        accelerator.load_state(str(checkpoint))
        assert found == step and (model.weight == step).all()


def test_old_ones_go_after_the_new_one_is_complete(run):
    accelerator, _, folder = run
    save_checkpoint(accelerator, folder, 11, total_limit=2)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-10", "checkpoint-11"]


def test_the_new_one_stays_where_torn_ones_of_later_steps_lie_about(run):
    accelerator, _, folder = run
    (folder / "checkpoint-10" / MANIFEST).unlink()
    save_checkpoint(accelerator, folder, 8, total_limit=1)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-8"]
    assert find_checkpoint(folder, "latest")[1] == 8


def test_one_that_cannot_be_written_is_a_warning_and_leaves_the_others(run, monkeypatch, caplog):
    accelerator, _, folder = run

    def full(output_dir):
        Path(output_dir).mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(accelerator, "save_state", full)
    assert save_checkpoint(accelerator, folder, 11, total_limit=1) is None
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
        checkpoint_step(folder / "checkpoint-99")


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
    assert save_checkpoint(accelerator, folder, 11, total_limit=1) is None
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
        save_checkpoint(accelerator, folder, step, total_limit=1)
    (folder / "mine").unlink()
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "checkpoint-12", "checkpoint-2"]
    assert [path.name for path in (folder / "checkpoint-2").iterdir()] == ["notes.txt"]


def test_a_folder_of_that_name_that_is_not_ours_stays(run, caplog):
    accelerator, _, folder = run
    (folder / "checkpoint-11").mkdir()
    (folder / "checkpoint-11" / "notes.txt").write_text("mine")
    assert save_checkpoint(accelerator, folder, 11, total_limit=1) is None
    assert "did not write, or what was changed since (checkpoint-11): move it" in caplog.text
    assert [path.name for path in (folder / "checkpoint-11").iterdir()] == ["notes.txt"]


def test_a_log_loses_no_line_when_it_is_cut(tmp_path):
    path, left = tmp_path / "metrics.jsonl", tmp_path / "abandoned" / "metrics.jsonl"
    cut_log(path, 1)
    assert not path.exists()
    path.write_text('{"step": 1}\nwritten by hand\n{"step": 2}\n{"step": 3, "lo')
    cut_log(path, 1)
    cut_log(path, 1)
    assert path.read_text() == '{"step": 1}\nwritten by hand\n'
    assert left.read_text() == '{"step": 2}\n{"step": 3, "lo\n'
    path.write_text('{"step": 1}\n{"step": 9}\n')
    cut_log(path, 1)
    assert left.read_text().endswith('{"step": 9}\n') and left.read_text().startswith('{"step": 2}\n')


def test_a_disk_that_is_full_when_a_log_is_cut_leaves_it_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.read_text()

    def full(self, *args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        cut_log(path, 1)
    assert path.read_text() == before
