"""A folder of ours: what it takes, what it refuses, and that nothing else in it changes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_tbcm.files import beside
from diffusers_tbcm.owned import LOCK, MARKER, OwnedFolder


# What another run does to the lock's file, without the seconds that it takes to start.
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


# An export over another on a small disk of its own, and one that the disk has no room for.
ON_A_VOLUME = """
import sys
from pathlib import Path
from diffusers_tbcm.owned import OwnedFolder

owned = OwnedFolder(sys.argv[1])

def put(size):
    with owned.replaced(last="index", absent=[], stale=[]) as staged:
        (staged / "net").mkdir()
        (staged / "net" / "weights").write_bytes(bytes(size))
        (staged / "index").write_text(str(size))

owned.claim()
owned.check_renaming()
for size in (100, 200):
    put(size)
try:
    put(1_000_000)
except OSError as error:
    print(error.strerror)
print(owned.folder.joinpath("index").read_text(), owned.folder.joinpath("net/weights").stat().st_size)
print(sorted(path.name for path in owned.folder.iterdir()), owned.foreign(["index", "net/weights"]))
"""
NEW_VOLUME = 'mount -t tmpfs -o size=256k none "$1" && exec "$2" -c "$3" "$1"'
NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]


@pytest.fixture
def folder(tmp_path):
    owned = OwnedFolder(tmp_path / "ours")
    owned.claim()
    return owned


def tree(folder):
    """The content of every file but the marker."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in sorted(files.items()) if name not in (MARKER, LOCK)}


def put(folder, **files):
    """An export of some files; `_` stands for a slash."""
    with folder.replaced(last="index", absent=["metrics"], stale=["images"]) as staged:
        for name, text in {**files, "index": "index"}.items():
            path = staged / name.replace("_", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "lost+found", "a killed process's file"])
def test_an_empty_or_missing_folder_becomes_ours_and_stays_it(tmp_path, left):
    if left != "nothing":
        (tmp_path / "ours").mkdir()
    if left == "lost+found":
        (tmp_path / "ours" / left).mkdir()
    if left == "a killed process's file":
        beside(tmp_path / "ours" / MARKER).write_text("")
    owned = OwnedFolder(tmp_path / "ours")
    owned.claim()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    owned.claim()
    assert owned.foreign(["notes.txt", "other"]) == ["notes.txt"]


@pytest.mark.parametrize("name", ["README.md", ".env", "images/00.png", "checkpoint-1/model.safetensors"])
def test_a_folder_with_files_is_not_ours(tmp_path, name):
    path = tmp_path / "theirs" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"`output_dir` '.*theirs' holds files that are not this package's \("):
        OwnedFolder(tmp_path / "theirs").claim()
    assert tree(tmp_path) == {f"theirs/{name}": "mine"}


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nobody"])
def test_a_place_that_takes_no_folder_is_refused_in_words(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"`output_dir` .* cannot be"):
        OwnedFolder(tmp_path / place).claim()


def test_a_file_is_ours_until_somebody_changes_it(folder):
    for text in ("one", "two"):
        with folder.written("sub/card") as path:
            path.write_text(text)
    (folder.folder / "sub" / "card").write_text("two, and mine")
    with pytest.raises(ValueError, match=r"did not write, or what was changed since \(sub/card\): move it"):
        folder.check_free(["sub/card"])
    with pytest.raises(ValueError), folder.written("sub/card"):
        raise AssertionError("written")
    assert tree(folder.folder) == {"sub/card": "two, and mine"}


def test_a_file_of_no_known_content_is_ours_after_a_killed_write(folder, monkeypatch):
    folder.own("plot")
    (folder.folder / "plot").write_text("one")
    rename = Path.replace

    def die(path, target):
        if target.name == "plot":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", die)
        with folder.written("plot") as path:
            path.write_text("two")
    with folder.written("plot") as path:
        path.write_text("three")
    assert tree(folder.folder) == {"plot": "three"}


def test_a_copy_of_the_folder_is_ours_too(folder, tmp_path):
    with folder.written("card") as path:
        path.write_text("one")
    subprocess.run(["cp", "-r", folder.folder, tmp_path / "copy"], check=True)  # with times of its own
    os.utime(tmp_path / "copy" / "card", (0, 0))
    assert OwnedFolder(tmp_path / "copy").foreign(["card"]) == []


@pytest.mark.parametrize("kind", ["link", "folder behind a link", "file where a folder is to be", "folder"])
def test_what_would_lead_elsewhere_is_in_the_way(folder, tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "card").write_text("mine")
    name = "card" if kind in ("link", "folder") else "sub/card"
    if kind == "link":
        (folder.folder / "card").symlink_to(tmp_path / "elsewhere" / "card")
    elif kind == "folder":
        (folder.folder / "card").mkdir()
    elif kind == "folder behind a link":
        (folder.folder / "sub").symlink_to(tmp_path / "elsewhere")
    else:
        (folder.folder / "sub").write_text("mine")
    assert folder.foreign([name]) == [name]


def test_files_take_their_places_and_those_of_an_earlier_time_go(folder):
    put(folder, net_weights="1", net_part="1", images_0="1", images_1="1", metrics="1")
    with folder.written("log") as path:
        path.write_text("stays")
    for name in ("net/notes", "images/mine", "other"):
        (folder.folder / name).write_text("mine")
    (folder.folder / "images" / "1").write_text("changed")
    put(folder, net_weights="2", images_0="2")
    mine = {"net/notes": "mine", "images/mine": "mine", "other": "mine", "images/1": "changed"}
    assert tree(folder.folder) == {**mine, "index": "index", "net/weights": "2", "images/0": "2", "log": "stays"}


