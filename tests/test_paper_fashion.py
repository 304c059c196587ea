"""The second teacher's recipe, on a few made-up pictures in Fashion-MNIST's format."""

import gzip
import json

import numpy as np
import pytest
from diffusers import SanaPipeline

from benchmarks.paper import make_fashion_teacher as recipe
from benchmarks.paper.study_runs import Study
from diffusers_tbcm.data.pictures import CaptionedImages
from diffusers_tbcm.data.prompts import load_prompts
from examples.tbcm.mini_teacher.emoji_metrics import (
    DISTILLATION_PROMPTS_FILE,
    EVALUATION_FILE,
    REFERENCE_FILE,
    load_evaluation,
)


PER_CLASS = 13


@pytest.fixture
def data_dir(tmp_path):
    """Class k comes at every tenth place from the k-th, and is 20 k dark in its upper half."""
    folder = tmp_path / "data"
    folder.mkdir()
    labels = np.arange(10 * (PER_CLASS + 1), dtype=np.uint8) % 10
    pixels = np.zeros((len(labels), 28, 28), np.uint8)
    pixels[:, :14] = 20 * labels[:, None, None]
    for name, header, array in (("labels-idx1", 8, labels), ("images-idx3", 16, pixels)):
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + array.tobytes()))
    return folder


def test_pictures_are_the_first_of_each_class_on_white(data_dir):
    images, concepts = recipe.load_pictures(data_dir, 3)
    assert images.shape == (30, 3, 64, 64) and concepts == [name for name in recipe.CLASSES for _ in range(3)]
    for number in range(10):
        assert images[3 * number, :, 10, 10].tolist() == [255 - 20 * number] * 3
        assert images[3 * number, :, 60, 10].tolist() == [255] * 3
    (data_dir / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="--data_dir"):
        recipe.load_pictures(data_dir, 3)


def test_the_data_are_what_the_study_reads(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    images, concepts = recipe.load_pictures(data_dir, 2)
    evaluation = recipe.write_data(images, concepts, tmp_path / "teacher", seed=0)
    assert load_evaluation(tmp_path / "teacher") == evaluation
    assert {item.concept for item in evaluation} == set(recipe.CLASSES)
    assert all(item.concept in item.prompt and not item.held_out for item in evaluation)
    assert "an ankle boot on white" in load_prompts(tmp_path / "teacher" / DISTILLATION_PROMPTS_FILE).prompts
    lines = (tmp_path / "teacher" / recipe.PICTURES / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"][0] for line in lines] == concepts
    assert len(CaptionedImages(str(tmp_path / "teacher" / recipe.PICTURES))) == 20


def test_the_recipe_ends_in_a_teacher_for_the_study(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "PICTURES_PER_CLASS", PER_CLASS)
    monkeypatch.setattr(recipe, "EVALUATION_PROMPTS", 70)
    monkeypatch.setattr(recipe, "STEPS", (1,))
    folder = tmp_path / "fashion"
    recipe.main(
        ["--data_dir", str(data_dir), "--output_dir", str(folder), "--max_train_steps", "1", "--train_batch_size", "2"]
    )
    assert all((folder / name).exists() for name in (DISTILLATION_PROMPTS_FILE, EVALUATION_FILE, REFERENCE_FILE))
    pipeline = SanaPipeline.from_pretrained(folder)
    assert pipeline.vae.config.scaling_factor != 1
    assert json.loads((folder / "measurements.json").read_text())["results"]["1 steps"]["MobileNet-FD"] > 0
    assert len(Study(folder, tmp_path / "runs", 50).evaluation[0]) == 50
