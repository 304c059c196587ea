"""Captioned pictures, those of a folder and those of a data set."""

import math

import pytest
import torch
from captioned import RESOLUTION, write_images
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from diffusers_tbcm.data.columns import MJHQ_30K
from diffusers_tbcm.data.pictures import CaptionedImages, DatasetPictures, FolderPictures


CAPTIONS = ["a fox", "a red fox", "a violin", "an owl", "a violin", "a cat", "the sun"]
COLOURS = ["red", "lime", "blue"]


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return CaptionedImages(write_images(tmp_path_factory.mktemp("data") / "images", CAPTIONS))


def test_a_folder_of_pictures_is_read_with_its_captions(images):
    assert len(images) == len(CAPTIONS) and images.captions == [(caption,) for caption in CAPTIONS]
    assert images.prompts == ["a fox", "a red fox", "a violin", "an owl", "a cat", "the sun"]
    assert [images[index].size for index in (0, 2)] == [(RESOLUTION, RESOLUTION), (RESOLUTION, RESOLUTION + 6)]


def test_one_of_several_captions_is_drawn_and_pictures_without_one_are_left_out(tmp_path, caplog):
    source = write_images(tmp_path / "images", [["a", "b", " "], [], ["c"], [""]])
    images = CaptionedImages(source)
    assert images.captions == [("a", "b"), ("c",)] and images.prompts == ["a", "b", "c"]
    assert "2 pictures" in caplog.text
    assert images[1].size[1] == RESOLUTION + 6  # the third of the folder
    picks = [images.pick_caption(0, torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert picks.count("a") / 400 == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(400))
    assert picks[7] == images.pick_caption(0, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert images.pick_caption(1, generator) == "c" and torch.equal(generator.get_state(), state)
    assert CaptionedImages(source, max_images=1).captions == [("a", "b")]


def test_unusable_data_is_named(tmp_path, images):
    folder = write_images(tmp_path / "images", CAPTIONS)
    with pytest.raises(ValueError, match="has no column 'caption': it has image, text"):
        CaptionedImages(folder, caption_column="caption")
    with pytest.raises(ValueError, match="column 'text' is neither text nor a list of texts: it holds 7"):
        CaptionedImages(write_images(tmp_path / "numbers", [7, 8]))
    with pytest.raises(ValueError, match=r"none of the 2 pictures of .* has a caption"):
        CaptionedImages(write_images(tmp_path / "empty", ["", " "]))


@pytest.fixture
def labelled_images():
    features = Features({"image": Image(), "label": ClassLabel(names=COLOURS), "text": Value("string")})
    pictures = [Pillow.new("RGB", (4, 4), colour) for colour in COLOURS]
    return Dataset.from_dict({"image": pictures, "label": [0, 1, 2], "text": COLOURS}, features=features)


def corners(pictures):
    return [picture.convert("RGB").getpixel((0, 0)) for picture in pictures]


def test_a_folders_pictures_are_labelled_by_the_folders_in_it(tmp_path):
    for index, colour in enumerate(COLOURS):
        (tmp_path / colour).mkdir()
        Pillow.new("RGB", (4, 4 + index), colour).save(tmp_path / colour / "one.PNG")
    (tmp_path / "notes.txt").touch()
    pictures = FolderPictures(tmp_path)
    assert len(pictures) == 3 and pictures.labels == ["blue", "lime", "red"]
    assert corners(pictures) == corners(pictures[:]) == [(0, 0, 255), (0, 255, 0), (255, 0, 0)]
    Pillow.new("RGB", (4, 4)).save(tmp_path / "unlabelled.webp")
    assert FolderPictures(tmp_path).labels == [] and len(FolderPictures(tmp_path)) == 4
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(ValueError, match="holds no picture"):
            FolderPictures(folder)


def test_a_data_sets_pictures_are_labelled_by_their_class(labelled_images, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda source, config, split, **kw: {"train": labelled_images}[split])
    pictures = DatasetPictures("owner/colours", label_column="label")
    assert pictures.labels == COLOURS and len(pictures) == 3
    assert corners(pictures) == corners(pictures[0:3]) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert DatasetPictures("owner/colours").labels == []
    with pytest.raises(ValueError, match="has no column 'picture': it has image, label, text"):
        DatasetPictures("owner/colours", image_column="picture")
    with pytest.raises(ValueError, match="column 'text' of 'owner/colours' holds no pictures"):
        DatasetPictures("owner/colours", image_column="text")


def test_the_pictures_of_mjhq_30k_are_known_by_name(labelled_images, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda source, config, split, **kw: {"test": labelled_images}[split])
    assert DatasetPictures(MJHQ_30K).labels == COLOURS
