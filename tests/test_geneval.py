"""GenEval's layout, and its results read back."""

import json
import os
import shlex
from pathlib import Path

import pytest
from PIL import Image

from diffusers_tbcm.evaluation.geneval import GenEval
from diffusers_tbcm.evaluation.picture_folder import PictureFolder


LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"},
]


def coloured(folder, prompts, each):
    """Pictures that can be told apart."""
    pictures = PictureFolder(folder, prompts, each, {"seed": 0})
    for index in range(len(pictures)):
        Image.new("RGB", (8, 8), (10 * index, 0, 0)).save(pictures.path(index))
    return pictures


@pytest.fixture
def geneval(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return GenEval(file)


@pytest.fixture
def pictures(geneval, tmp_path):
    return coloured(tmp_path / "pictures" / "student-1-steps", geneval.prompts, 2)


def write_results(folder, correct):
    """What `evaluate_images.py` writes, in the order in which it lists folders: none."""
    lines = [
        {"filename": str(folder / f"{prompt:05}" / "samples" / f"{number:04}.png"), "tag": LINES[prompt % 3]["tag"],
         "prompt": LINES[prompt % 3]["prompt"], "correct": right, "reason": "", "metadata": "{}", "details": "{}"}
        for (prompt, number), right in reversed(correct.items())
    ]  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_pictures_lie_as_the_scorer_reads_them(geneval, pictures, tmp_path):
    folder = tmp_path / "geneval" / "student-1-steps"
    for _ in range(2):  # the second time as the first
        command = geneval.export(pictures, folder)
    assert f"evaluate_images.py {folder} --outfile {folder / 'results.jsonl'}" in command
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        f"0000{prompt}/{name}"
        for prompt in range(3)
        for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert json.loads((folder / "00001" / "metadata.jsonl").read_text()) == LINES[1]
    with Image.open(folder / "00001" / "samples" / "0001.png") as picture:
        assert picture.getpixel((0, 0)) == (30, 0, 0)
    # A picture that was drawn anew takes the place of the old one.
    pictures.path(3).unlink()
    Image.new("RGB", (8, 8), "blue").save(pictures.path(3))
    geneval.export(pictures, folder)
    with Image.open(folder / "00001" / "samples" / "0001.png") as picture:
        assert picture.getpixel((0, 0)) == (0, 0, 255)


def test_fewer_pictures_than_before_can_be_scored(geneval, pictures, tmp_path):
    folder = tmp_path / "geneval"
    geneval.export(pictures, folder)
    write_results(folder, {(prompt, number): True for prompt in range(3) for number in range(2)})
    theirs = folder / "00000" / "samples" / "mine.png"
    theirs.write_text("mine")
    few = PictureFolder(pictures.folder, geneval.prompts, 1, {"seed": 0})
    geneval.export(few, folder)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png")) == [
        "00000/samples/0000.png", "00000/samples/mine.png", "00001/samples/0000.png", "00002/samples/0000.png",
    ]  # fmt: skip
    assert len([*pictures.folder.glob("*.png")]) == 6
    with pytest.raises(ValueError, match="hold 3 of 3 pictures, and 3 others: score the folder again"):
        geneval.scores(few, folder, 20)
    write_results(folder, {(prompt, 0): prompt > 0 for prompt in range(3)})
    assert geneval.scores(few, folder, 20).metrics["GenEval"] == 0.75


def test_the_command_runs_in_another_folder(geneval, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(geneval.export(pictures, Path("my runs") / "geneval"))
    folder = tmp_path / "my runs" / "geneval"
    assert words[2:5] == [str(folder), "--outfile", str(folder / "results.jsonl")]


def test_links_that_the_disk_does_not_have_are_copies(geneval, pictures, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    geneval.export(pictures, tmp_path / "geneval")
    copy = tmp_path / "geneval" / "00002" / "samples" / "0001.png"
    assert copy.read_bytes() == pictures.path(5).read_bytes() and not copy.samefile(pictures.path(5))


def test_scores_are_means_over_tasks(geneval, pictures, tmp_path):
    geneval.export(pictures, tmp_path)
    assert geneval.scores(pictures, tmp_path, 20) is None
    right = {(0, 0): True, (0, 1): True, (1, 0): False, (1, 1): True, (2, 0): False, (2, 1): True}
    write_results(tmp_path, right)
    scores = geneval.scores(pictures, tmp_path, 200)
    assert scores.metrics == {"GenEval": 0.625, "GenEval single_object": 0.75, "GenEval counting": 0.5}
    assert {*scores.intervals} == {"GenEval", "GenEval single_object"}  # one prompt has no interval
    low, high = scores.intervals["GenEval single_object"]
    assert (high - low) / 2 == pytest.approx(1.96 * 0.25 / 2**0.5, rel=0.15)  # two prompts, 0.25 off the mean each


def test_results_that_do_not_fit_are_refused(geneval, pictures, tmp_path):
    geneval.export(pictures, tmp_path)
    write_results(tmp_path, {(0, 0): True, (7, 0): True})
    with pytest.raises(ValueError, match="hold 1 of 6 pictures, and 1 others: score the folder again"):
        geneval.scores(pictures, tmp_path, 20)
    (tmp_path / "results.jsonl").write_text('{"filename": "a.png"}\n')
    with pytest.raises(ValueError, match="line 1 is no JSON object with filename and correct"):
        geneval.scores(pictures, tmp_path, 20)


def test_results_of_earlier_pictures_are_left_out(geneval, pictures, tmp_path):
    geneval.export(pictures, tmp_path)
    write_results(tmp_path, {(prompt, number): True for prompt in range(3) for number in range(2)})
    assert geneval.scores(pictures, tmp_path, 20).metrics["GenEval"] == 1
    drawn_at = (tmp_path / "results.jsonl").stat().st_mtime_ns + 10**9
    os.utime(pictures.path(4), ns=(drawn_at, drawn_at))
    assert geneval.scores(pictures, tmp_path, 20) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "GenEval file .* does not exist"),
        ("", "is empty"),
        ('{"prompt": "a dog"}\n', "line 1 is no JSON object with prompt and tag"),
        ('{"prompt": "a dog", "tag": "x"}\nnone\n', "line 2 is no JSON object"),
        ('{"prompt": "a dog", "tag": "x"}\n{"prompt": " ", "tag": "x"}\n', "GenEval file .*: prompt 2 is empty"),
        (r'{"prompt": "a \u0000 dog", "tag": "x"}', "which is no text: it has a NUL"),
        (r'{"prompt": "a \ud800 dog", "tag": "x"}', "which is no text: it has a NUL or half a character"),
        (b'{"prompt": "a caf\xe9", "tag": "x"}', "GenEval file .* is not UTF-8: line 1 cannot be read"),
    ],
)
def test_a_file_that_is_not_genevals_is_named(content, message, tmp_path):
    file = tmp_path / "metadata.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        GenEval(file)


def test_a_byte_order_mark_and_a_line_separator_are_read(tmp_path):
    file = tmp_path / "metadata.jsonl"
    file.write_text('\ufeff{"prompt": "a dog\u2028and a cat", "tag": "x"}\n', encoding="utf-8")
    assert GenEval(file).prompts == ["a dog\u2028and a cat"]


def test_the_first_prompts_suffice(geneval, tmp_path):
    few = GenEval(tmp_path / "evaluation_metadata.jsonl", max_prompts=2)
    assert few.prompts == geneval.prompts[:2] and few.tasks == ["single_object"] * 2
