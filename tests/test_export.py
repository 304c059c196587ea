import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_sana_pipeline, tiny_transformer, write_tiny_pipeline

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler, pipeline_folder
from diffusers_tbcm.export import folders as export
from diffusers_tbcm.export.folders import save_student_pipeline
from diffusers_tbcm.export.record import Measurement, Sample, StudentDescription, save_metrics
from diffusers_tbcm.owned import MARKER, OwnedFolder
from diffusers_tbcm.pipeline_folder import VARIANTS


PROMPT = 'a "small" dolphin'
TRAINING = {"steps": 7, "learning rate": 1e-5}
DESCRIPTION = StudentDescription(PROMPT, TRAINING)

# Runs the card's own example, then draws with the same arguments and a fixed seed.
PLAIN_DIFFUSERS = """
import re, sys
sys.modules["diffusers_tbcm"] = None  # importing it is an error
import numpy as np, torch

card = open("student/README.md", encoding="utf-8").read()
exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1])
assert image.size == (64, 64), image.size
assert type(pipe).__name__ == "SanaSprintPipeline", type(pipe)
pictures = {
    str(steps): pipe(
        prompt,
        num_inference_steps=steps,
        intermediate_timesteps=1.0 if steps == 2 else None,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **options,
    ).images
    for steps in (1, 2, 4)
}
np.savez("pictures.npz", **pictures)
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("teachers") / "tiny_teacher")


@pytest.fixture(scope="module")
def student():
    return tiny_transformer(guidance_embeds=True)


@pytest.fixture
def exported(student, teacher, tmp_path) -> Path:
    return save_student_pipeline(student, teacher, tmp_path / "student", DESCRIPTION)


@pytest.fixture
def damaged_teacher(teacher, tmp_path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "damaged"))


def test_plain_diffusers_runs_the_cards_example_and_draws_what_our_pipeline_draws(exported):
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS], cwd=exported.parent, check=True, timeout=600)
    ours = SanaTBCMPipeline.from_pretrained(exported)
    with np.load(exported.parent / "pictures.npz") as theirs:
        for steps in (1, 2, 4):
            generator = torch.Generator().manual_seed(3)
            images = ours(PROMPT, num_inference_steps=steps, generator=generator, output_type="np").images
            np.testing.assert_array_equal(images, theirs[str(steps)])
        assert not np.array_equal(theirs["1"], theirs["4"])


def test_export_names_stock_classes_and_keeps_the_students_weights_and_the_teachers_files(exported, student, teacher):
    model_index = json.loads((exported / "model_index.json").read_text())
    assert model_index["_class_name"] == "SanaSprintPipeline"
    assert model_index["scheduler"] == ["diffusers", "SCMScheduler"]
    assert model_index["tokenizer"] == ["transformers", "GemmaTokenizerFast"]  # transformers 5 wrote the teacher's
    assert {library for library, _ in (v for v in model_index.values() if isinstance(v, list))} == {
        "diffusers",
        "transformers",
    }
    loaded = SanaTBCMPipeline.from_pretrained(exported).transformer.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in student.state_dict().items())
    for component in ("vae", "text_encoder", "tokenizer"):
        for path in (teacher / component).iterdir():
            assert (exported / component / path.name).read_bytes() == path.read_bytes()


def test_export_carries_the_schedulers_own_timesteps(student, teacher, tmp_path):
    scheduler = TBCMScheduler(timesteps_by_steps={"2": [1.5, 0.9, 0.0]}, guidance_scales=[4.0, 5.0])
    folder = save_student_pipeline(student, teacher, tmp_path / "student", DESCRIPTION, scheduler=scheduler)
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "SCMScheduler"
    config = SanaTBCMPipeline.from_pretrained(folder).scheduler.config
    assert config.timesteps_by_steps == {"2": [1.5, 0.9, 0.0]} and config.guidance_scales == [4.0, 5.0]
    assert "num_inference_steps=2, intermediate_timesteps=0.9," in (folder / "README.md").read_text()


def test_export_holds_no_pickles_no_lower_precision_copies_and_no_local_paths(student, damaged_teacher, tmp_path):
    (damaged_teacher / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (damaged_teacher / "text_encoder" / "model.fp16.safetensors").write_bytes(b"copy")
    student.save_pretrained(tmp_path / "somewhere")
    student = type(student).from_pretrained(tmp_path / "somewhere")  # remembers where it came from
    folder = save_student_pipeline(student, damaged_teacher, tmp_path / "student", DESCRIPTION)
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not {name for name in names if name.endswith(".bin") or ".fp16" in name}
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text(), path


def in_hub_cache(teacher: Path, cache: Path) -> Path:
    """A teacher as the Hub's cache has it: links to blobs beside its snapshot."""
    snapshot = cache / "models--lab--teacher" / "snapshots" / "abc123"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in teacher.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(teacher)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(Path(*[".."] * (len(link.relative_to(snapshot).parts) + 1), "blobs", str(number)))
    return snapshot


