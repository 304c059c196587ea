"""Scores of programs of other environments."""

import json

import pytest
from PIL import Image

from diffusers_tbcm.evaluation.elsewhere import read_scores, write_list
from diffusers_tbcm.evaluation.picture_folder import PictureFolder


@pytest.fixture
def pictures(tmp_path):
    folder = PictureFolder(tmp_path / "student-1-steps", ["a dog", "ein Käfer"], 2, {"seed": 0})
    for index in range(4):
        Image.new("RGB", (4, 4)).save(folder.path(index))
    return folder


def write_scores(pictures, values):
    lines = [json.dumps({"file_name": pictures.path(index).name, "score": value}) for index, value in values.items()]
    (pictures.folder / "HPSv3.jsonl").write_text("\n".join(lines) + "\n")


def test_pictures_are_listed_with_their_prompts(pictures):
    lines = [json.loads(line) for line in write_list(pictures).read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == ["a dog", "a dog", "ein Käfer", "ein Käfer"]
    assert [line["file_name"] for line in lines] == [
        "000000-00.png", "000000-01.png", "000001-00.png", "000001-01.png",
    ]  # fmt: skip


def test_scores_are_read_back_with_an_interval_over_prompts(pictures):
    assert read_scores(pictures, "HPSv3", 20) is None
    write_scores(pictures, {3: 4, 0: 1.0, 1: 2.0, 2: 4.0})
    scores = read_scores(pictures, "HPSv3", 400)
    assert scores.metrics == {"HPSv3": 2.75}
    low, high = scores.intervals["HPSv3"]
    assert (high - low) / 2 == pytest.approx(1.96 * 1.25 / 2**0.5, rel=0.1)  # prompts of 1.5 and 4


def test_scores_that_do_not_fit_are_refused(pictures):
    write_scores(pictures, {0: 1.0, 1: 2.0, 2: 3.0})
    with pytest.raises(ValueError, match=r"HPSv3.jsonl' lack 1 of 4 pictures, such as 000001-01.png: score again"):
        read_scores(pictures, "HPSv3", 20)
    write_scores(pictures, {0: "good"})
    with pytest.raises(ValueError, match="line 1 is no JSON object with file_name and score"):
        read_scores(pictures, "HPSv3", 20)
    write_scores(pictures, {0: float("nan"), 1: 2.0, 2: 3.0, 3: 1.0})
    with pytest.raises(ValueError, match=r"that of 000000-00\.png is nan"):
        read_scores(pictures, "HPSv3", 20)
