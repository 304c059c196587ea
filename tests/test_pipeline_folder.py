import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from tiny import tiny_sana_pipeline, write_tiny_pipeline

from diffusers_tbcm import pipeline_folder
from diffusers_tbcm.pipeline_folder import digest_component, flow_shift, resolve_teacher


@pytest.fixture
def damaged_teacher(tmp_path) -> Path:
    return write_tiny_pipeline(tmp_path / "damaged")


def _no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def _other_transformer(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "PixArtTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


def _no_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def _pickled_text_encoder(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")


def _no_tokenizer(folder: Path) -> None:
    for path in (folder / "tokenizer").iterdir():
        path.unlink()


def _no_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


def _torn_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text()[:500])


def _empty_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("")


def _torn_text_encoder(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _no_text_encoder_weights(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()


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
        (_no_tokenizer, "teacher .* cannot be used: tokenizer/tokenizer_config.json is missing"),
        (_no_vocabulary, "teacher .* cannot be used: no vocabulary of its tokenizer"),
        (_torn_tokenizer, "tokenizer/tokenizer.json is no JSON file, or a torn one"),
        (_empty_tokenizer, "tokenizer/tokenizer.json is empty"),
        (_torn_text_encoder, "text_encoder/model.safetensors is no safetensors file, or a torn one"),
        (_no_text_encoder_weights, "no full-precision safetensors weights of its text_encoder"),
        (_no_vocabulary, "cannot be used: no vocabulary of its tokenizer"),
        (_torn_transformer, r"cannot be used: transformer/.*safetensors is no safetensors file, or a torn one"),
        (_own_code, r"has tokenizer \['evil', 'Tokenizer'\]: its code would be evil"),
        (_broken_card, r"cannot be used: damaged/README.md cannot be read as a model card"),
        (_no_index, "is no pipeline folder: it has no model_index.json"),
        (_other_transformer, "is of no known family: .*PixArtTransformer2DModel"),
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


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Teachers that have half-precision weights alone, in one file a component and in shards, by the shards' size."""
    pipeline = tiny_sana_pipeline().to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("halves")
    for name, size in (("whole", "1GB"), ("sharded", "5KB")):
        pipeline.save_pretrained(folder / name, variant="bf16", max_shard_size=size)
    return folder


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_a_teacher_of_one_variant_is_used_where_it_is_asked_for(halves, name):
    teacher = halves / name
    assert resolve_teacher(teacher, "bf16") == teacher
    message = (
        "has no full-precision safetensors weights of its transformer, but those of a variant: give `variant` bf16"
    )
    with pytest.raises(ValueError, match=message):
        resolve_teacher(teacher)
    with pytest.raises(ValueError, match="has no weights of `variant` fp16"):
        resolve_teacher(teacher, "fp16")
    with pytest.raises(ValueError, match="`variant` is 'int8': choose from fp16, bf16"):
        resolve_teacher(teacher, "int8")


def test_a_shard_of_the_variant_that_is_missing_is_named(halves, tmp_path):
    teacher = Path(shutil.copytree(halves / "sharded", tmp_path / "teacher"))
    next((teacher / "vae").glob("*00002-of*")).unlink()
    with pytest.raises(ValueError, match=r"cannot be used: vae/.*\.bf16-00002-of-\d+\.safetensors is missing"):
        resolve_teacher(teacher, "bf16")


def test_of_the_hub_only_the_variant_asked_for_is_downloaded(halves, tmp_path, monkeypatch):
    hub, cache = write_tiny_pipeline(tmp_path / "hub"), tmp_path / "cache"
    for component in ("transformer", "vae"):  # and none of the text encoder
        for path in (halves / "sharded" / component).glob("*.bf16*"):
            shutil.copy(path, hub / component)

    def snapshot(repo_id, allow_patterns, ignore_patterns):
        for path in [path.relative_to(hub) for path in hub.rglob("*") if path.is_file()]:
            wanted, ignored = (
                any(fnmatch(str(path), pattern) for pattern in patterns)
                for patterns in (allow_patterns, ignore_patterns)
            )
            if wanted and not ignored:
                (cache / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(hub / path, cache / path)
        return str(cache)

    monkeypatch.setattr(pipeline_folder, "snapshot_download", snapshot)
    assert resolve_teacher("someone/teacher", "bf16") == cache
    weights = {path.relative_to(cache).as_posix() for path in cache.rglob("*.safetensors")}
    assert "text_encoder/model.safetensors" in weights
    assert {name for name in weights if ".bf16-" not in name} == {"text_encoder/model.safetensors"}
    shutil.rmtree(cache)
    assert resolve_teacher("someone/teacher") == cache
    assert not [*cache.rglob("*.bf16*")] and len([*cache.rglob("*.safetensors")]) == 3


def test_a_components_digest_is_of_all_that_is_loaded_and_of_nothing_else(halves, tmp_path):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    before = digest_component(teacher, "vae")
    shutil.copy(next((halves / "whole" / "vae").glob("*.bf16.*")), teacher / "vae")
    (teacher / "vae" / "notes.txt").write_text("not loaded")
    assert digest_component(teacher, "vae") == before != digest_component(teacher, "vae", "bf16")
    path = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last bit of the last weight
    path.write_bytes(content)
    assert digest_component(teacher, "vae") != before


def test_a_components_files_are_digested_once_until_they_change(tmp_path, monkeypatch):
    teacher, read = write_tiny_pipeline(tmp_path / "teacher"), []
    digest_part = pipeline_folder._digest_part
    monkeypatch.setattr(
        pipeline_folder, "_digest_part", lambda path, start: read.append(path) or digest_part(path, start)
    )
    before = digest_component(teacher, "text_encoder")
    count = len(read)
    assert count > 0 and digest_component(teacher, "text_encoder") == before and len(read) == count
    weights = teacher / "text_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert digest_component(teacher, "text_encoder") != before


def test_a_pipeline_without_a_scheduler_is_named(damaged_teacher):
    shutil.rmtree(damaged_teacher / "scheduler")
    with pytest.raises(ValueError, match=r"teacher '.*damaged' lacks its scheduler"):
        flow_shift(damaged_teacher, 16)
