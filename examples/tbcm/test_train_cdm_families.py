"""CDM on teachers that are no Sana: trained, resumed, exported, and drawn by diffusers alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from runs import metrics
from safetensors.torch import load_file
from tiny import student_weights

from diffusers_tbcm.evaluation.drawing import call_options, draw_pictures, load_pipeline, numbered_generators
from diffusers_tbcm.export.selection import select_files
from diffusers_tbcm.pipeline_folder import copied_components
from diffusers_tbcm.scripts import train_cdm


LORA = {"rank": 2, "lora_alpha": 4}
ADAPTERS = "pytorch_lora_weights.safetensors"
# Runs the examples of both cards without this package, then draws with their arguments and a fixed seed.
PLAIN_DIFFUSERS = """
import re, sys
sys.modules["diffusers_tbcm"] = None  # importing it is an error
import numpy as np, torch

pictures = {}
for folder in ("run", "adapted/lora"):
    card = open(f"{folder}/README.md", encoding="utf-8").read()
    exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1])
    assert image.size == (64, 64), image.size
    generator = torch.Generator().manual_seed(3)
    drawn = pipe(prompt=prompt, sigmas=[1.0, 0.5], generator=generator, output_type="np", **options)
    pictures[folder.partition("/")[0]] = drawn.images
np.savez("pictures.npz", **pictures)
"""


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in ("sana", "flux")])
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def family_flags(family, cdm_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family.make_pipeline().save_pretrained("teacher")
    own = {
        "pretrained_model_name_or_path": "teacher", "resolution": 64, "max_sequence_length": family.tokens,
        "precompute_embeddings": "embeddings", "max_train_steps": 3, "learning_rate": 1e-2, "drift_steps": 2,
    }  # fmt: skip
    return lambda **changes: cdm_flags(**(own | changes))


def test_a_student_is_trained_resumed_exported_and_drawn_by_diffusers_alone(family, family_flags):
    # All weights, with everything on, stopped and resumed
    flags = {"gradient_checkpointing": True, "use_ema": True, "ema_decay": 0.5, "validation_prompts": "a dog"}
    train_cdm.main(family_flags(output_dir="run", **flags))
    train_cdm.main(family_flags(output_dir="broken", **flags, max_train_steps=2))
    train_cdm.main(family_flags(output_dir="broken", **flags, resume_from_checkpoint="latest"))
    for name in ("model.safetensors", "model_1.safetensors", "ema.safetensors"):
        expected, found = (load_file(Path(run) / "checkpoint-3" / name) for run in ("run", "broken"))
        assert len(expected) > 20 and all(torch.equal(found[key], expected[key]) for key in expected)
    trained, before = student_weights("run"), student_weights("teacher")
    assert trained.keys() == before.keys() and any(not torch.equal(trained[key], before[key]) for key in before)
    assert {"ca_loss", "dm_loss", "cdm_loss"} <= metrics(Path("run"))[1].keys()
    index, teacher = (json.loads(Path(name, "model_index.json").read_text()) for name in ("run", "teacher"))
    assert index["_class_name"] == teacher["_class_name"] == family.backbone.PIPELINE_CLASS.__name__
    assert {path.name for path in Path("run").iterdir()} >= {"transformer", *copied_components(Path("teacher"))}

    # Adapters, with a critic that is told the time, and merged
    train_cdm.main(family_flags(output_dir="adapted", **LORA, timed_critic=True, merge_lora=True))
    assert all(".lora_" in name for name in load_file(Path("adapted", "lora", ADAPTERS)))

    for folder in ("run", "adapted", "adapted/lora"):
        assert {"README.md", "training.json"} <= select_files(Path(folder)).files.keys()
        card = Path(folder, "README.md").read_text()
        assert re.search(rf"^- {family.backbone.TAG}$", card, re.MULTILINE) and "Sana" not in card
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS], check=True, timeout=600)
    with np.load("pictures.npz") as pictures:
        for folder in ("run", "adapted"):
            pipeline = load_pipeline(folder, device="cpu")
            generators = [torch.Generator().manual_seed(3)]
            (picture,) = draw_pictures(
                pipeline, ["a dog"], generators, num_inference_steps=2, **call_options(pipeline)
            )
            drawn = np.asarray(picture, dtype=np.float32) / 255
            # Rounded to 8 bits, and the adapters apart from the weights that they were merged into here
            np.testing.assert_allclose(pictures[folder][0], drawn, rtol=0, atol=0.6 / 255)
    with_adapters = load_pipeline("teacher", lora="adapted/lora", device="cpu")
    (same,) = draw_pictures(
        with_adapters, ["a dog"], numbered_generators(0), num_inference_steps=1, **call_options(with_adapters)
    )
    (merged,) = draw_pictures(
        pipeline, ["a dog"], numbered_generators(0), num_inference_steps=1, **call_options(pipeline)
    )
    assert np.abs(np.asarray(same, dtype=int) - np.asarray(merged, dtype=int)).max() <= 1


def test_a_dry_run_leaves_nothing(family_flags, tmp_path):
    there = {path.name for path in tmp_path.iterdir()}
    train_cdm.main(family_flags(dry_run=True, precompute_embeddings=None, mixed_precision="bf16"))
    assert {path.name for path in tmp_path.iterdir()} == there


def test_a_teacher_without_an_unconditional_branch_is_refused_before_its_weights_are_loaded(
    cdm_flags, tmp_path, monkeypatch
):
    FAMILIES["flux"].make_pipeline().save_pretrained(tmp_path / "teacher")

    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(FAMILIES["flux"].backbone, "load_transformer", load)
    with pytest.raises(ValueError, match="names a teacher that embeds guidance: it has no unconditional branch"):
        train_cdm.main(cdm_flags(pretrained_model_name_or_path=tmp_path / "teacher", output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
