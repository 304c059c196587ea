import json

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from diffusers_tbcm.data.evaluation import (
    MJHQ_30K,
    DatasetPictures,
    EvaluationPrompts,
    FolderPictures,
    load_evaluation_prompts,
)


COLOURS = ["red", "lime", "blue"]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    entries = [{"prompt": f"a {colour} dog", "concept": colour, "size": i} for i, colour in enumerate(COLOURS)]
    file.write_text("\n".join(map(json.dumps, [*entries, entries[0]])))
    return file


@pytest.fixture
def labelled_images():
    features = Features({"image": Image(), "label": ClassLabel(names=COLOURS), "text": Value("string")})
    pictures = [Pillow.new("RGB", (4, 4), colour) for colour in COLOURS]
    return Dataset.from_dict({"image": pictures, "label": [0, 1, 2], "text": COLOURS}, features=features)


def corners(pictures):
    return [picture.convert("RGB").getpixel((0, 0)) for picture in pictures]


def test_prompts_of_a_text_file_keep_their_order_and_repetitions(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\na violin\na dog\n")
    assert load_evaluation_prompts(file) == EvaluationPrompts(["a dog", "a violin", "a dog"], [])
    assert load_evaluation_prompts(file, max_prompts=2).prompts == ["a dog", "a violin"]


def test_prompts_and_labels_are_columns(rows):
    found = load_evaluation_prompts(rows, prompt_column="prompt", label_column="concept", max_prompts=4)
    assert found == EvaluationPrompts(["a red dog", "a lime dog", "a blue dog", "a red dog"], [*COLOURS, "red"])


def test_bad_prompts_are_refused(rows, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n \n")
    with pytest.raises(ValueError, match=r"prompt 1 of .* is ' '"):
        load_evaluation_prompts(file)
    with pytest.raises(ValueError, match="it has no columns"):
        load_evaluation_prompts(file, label_column="concept")
    file.write_text("")
    with pytest.raises(ValueError, match="holds no prompt"):
        load_evaluation_prompts(file)
    with pytest.raises(ValueError, match="does not exist"):
        load_evaluation_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no column 'text': it has prompt, concept, size"):
        load_evaluation_prompts(rows)
    with pytest.raises(ValueError, match=r"prompt 0 of .* is 0, which is no text"):
        load_evaluation_prompts(rows, prompt_column="size")


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
    monkeypatch.setattr("datasets.load_dataset", lambda source, config, split: {"train": labelled_images}[split])
    pictures = DatasetPictures("owner/colours", label_column="label")
    assert pictures.labels == COLOURS and len(pictures) == 3
    assert corners(pictures) == corners(pictures[0:3]) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert DatasetPictures("owner/colours").labels == []
    with pytest.raises(ValueError, match="has no column 'picture': it has image, label, text"):
        DatasetPictures("owner/colours", image_column="picture")
    with pytest.raises(ValueError, match="column 'text' of 'owner/colours' holds no pictures"):
        DatasetPictures("owner/colours", image_column="text")


def test_mjhq_30k_is_known_by_name(labelled_images, monkeypatch, tmp_path):
    file = tmp_path / "meta_data.json"
    file.write_text(
        json.dumps({"0a": {"prompt": "a red dog", "category": "red"}, "0b": {"prompt": "b", "category": "lime"}})
    )
    asked = []
    monkeypatch.setattr(
        "diffusers_tbcm.data.evaluation.hf_hub_download", lambda *names, **kind: asked.append((names, kind)) or file
    )
    monkeypatch.setattr("datasets.load_dataset", lambda source, config, split: {"test": labelled_images}[split])
    assert load_evaluation_prompts(MJHQ_30K) == EvaluationPrompts(["a red dog", "b"], ["red", "lime"])
    assert asked == [((MJHQ_30K, "meta_data.json"), {"repo_type": "dataset"})]
    assert DatasetPictures(MJHQ_30K).labels == COLOURS
