"""Captioned pictures, those of a folder and those of a data set."""

import json
import math

import numpy as np
import pytest
import torch
from captioned import RESOLUTION, write_images
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from diffusers_tbcm.data.columns import MJHQ_30K
from diffusers_tbcm.data.pictures import CaptionedImages, ColumnPictures, DatasetPictures, FolderPictures
from diffusers_tbcm.evaluation.features import pictures_to_tensor
from diffusers_tbcm.images import to_pixels


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
    for name, caption, message in (
        ("nul", "a \0 dog", "which is no text"),
        ("long", "a" * 100_001, "100,001 characters"),
    ):
        with pytest.raises(ValueError, match=f"'column text' holds .*{message}"):
            CaptionedImages(write_images(tmp_path / name, [["a"], ["b", caption]]))
    with pytest.raises(ValueError, match=r"none of the 2 pictures of .* has a caption"):
        CaptionedImages(write_images(tmp_path / "empty", ["", " "]))
    with pytest.raises(ValueError, match=r"column 'text' of .* holds no pictures"):
        CaptionedImages(folder, image_column="text")


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
    with pytest.raises(ValueError, match=r"holds pictures, such as 'unlabelled\.webp', beside folders of pictures"):
        FolderPictures(tmp_path, labelled=True)
    (tmp_path / "unlabelled.webp").unlink()
    for hidden in (tmp_path / "red" / ".ipynb_checkpoints", tmp_path / ".trash"):
        hidden.mkdir()
        Pillow.new("RGB", (4, 4)).save(hidden / "one.png")
    Pillow.new("RGB", (4, 4)).save(tmp_path / ".one.png")
    assert FolderPictures(tmp_path, labelled=True).labels == ["blue", "lime", "red"]
    assert FolderPictures(tmp_path / "red" / ".ipynb_checkpoints", labelled=True).labels == []  # named by the user
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(ValueError, match="holds no picture"):
            FolderPictures(folder)


def test_a_data_sets_pictures_are_labelled_by_their_class(labelled_images, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda source, config, split, **kw: {"train": labelled_images}[split])
    pictures = DatasetPictures("owner/colours", label_column="label")
    assert pictures.labels == COLOURS and len(pictures) == 3
    assert corners(pictures) == corners(pictures[0:3]) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert DatasetPictures("owner/colours").labels == DatasetPictures("owner/colours").prompts == []
    assert DatasetPictures("owner/colours", prompt_column="text").prompts == COLOURS
    with pytest.raises(ValueError, match="has no column 'picture': it has image, label, text"):
        DatasetPictures("owner/colours", image_column="picture")
    with pytest.raises(ValueError, match="column 'text' of 'owner/colours' holds no pictures"):
        DatasetPictures("owner/colours", image_column="text")


def test_the_pictures_of_mjhq_30k_are_known_by_name(labelled_images, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda source, config, split, **kw: {"test": labelled_images}[split])
    assert DatasetPictures(MJHQ_30K).labels == COLOURS


def write_awkward_pictures(folder):
    """A cut-out emoji, a photograph that EXIF turns, and 16 bits, beside their captions; what each of them shows."""
    folder.mkdir()
    emoji = Pillow.new("RGBA", (64, 64), (0, 0, 0, 0))
    emoji.paste((255, 0, 0, 255), (16, 16, 48, 48))
    emoji.save(folder / "emoji.png")
    photo = Pillow.new("RGB", (96, 64), "blue")
    photo.paste("yellow", (0, 0, 96, 32))
    exif = Pillow.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo.save(folder / "photo.jpg", exif=exif, quality=100, subsampling=0)
    Pillow.fromarray(np.full((64, 64), 51400, dtype=np.uint16)).save(folder / "sixteen.png")
    names = ("emoji.png", "photo.jpg", "sixteen.png")
    lines = (json.dumps({"file_name": name, "text": name}) + "\n" for name in names)
    (folder / "metadata.jsonl").write_text("".join(lines))
    return [(64, 64), (64, 96), (64, 64)], [(255, 255, 255), (0, 0, 254), (200, 200, 200)]


def test_training_and_evaluation_see_the_same_pictures(tmp_path):
    sizes, colours = write_awkward_pictures(tmp_path / "pictures")
    source = str(tmp_path / "pictures")
    readers = (FolderPictures(source), DatasetPictures(source), CaptionedImages(source))
    for reader in readers:
        found = [reader[index] for index in range(3)]
        assert [picture.mode for picture in found] == ["RGB"] * 3 and [picture.size for picture in found] == sizes
        assert corners(found) == colours
        for picture, first in zip(found, readers[0], strict=True):
            assert np.array_equal(picture, first)
        assert pictures_to_tensor(found[:1])[0, :, 2, 2].tolist() == [1, 1, 1]
    for index in range(3):  # features and latents of what has not been read yet are those of what has
        stored = readers[0].open(index)
        assert torch.equal(pictures_to_tensor([stored]), pictures_to_tensor([readers[0][index]]))
        assert torch.equal(to_pixels(stored, 32), to_pixels(readers[0][index], 32))


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    write_awkward_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "._photo.jpg").write_bytes(b"left by a file manager")
    (tmp_path / "pictures" / "folder.png").mkdir()
    FolderPictures(tmp_path / "pictures").check()
    photo = tmp_path / "pictures" / "photo.jpg"
    photo.write_bytes(photo.read_bytes()[:-200])
    Pillow.new("I", (4, 4), 7).save(tmp_path / "pictures" / "sixteen.tif")
    folder = FolderPictures(tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"picture '.*photo\.jpg' cannot be read: .*[Tt]runcated"):
        folder[1]
    with pytest.raises(ValueError, match=r"picture '.*sixteen\.tif' cannot be read: `image` has mode 'I'"):
        folder[3]
    with pytest.raises(ValueError, match=r"^2 of 4 real pictures cannot be read: picture '.*photo\.jpg' cannot"):
        folder.check()
    source = str(tmp_path / "pictures")
    for reader in (DatasetPictures(source), CaptionedImages(source)):
        with pytest.raises(ValueError, match=rf"picture 1 of '{source}' cannot be read"):
            reader[1]
    images = CaptionedImages(source)
    photo.unlink()
    with pytest.raises(ValueError, match=rf"picture 1 of '{source}' cannot be read: .*No such file"):
        images.digest()
    nothing = Dataset.from_dict({"image": [None, b""], "text": ["a", "b"]}).cast_column("image", Image())
    for index, reason in enumerate(("there is none", "cannot identify image file")):
        with pytest.raises(ValueError, match=f"picture {index} of 'nothing' cannot be read: {reason}"):
            ColumnPictures(nothing, "image", "nothing")[index]


def test_what_sets_real_pictures_apart_from_drawn_ones_is_said(tmp_path, caplog):
    write_awkward_pictures(tmp_path / "pictures")
    FolderPictures(tmp_path / "pictures").check((64, 64))
    assert "1 of 3 real pictures are JPEG files" in caplog.text
    assert "1 of 3 real pictures, most of them 64 x 96, have not the 64 x 64 pixels" in caplog.text
    caplog.clear()
    (tmp_path / "pictures" / "photo.jpg").unlink()
    FolderPictures(tmp_path / "pictures").check((64, 64))
    FolderPictures(tmp_path / "pictures").check()
    assert not caplog.text
