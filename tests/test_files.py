import json

import pytest

from diffusers_tbcm.files import beside, read_json, remove, replace, write_json, written_beside


def tree(folder):
    """Everything below a folder: the content of files, None for folders."""
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_file_is_not_there_before_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with written_beside(path) as partial:
        assert partial.parent == tmp_path  # on the same disk
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert tree(tmp_path) == {"a.txt": "whole"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_changes_nothing(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), written_beside(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise error
    assert tree(tmp_path) == {"a.txt": "old"}


def test_a_folder_takes_the_place_of_another_whole(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    with written_beside(str(folder)) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
        assert tree(folder) == {"old": "old"}
    assert tree(tmp_path) == {"model": None, "model/new": "new"}


def test_what_a_killed_process_left_is_not_taken_along(tmp_path):
    left = beside(tmp_path / "model")
    left.mkdir()
    (left / "half").write_text("half")
    with written_beside(tmp_path / "model") as partial:
        assert not partial.exists()
        partial.mkdir()
    assert tree(tmp_path) == {"model": None}


def test_the_caller_says_how_the_finished_is_put_into_place(tmp_path):
    def add(written, target):
        target.write_text(target.read_text() + written.read_text())
        written.unlink()

    (tmp_path / "a.txt").write_text("one ")
    with written_beside(tmp_path / "a.txt", place=add) as partial:
        partial.write_text("two")
    assert tree(tmp_path) == {"a.txt": "one two"}


def test_remove_and_replace_take_files_and_folders_and_leave_what_links_lead_to(tmp_path):
    for name in ("folder", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "in").write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "other")
    replace(tmp_path / "folder", tmp_path / "link")
    assert tree(tmp_path) == {"link": None, "link/in": "folder", "other": None, "other/in": "other"}
    for name in ("link", "other", "missing"):
        remove(tmp_path / name)
    assert tree(tmp_path) == {}


def test_json_is_read_as_it_was_written_and_kept_where_it_cannot_be(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"name": "é", "numbers": [1, 2.5, None]})
    assert read_json(path) == {"name": "é", "numbers": [1, 2.5, None]}
    assert path.read_text(encoding="utf-8").startswith('{\n  "name": "é"')
    with pytest.raises(TypeError):
        write_json(path, {"name": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["name"] == "é"
    assert [*path.parent.iterdir()] == [path]
