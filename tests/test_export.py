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
from safetensors.torch import load_file
from tiny import tiny_transformer, write_tiny_pipeline

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
