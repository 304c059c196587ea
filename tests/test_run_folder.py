"""A run's folder: what a run that goes back leaves behind."""

from pathlib import Path

import pytest

from diffusers_tbcm.training.run_folder import cut_log


def test_a_log_loses_no_line_when_it_is_cut(tmp_path):
    path, left = tmp_path / "metrics.jsonl", tmp_path / "abandoned" / "metrics.jsonl"
    cut_log(path, 1)
    assert not path.exists()
    path.write_text('{"step": 1}\nwritten by hand\n{"step": 2}\n{"step": 3, "lo')
    cut_log(path, 1)
    cut_log(path, 1)
    assert path.read_text() == '{"step": 1}\n'
    assert left.read_text() == 'written by hand\n{"step": 2}\n{"step": 3, "lo\n'
    path.write_text('{"step": 1}\n{"step": 9}\n')
    cut_log(path, 1)
    assert left.read_text().endswith('{"step": 9}\n') and left.read_text().startswith("written by hand\n")


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
