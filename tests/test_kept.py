"""What is measured of drawn pictures is kept beside them, and computed again where it is no longer of them."""

import pytest
import torch
from PIL import Image

from diffusers_tbcm.evaluation import kept
from diffusers_tbcm.evaluation.kept import kept_rows
from diffusers_tbcm.evaluation.picture_folder import PictureFolder


@pytest.fixture
def pictures(tmp_path):
    """Two pictures of each of three prompts, each of one grey."""
    folder = PictureFolder(tmp_path / "student-1-steps", ["a", "b", "c"], 2, {"seed": 0})
    for index in range(6):
        Image.new("L", (4, 4), 10 * index).convert("RGB").save(folder.path(index))
    return folder


class Greys:
    """Computes the grey of pictures, and remembers of which."""

    def __init__(self, pictures):
        self.pictures, self.asked = pictures, []

    def __call__(self, chosen):
        self.asked += chosen
        return torch.tensor([float(self.pictures[index].getpixel((0, 0))[0]) for index in chosen])


def test_what_was_computed_is_read_the_next_time(pictures):
    greys = Greys(pictures)
    first = kept_rows(pictures, "Grey score", "weights", greys)
    assert torch.equal(first, 10 * torch.arange(6.0)) and greys.asked == [0, 1, 2, 3, 4, 5]
    assert torch.equal(kept_rows(pictures, "Grey score", "weights", greys), first) and len(greys.asked) == 6
    assert (pictures.folder / "grey_score.safetensors").is_file()


def test_a_picture_that_was_drawn_anew_is_computed_anew(pictures):
    greys = Greys(pictures)
    kept_rows(pictures, "Grey", "weights", greys)
    Image.new("RGB", (5, 5), (99, 99, 99)).save(pictures.path(3))
    assert kept_rows(pictures, "Grey", "weights", greys).tolist() == [0, 10, 20, 99, 40, 50]
    assert greys.asked[6:] == [3]


def test_other_weights_or_a_torn_file_are_not_used(pictures):
    greys = Greys(pictures)
    kept_rows(pictures, "Grey", "weights", greys)
    kept_rows(pictures, "Grey", "others", greys)
    assert len(greys.asked) == 12
    file = pictures.folder / "grey.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    kept_rows(pictures, "Grey", "others", greys)
    assert len(greys.asked) == 18


def test_a_stopped_measurement_goes_on_where_it_was(pictures, monkeypatch):
    monkeypatch.setattr(kept, "CHUNK", 2)
    monkeypatch.setattr(kept, "SAVE_SECONDS", 0.0)
    greys = Greys(pictures)

    def stopped(chosen):
        if 4 in chosen:
            raise KeyboardInterrupt
        return greys(chosen)

    with pytest.raises(KeyboardInterrupt):
        kept_rows(pictures, "Grey", "weights", stopped)
    assert torch.equal(kept_rows(pictures, "Grey", "weights", greys), 10 * torch.arange(6.0))
    assert greys.asked == [0, 1, 2, 3, 4, 5]


def test_more_pictures_of_every_prompt_are_added_to_those_that_are_known(pictures):
    greys = Greys(pictures)
    kept_rows(pictures, "Grey", "weights", greys)
    more = PictureFolder(pictures.folder, ["a", "b", "c"], 3, {"seed": 0})
    for prompt in range(3):
        Image.new("RGB", (4, 4), (200, 200, 200)).save(more.path(3 * prompt + 2))
    greys = Greys(more)
    assert kept_rows(more, "Grey", "weights", greys).tolist() == [0, 10, 200, 20, 30, 200, 40, 50, 200]
    assert greys.asked == [2, 5, 8]


def test_pictures_without_a_folder_are_computed_each_time(pictures):
    listed = list(pictures)
    greys = Greys(listed)
    for _ in range(2):
        assert torch.equal(kept_rows(listed, "Grey", "weights", greys), 10 * torch.arange(6.0))
    assert len(greys.asked) == 12