@pytest.mark.parametrize("name", ["net/weights", "metrics", "index"])
def test_nothing_goes_where_something_is_in_the_way(folder, name):
    put(folder, net_weights="1", images_0="1")
    (folder.folder / name).write_text("mine")
    before = tree(folder.folder)
    with pytest.raises(ValueError, match="move it to another place"):
        put(folder, net_weights="2")
    assert tree(folder.folder) == before


@pytest.mark.parametrize("moved", range(4))
def test_an_export_that_is_killed_while_it_moves_is_done_again(folder, monkeypatch, moved):
    put(folder, net_weights="1", images_0="1")
    rename, calls = Path.replace, []

    def die(path, target):
        if not target.name.startswith("."):
            calls.append(target)
            if MARKER not in target.name and len([call for call in calls if call.name != MARKER]) > moved:
                raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", die)
        put(folder, net_weights="2", images_0="2", card="2")
    assert not (folder.folder / "index").exists()
    put(folder, net_weights="3")
    assert tree(folder.folder) == {"index": "index", "net/weights": "3"} | ({"card": "2"} if moved > 0 else {})


def test_a_full_disk_leaves_the_earlier_student_and_no_half_of_the_new_one(folder):
    put(folder, net_weights="1")
    with pytest.raises(OSError), folder.replaced(last="index", absent=[], stale=[]) as staged:
        (staged / "half").write_text("half")
        raise OSError("No space left on device")
    assert tree(folder.folder) == {"index": "index", "net/weights": "1"}


def test_a_folder_may_be_a_volume_and_the_volume_full(tmp_path):
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here, which a mount of one's own takes")
    (tmp_path / "volume").mkdir()
    command = [*NAMESPACE, NEW_VOLUME, "sh", tmp_path / "volume", sys.executable, ON_A_VOLUME]
    done = subprocess.run(command, capture_output=True, text=True)
    expected = ["No space left on device", "200 200", f"{[MARKER, 'index', 'net']} []"]
    assert done.stdout.splitlines() == expected, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_what_is_set_aside_is_nobodys_but_the_users(folder):
    for text in ("one", "two"):
        with folder.written("sub/step-4.png") as path:
            path.write_text(text)
        folder.set_aside("sub/step-4.png")
    assert tree(folder.folder) == {"abandoned/sub/step-4.png": "one", "abandoned/sub/step-4-2.png": "two"}
    assert folder.foreign(["abandoned/sub/step-4.png"])


def test_renaming_is_tried_and_leftovers_go(folder, monkeypatch):
    beside(folder.folder / "student").mkdir()
    (folder.folder / "student.partial").write_text("mine")
    folder.check_renaming()
    assert tree(folder.folder) == {"student.partial": "mine"}
    assert sorted(path.name for path in folder.folder.iterdir()) == [MARKER, "student.partial"]
    rename = Path.replace

    def refuse(path, target):
        if path.is_dir():
            raise OSError("Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ValueError, match=r"`output_dir` .* cannot be renamed in it: Operation not permitted"):
        folder.check_renaming()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"other": {}}'])
def test_a_damaged_marker_makes_every_file_somebodys(folder, content):
    put(folder, net_weights="1")
    (folder.folder / MARKER).write_text(content)
    assert folder.foreign(["index", "net/weights", "new"]) == ["index", "net/weights"]


def test_one_process_at_a_time_and_a_dead_one_is_none(folder):
    other = subprocess.Popen([sys.executable, "-c", HOLD, folder.folder / LOCK], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=r"`output_dir` .* belongs to a run that still goes on"):
        folder.hold()
    other.kill()
    other.wait()
    first, second = folder.hold(), folder.hold()  # the same process may, as a dry run does
    assert first.is_locked and second.is_locked


def test_a_disk_without_locks_is_warned_of(folder, monkeypatch, caplog):
    def refuse(self, timeout):
        raise OSError("No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    folder.hold()
    assert "cannot be locked, take care that no other run uses it: No locks available" in caplog.text


@pytest.mark.parametrize("name", ["net/../../mine", "images/../../mine", "/absolute", "..", ".", ""])
def test_a_marker_does_not_lead_out_of_its_folder(folder, tmp_path, name):
    (tmp_path / "mine").write_text("mine")
    put(folder, net_weights="1", images_0="1")
    marker = json.loads((folder.folder / MARKER).read_text())
    marker["files"][str(tmp_path / "mine") if name == "/absolute" else name] = []
    (folder.folder / MARKER).write_text(json.dumps(marker))
    put(folder, net_weights="2")
    assert (tmp_path / "mine").read_text() == "mine" and name not in folder.names


@pytest.mark.parametrize("states", [3, "x", {}, [3], [{"size": 1}], None])
def test_an_entry_of_a_marker_that_says_nothing_makes_its_file_somebodys(folder, states):
    put(folder, net_weights="1")
    (folder.folder / MARKER).write_text(json.dumps({"files": {"net/weights": states}}))
    assert folder.foreign(["net/weights"]) == ["net/weights"]


def test_a_folder_by_the_markers_name_is_no_marker(tmp_path):
    (tmp_path / MARKER).mkdir()
    (tmp_path / MARKER / "notes").write_text("mine")
    with pytest.raises(ValueError, match=rf"holds files that are not this package's \({MARKER}\)"):
        OwnedFolder(tmp_path).claim()
    assert (tmp_path / MARKER / "notes").read_text() == "mine"


def test_a_link_that_leads_nowhere_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("link", "link/run"):
        with pytest.raises(ValueError, match="link' is a link that leads nowhere: name another"):
            OwnedFolder(tmp_path / place).claim()
