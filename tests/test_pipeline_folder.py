import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import write_tiny_pipeline

from diffusers_tbcm import pipeline_folder
from diffusers_tbcm.pipeline_folder import resolve_teacher


@pytest.fixture
def damaged_teacher(tmp_path) -> Path:
    return write_tiny_pipeline(tmp_path / "damaged")


def _no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def _other_transformer(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


def _no_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def _pickled_text_encoder(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")


def _no_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


def _torn_transformer(folder: Path) -> None:
    os.truncate(folder / "transformer" / "diffusion_pytorch_model.safetensors", 9000)


def _own_code(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["evil", "Tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))


def _broken_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [\n---\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_vocabulary, "cannot be used: no vocabulary of its tokenizer"),
        (_torn_transformer, r"cannot be used: transformer/.*safetensors is no safetensors file, or a torn one"),
        (_own_code, r"has tokenizer \['evil', 'Tokenizer'\]: its code would be evil"),
        (_broken_card, r"cannot be used: damaged/README.md cannot be read as a model card"),
        (_no_index, "is no pipeline folder: it has no model_index.json"),
        (_other_transformer, "is of no known family: .*FluxTransformer2DModel"),
        (_no_vae, "lacks its vae"),
        (_pickled_text_encoder, "no full-precision safetensors weights of its text_encoder"),
        (shutil.rmtree, "is neither a folder nor a model on the Hub"),
    ],
)
def test_a_teacher_that_cannot_be_exported_is_refused(damage, message, damaged_teacher):
    damage(damaged_teacher)
    with pytest.raises(ValueError, match=message):
        resolve_teacher(damaged_teacher)


def test_of_the_hub_the_index_comes_first_and_then_the_familys_components(tmp_path, monkeypatch):
    folder, asked = write_tiny_pipeline(tmp_path / "snapshot"), []

    def snapshot(repo_id, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(pipeline_folder, "snapshot_download", snapshot)
    assert resolve_teacher("someone/teacher") == folder
    assert "model_index.json" in asked[0] and not any("*" in pattern for pattern in asked[0])
    assert {*asked[1]} == {f"{name}/*" for name in ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")}
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"'someone/teacher' is no pipeline folder: it has no model_index.json"):
        resolve_teacher("someone/teacher")