def test_a_teacher_of_the_hubs_cache_is_copied_as_files(student, teacher, exported, tmp_path):
    cached = in_hub_cache(teacher, tmp_path / "cache")
    folder = save_student_pipeline(student, cached, tmp_path / "from_cache", DESCRIPTION)
    names = {path.relative_to(folder) for path in folder.rglob("*")}
    assert names == {path.relative_to(exported) for path in exported.rglob("*")}
    for name in names:
        assert not (folder / name).is_symlink()
        if len(name.parts) == 2:
            assert (folder / name).read_bytes() == (exported / name).read_bytes()


@pytest.mark.parametrize("name", ["vae/config.json", "tokenizer/tokenizer.json", "LICENSE", "vae"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_link_out_of_the_teachers_folder_is_refused_and_not_copied(name, cached, student, teacher, tmp_path):
    folder = in_hub_cache(teacher, tmp_path / "cache") if cached else Path(shutil.copytree(teacher, tmp_path / "t"))
    outside = tmp_path / "outside"
    if name == "vae":
        shutil.copytree(teacher / name, outside)
        shutil.rmtree(folder / name)
    else:
        outside.write_text('{"a": 1}')
        (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"teacher .* cannot be used: .*{Path(name).name}.* is a link to elsewhere"):
        save_student_pipeline(student, folder, tmp_path / "student", DESCRIPTION)
    assert not (tmp_path / "student").exists()


def test_an_export_copies_what_components_consist_of_and_strips_it(student, teacher, damaged_teacher, tmp_path):
    private = tmp_path / "id_rsa"
    private.write_text("private")
    for name in ("vae/notes.md", "text_encoder/.env", "tokenizer/prompts.txt"):
        (damaged_teacher / name).symlink_to(private)
    for name in ("text_encoder/modeling_evil.py", "vae/.cache.json", "vae/x.joblib"):
        (damaged_teacher / name).write_text("private")
    weights = damaged_teacher / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt", "made_of": "/data/of/somebody/merge.safetensors", "häuser": "ü"})
    for name in ("vae/config.json", "tokenizer/tokenizer_config.json"):
        config = json.loads((damaged_teacher / name).read_text())
        config |= {"_name_or_path": "/data/of/somebody/vae", "auto_map": {"AutoModel": "modeling_evil.Evil"}}
        (damaged_teacher / name).write_text(json.dumps(config))
    (damaged_teacher / "LICENSE").write_text("Terms, from /data/of/somebody/terms.txt.\n")
    description = replace(DESCRIPTION, training={"data": "/data/of/somebody/p.txt"}, config={"flags": {"a": "/b/c"}})
    folder = save_student_pipeline(student, damaged_teacher, tmp_path / "student", description)
    for component in ("vae", "text_encoder", "tokenizer"):
        assert {path.name for path in (folder / component).iterdir()} == {
            path.name for path in (teacher / component).iterdir()
        }
    for path in folder.rglob("*"):
        held = path.read_bytes() if path.is_file() else b""
        assert not any(word in held for word in (b"somebody", b"private", b"auto_map", b"/b/c")), path
    assert json.loads((folder / "vae" / "config.json").read_text())["_name_or_path"] == "vae"
    copied = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert tensors.keys() == copied.keys() and all(torch.equal(tensors[name], copied[name]) for name in tensors)
    assert "| data | p.txt |" in (folder / "README.md").read_text()


def test_variants_lie_beside_the_float32_weights_and_load_in_their_dtype(student, teacher, exported, tmp_path):
    folder = save_student_pipeline(student, teacher, tmp_path / "both", DESCRIPTION, variants=("fp16", "bf16"))
    before = {path.relative_to(exported): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    after = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    described = {Path("README.md"), Path("training.json"), Path(MARKER)}
    assert all(after[path] == content for path, content in before.items() if path not in described)
    added = {f"{path.parent}/{path.name}" for path in after.keys() - before.keys()}
    assert added == {
        f"{component}/{stem}.{variant}.safetensors"
        for variant in VARIANTS
        for component, stem in (
            ("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")
        )
    }  # fmt: skip

    for variant, dtype in {None: torch.float32, **VARIANTS}.items():
        pipeline = DiffusionPipeline.from_pretrained(folder, variant=variant, torch_dtype=dtype)
        for component in ("transformer", "vae", "text_encoder"):
            model = getattr(pipeline, component)
            assert {weight.dtype for weight in model.parameters()} == {dtype}, (variant, component)
            whole = next((folder / component).glob("*model.safetensors"))
            if variant is not None:
                copy = load_file(whole.with_suffix(f".{variant}.safetensors"))
                for name, weight in load_file(whole).items():
                    assert torch.equal(copy[name], weight.to(dtype)), name
    assert {weight.dtype for weight in DiffusionPipeline.from_pretrained(folder).vae.parameters()} == {torch.float32}


@pytest.mark.parametrize("shards", ["1GB", "5KB"])
def test_the_copies_of_half_precision_weights_have_ordinary_names(student, tmp_path, shards):
    half, teacher = tiny_sana_pipeline().to(torch.bfloat16), tmp_path / "teacher"
    half.save_pretrained(teacher, variant="bf16", max_shard_size=shards)
    with pytest.raises(ValueError, match="give `variant` bf16"):
        save_student_pipeline(student, teacher, tmp_path / "student", DESCRIPTION)
    folder = save_student_pipeline(student, teacher, tmp_path / "student", DESCRIPTION, teacher_variant="bf16")
    assert not [path for path in folder.rglob("*") if "bf16" in path.name]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for component in ("vae", "text_encoder"):
        for key, weight in getattr(half, component).state_dict().items():
            assert torch.equal(getattr(pipeline, component).state_dict()[key], weight.float()), (component, key)
    save_student_pipeline(student, teacher, tmp_path / "fp16", DESCRIPTION, variants=("fp16",), teacher_variant="bf16")
    DiffusionPipeline.from_pretrained(tmp_path / "fp16", variant="fp16", torch_dtype=torch.float16)


def test_an_export_over_an_earlier_students_leaves_none_of_its_figures_and_pictures(student, teacher, tmp_path):
    folder, picture = tmp_path / "student", Image.new("RGB", (8, 8))
    samples = [Sample("a dog", steps, picture) for steps in (1, 2)]
    config = {"flags": {"seed": 1}}
    described = replace(DESCRIPTION, config=config)
    save_student_pipeline(student, teacher, folder, replace(described, samples=samples))
    assert json.loads((folder / "training_config.json").read_text()) == config
    save_metrics(folder, [Measurement("student", 1, {"FD": 1.0})], dataset="12 prompts", command="python measure.py")
    with OwnedFolder(folder).written("grid.png") as partial:
        picture.save(partial, format="PNG")
    save_student_pipeline(student, teacher, folder, replace(described, samples=samples[:1]))
    assert [path.name for path in (folder / "images").iterdir()] == ["00.png"]
    save_student_pipeline(student, teacher, folder, described)
    assert not {"images", "grid.png", "metrics.json"} & {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_an_interrupted_export_is_no_pipeline_and_the_next_one_is_whole(
    moment, student, teacher, tmp_path, monkeypatch
):
    output_dir = tmp_path / "student"
    save_student_pipeline(student, teacher, output_dir, DESCRIPTION)
    (output_dir / "checkpoint-1").mkdir()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(export, "render_model_card", fail)
        else:
            rename = Path.replace
            patch.setattr(Path, "replace", lambda path, to: fail() if to.parent.name == "vae" else rename(path, to))
        with pytest.raises(OSError, match="disk full"):
            save_student_pipeline(student, teacher, output_dir, StudentDescription(PROMPT, {"steps": 8}))
    # an export that failed before it touched the folder leaves the earlier one; after that there is none
    assert (output_dir / "model_index.json").exists() == (moment == "writing")

    save_student_pipeline(student, teacher, output_dir, StudentDescription(PROMPT, {"steps": 9}))
    SanaTBCMPipeline.from_pretrained(output_dir)
    assert json.loads((output_dir / "training.json").read_text())["training"] == {"steps": 9}
    assert (output_dir / "checkpoint-1").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert not [*output_dir.glob("*partial*")]


@pytest.mark.parametrize("prefix", ["", "a card without metadata\n"])
def test_licence_is_never_invented(prefix, student, damaged_teacher, tmp_path):
    if prefix:
        (damaged_teacher / "README.md").write_text(prefix)
    folder = save_student_pipeline(student, damaged_teacher, tmp_path / "student", DESCRIPTION)
    assert "license" not in (folder / "README.md").read_text().split("---")[1]
    save_student_pipeline(student, damaged_teacher, folder, replace(DESCRIPTION, license="mit"))
    assert ModelCard.load(folder / "README.md").data.license == "mit"


def test_licence_is_the_teachers_and_a_teacher_of_the_hub_is_the_base_model(student, teacher, tmp_path, monkeypatch):
    snapshot = Path(shutil.copytree(teacher, tmp_path / "snapshot"))
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: nsclv2\n---\n# Teacher\n")
    (snapshot / "NOTICE").write_text("made of")
    monkeypatch.setattr(pipeline_folder, "snapshot_download", lambda repo_id, **patterns: str(snapshot))
    folder = save_student_pipeline(
        student,
        "someone/teacher",
        tmp_path / "student",
        replace(DESCRIPTION, resolution=128, model_id="me/student"),
    )
    assert (folder / "NOTICE").read_text() == "made of"
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "nsclv2")
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/teacher", "finetune")
    assert len(re.findall(r'from_pretrained\("me/student"\)', card.text)) == 2
    assert "height=128, width=128" in card.text


def test_wrong_arguments_are_refused_before_anything_is_written(student, teacher, tmp_path):
    with pytest.raises(ValueError, match="guidance_embeds=False"):
        save_student_pipeline(tiny_transformer(), teacher, tmp_path / "student", DESCRIPTION)
    with pytest.raises(ValueError, match="variants has 'int8': choose from fp16, bf16"):
        save_student_pipeline(student, teacher, tmp_path / "student", DESCRIPTION, variants=("fp16", "int8"))
    with pytest.raises(ValueError, match="the teacher's own folder"):
        save_student_pipeline(student, teacher, teacher, DESCRIPTION)
    assert not list(tmp_path.iterdir())
