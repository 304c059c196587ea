"""The folder of shards that embeddings and latents are kept in."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_tbcm.data import shards
from diffusers_tbcm.data.shards import TORN, ShardFolder, own_shards, read_slice
from diffusers_tbcm.owned import MARKER


FINGERPRINT = {"model": "a", "dtype": "float32"}


def store(folder, fingerprint=FINGERPRINT):
    return ShardFolder(folder, fingerprint, entry="made_of", items="numbers", others="others", redo="count again")


def count(model, shard, done):
    """A shard of numbers, named by its first."""
    done(len(shard))
    return str(shard.start), {"numbers": torch.arange(shard.start, shard.stop) + model}


def fill(folder, shards=(range(0, 3), range(3, 5)), load=lambda: 0, **kwargs):
    return store(folder, **kwargs).fill(shards, load, count, label="Counting", quiet=True)


def never():
    raise AssertionError("the model was loaded")


def test_shards_hold_their_tensors_and_what_they_were_made_of(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert fill(folder) == 5
    assert {path.name for path in folder.iterdir()} == {"0.safetensors", "3.safetensors", MARKER}
    assert load_file(folder / "3.safetensors")["numbers"].tolist() == [3, 4]
    with safe_open(folder / "0.safetensors", framework="pt") as file:
        assert {name: json.loads(text) for name, text in file.metadata().items()} == {"made_of": FINGERPRINT}
    found = [(path.stem, tensors["numbers"].tolist()) for path, tensors in store(folder).whole(("numbers",))]
    assert found == [("0", [0, 1, 2]), ("3", [3, 4])]
    assert read_slice(store(folder).path("0"), "numbers", slice(1, 3)).tolist() == [1, 2]
    assert int(read_slice(store(folder).path("3"), "numbers", 1)) == 4


def test_two_runs_that_fill_a_folder_at_once_write_one_after_the_other(tmp_path, monkeypatch):
    save, writing = shards.save_file, []

    def slow(tensors, path, **kwargs):
        writing.append(path)
        assert len(writing) == 1
        time.sleep(0.05)
        save(tensors, path, **kwargs)
        writing.remove(path)

    monkeypatch.setattr(shards, "save_file", slow)
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda _: fill(tmp_path), range(2))] == [5, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARKER, "0.safetensors", "3.safetensors"]


@pytest.mark.parametrize("entry", ["no json", "[]", "3"])
def test_a_shard_that_does_not_say_what_it_is_made_of_is_refused_in_words(tmp_path, entry):
    fill(tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors", metadata={"made_of": entry})
    with pytest.raises(ValueError, match="holds others: model is None, not a"):
        [*store(tmp_path).whole()]


def test_nothing_to_make_loads_no_model_and_makes_no_folder(tmp_path):
    assert fill(tmp_path / "folder", shards=[], load=never) == 0
    assert not (tmp_path / "folder").exists() and list(store(tmp_path / "folder").whole()) == []


def test_a_folder_of_other_files_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "0.safetensors").write_text("version https://git-lfs.github.com/spec/v1")  # torn, or somebody's
    with pytest.raises(ValueError, match=r"holds files that are not this package's \(0.safetensors\): choose"):
        fill(tmp_path, load=never)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]


def test_a_folder_with_shards_and_other_files_goes_on(tmp_path):
    fill(tmp_path, shards=[range(0, 3)])
    (tmp_path / MARKER).unlink()  # as earlier versions left them
    (tmp_path / "notes.txt").write_text("mine")
    assert fill(tmp_path, shards=[range(3, 5)]) == 2 and (tmp_path / "notes.txt").read_text() == "mine"


def test_what_was_written_stays_where_the_next_shard_fails(tmp_path):
    def fail_at_three(model, shard, done):
        if shard.start == 3:
            raise KeyboardInterrupt
        return count(model, shard, done)

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path).fill([range(0, 3), range(3, 5)], lambda: 0, fail_at_three, label="", quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"0.safetensors", MARKER}


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_torn_shard_is_named_and_passed_over(tmp_path, keep, caplog):
    fill(tmp_path)
    torn = tmp_path / "0.safetensors"
    torn.write_bytes(torn.read_bytes()[:keep])
    with caplog.at_level(logging.WARNING):
        assert [path.stem for path, _ in store(tmp_path).whole()] == ["3"]
    assert "0.safetensors' is torn, its numbers count as missing" in caplog.text
    with pytest.raises(TORN):
        read_slice(torn, "numbers", 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_neither_written_nor_read(tmp_path, value):
    def broken(model, shard, done):
        return str(shard.start), {"numbers": torch.tensor([0.0, value]), "keys": torch.arange(2)}

    with pytest.raises(ValueError, match="numbers became NaN or infinity: the model's weights hold some"):
        store(tmp_path).fill([range(0, 2)], lambda: 0, broken, label="", quiet=True)
    assert not [*tmp_path.glob("*.safetensors")]
    save_file({"numbers": torch.tensor([0.0, value])}, tmp_path / "0.safetensors")
    assert float(read_slice(tmp_path / "0.safetensors", "numbers", 0)) == 0
    with pytest.raises(ValueError, match=r"shard '.*0\.safetensors' holds NaN or infinity in its numbers: delete it"):
        read_slice(tmp_path / "0.safetensors", "numbers", slice(0, 2))


def test_shards_of_another_fingerprint_are_refused_and_what_differs_is_said(tmp_path):
    fill(tmp_path)
    other = store(tmp_path, {"model": "b", "dtype": "float32", "size": "3"})
    message = "holds others: model is a, not b; size is None, not 3. Choose another folder, or delete this one to"
    with pytest.raises(ValueError, match=f"{message} count again"):
        list(other.whole())
    save_file({"numbers": torch.zeros(1)}, tmp_path / "9.safetensors")  # of another program
    with pytest.raises(ValueError, match="model is None, not a"):
        list(store(tmp_path).whole())


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_processes_share_the_shards_that_one_makes(num_processes):
    shares = [own_shards(8, 3, process_index=index, num_processes=num_processes) for index in range(num_processes)]
    assert sorted((shard.start, shard.stop) for share in shares for shard in share) == [(0, 3), (3, 6), (6, 8)]
    assert max(map(len, shares)) == -(-3 // num_processes)
