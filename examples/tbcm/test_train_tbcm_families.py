"""TBCM on teachers that are no Sana: prepared, trained, resumed, exported, and drawn by diffusers alone."""

import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from families import FAMILIES, tiny_z_image
from PIL import Image
from runs import metrics
from safetensors.torch import load_file
from tiny import student_weights

from diffusers_tbcm.__main__ import main as command_line
from diffusers_tbcm.backbones import find_backbone
from diffusers_tbcm.backbones.time_embedding import time_layers
from diffusers_tbcm.export.record import load_metrics
from diffusers_tbcm.export.selection import select_files
from diffusers_tbcm.pipeline_folder import copied_components
from diffusers_tbcm.scripts import (
    evaluate_student,
    prepare_teacher,
    train_dmd,
    train_lcm,
    train_sana_sprint,
    train_scm,
    train_tbcm_distill,
)
from examples.tbcm.conftest import arguments


NAMES = [name for name in FAMILIES if name != "sana"]
TEACHERS = dict.fromkeys(NAMES, "teacher") | {"sd3": "prepared"}  # what each is distilled from
PREPARED = [name for name in NAMES if name != "flux"]  # which has no unconditional branch
NOT_PREPARATIONS = dict.fromkeys(
    ("tangent_warmup_steps", "tangent_cooldown_start_step", "tangent_cooldown_steps"),
)  # flags
ADAPTERS = "pytorch_lora_weights.safetensors"
# Runs the examples of all cards without this package, then draws with their arguments and fixed noises.
PLAIN_DIFFUSERS = """
import os, re, sys
sys.modules["diffusers_tbcm"] = None  # importing it is an error
import numpy as np, torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete as stock

pictures = {}
root = os.getcwd()
for folder in sys.argv[1:]:
    name, _, student = folder.partition("/")
    os.chdir(f"{root}/{name}")  # the cards name students as in the run's place
    card = open(f"{student}/README.md", encoding="utf-8").read()
    exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1])
    assert image.size == (64, 64), image.size
    generator = torch.Generator().manual_seed(3)
    noise = lambda sample, *_, **__: torch.randn(getattr(sample, "shape", sample), generator=generator)
    stock.randn_tensor = torch.randn_like = noise  # the pipelines give their generator to the first noise alone
    sigmas = eval(re.search(r"sigmas=(\\[.*?\\])", card.split("image = ")[2])[1])
    drawn = pipe(prompt=prompt, sigmas=sigmas, generator=generator, output_type="np", **options)
    pictures[folder.replace("/", "-")] = drawn.images
np.savez(f"{root}/pictures.npz", **pictures)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture
def tbcm(root, flags, monkeypatch):
    """The flags of a family's short run."""
    monkeypatch.chdir(root)

    def family_flags(name, **changes):
        own = {
            "pretrained_model_name_or_path": f"{name}/{TEACHERS[name]}", "resolution": 64,
            "max_sequence_length": FAMILIES[name].tokens, "precompute_embeddings": f"{name}/embeddings",
            "max_train_steps": 3, "guidance_scales": 4.5, "learning_rate": 1e-2, "checkpointing_steps": 1,
            "logging_steps": 1,
        }  # fmt: skip
        return flags(**(own | changes))

    return family_flags


@pytest.fixture
def trained(root, tbcm):
    """Prepare and train a family's teacher, all weights and adapters, once."""

    def train(name):
        if not (root / name).is_dir():
            FAMILIES[name].make_pipeline().save_pretrained(root / name / "teacher")
            prepare = {
                "pretrained_model_name_or_path": f"{name}/teacher", "output_dir": f"{name}/prepared",
                "held_out_prompts": 2, "max_train_steps": 1, "validation_prompts": ["a dog", "an owl"],
                "learning_rate": 1e-4, **NOT_PREPARATIONS,
            }  # fmt: skip
            if name in PREPARED:
                prepare_teacher.main(tbcm(name, **prepare))
            full = {"gradient_checkpointing": True, "use_ema": True, "ema_decay": 0.5, "validation_prompts": "a dog"}
            train_tbcm_distill.main(tbcm(name, output_dir=f"{name}/run", **full))
            train_tbcm_distill.main(tbcm(name, output_dir=f"{name}/broken", **full, max_train_steps=2))
            again = {"resume_from_checkpoint": "latest"}
            train_tbcm_distill.main(tbcm(name, output_dir=f"{name}/broken", **full, **again))
            lora = {"rank": 2, "lora_alpha": 4, "merge_lora": True, "endpoint_warmup_steps": 1}
            train_tbcm_distill.main(tbcm(name, output_dir=f"{name}/adapted", **lora))
            AcceleratorState._reset_state(reset_partial_state=True)  # a test's own runs may have another precision
        return root / name

    return train


@pytest.mark.parametrize("name", NAMES)
def test_a_student_is_trained_resumed_and_exported(name, trained):
    folder, backbone = trained(name), FAMILIES[name].backbone
    run = folder / "run"
    for file in ("model.safetensors", "ema.safetensors"):
        expected, found = (load_file(folder / each / "checkpoint-3" / file) for each in ("run", "broken"))
        assert len(expected) > 20 and all(torch.equal(found[key], expected[key]) for key in expected)
    after, before = student_weights(run), student_weights(folder / TEACHERS[name])
    assert after.keys() == before.keys() and any(not torch.equal(after[key], before[key]) for key in before)
    assert {"error", "tangent_norm", "tangent_ratio"} <= metrics(run)[1].keys()
    index, stock = (json.loads((folder / each / "model_index.json").read_text()) for each in ("run", "teacher"))
    assert index["_class_name"] == stock["_class_name"] == backbone.PIPELINE_CLASS.__name__
    assert {path.name for path in run.iterdir()} >= {"transformer", *copied_components(folder / "teacher")}
    assert (run / "validation" / "step-3.png").is_file() and not (run / "pipeline.py").exists()
    scheduler = json.loads((run / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler" and scheduler["stochastic_sampling"] is True
    assert all(".lora_" in key for key in load_file(folder / "adapted" / "lora" / ADAPTERS))
    for each in (run, folder / "adapted", folder / "adapted" / "lora"):
        assert {"README.md", "training.json"} <= select_files(each).files.keys()
        card = (each / "README.md").read_text()
        scales = "4.5, 3.5 as `guidance_scale` of `ZImagePipeline`" if name == "z_image" else "4.5"
        for line in (f"- {backbone.TAG}", "- tbcm", f"| guidance scales | {scales} |"):
            assert re.search(rf"^{re.escape(line)}$", card, re.MULTILINE), line
        assert "CDM" not in card and "tang2025tbcm" in card and "Sana" not in card


@pytest.mark.parametrize("name", PREPARED)
def test_a_prepared_teacher_and_its_student_see_no_fast_sinusoid(name, trained, tbcm):
    folder, backbone = trained(name), FAMILIES[name].backbone
    load = partial(find_backbone(folder / "teacher").load_transformer)
    teacher, prepared = load(folder / "teacher"), load(folder / "prepared")
    assert not backbone.in_dense_time(teacher, backbone.DENSE_TIME_SCALE)
    assert backbone.in_dense_time(prepared, backbone.DENSE_TIME_SCALE)
    assert "dense-time" in (folder / "prepared" / "README.md").read_text()
    assert (folder / "prepared" / "validation" / "step-1.png").is_file()
    changes = {"pretrained_model_name_or_path": f"{name}/prepared", "output_dir": f"{name}/dense"}
    train_tbcm_distill.main(tbcm(name, **changes))
    student = load(folder / "dense")
    assert backbone.in_dense_time(student, backbone.DENSE_TIME_SCALE)
    embedders = (network.get_submodule(backbone.TIME_EMBEDDER) for network in (student, prepared))
    assert not torch.equal(*(time_layers(embedder)[0].weight for embedder in embedders))  # slow ones' are trained


def test_plain_diffusers_draws_what_we_draw(trained):
    folders = [f"{trained(name).name}/{each}" for name in NAMES for each in ("run", "adapted", "adapted/lora")]
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, *folders], check=True, timeout=600)
    with np.load("pictures.npz") as pictures:
        for folder in folders:
            name, model = folder.partition("/")[0], ["--model", folder]
            if folder.endswith("lora"):
                model = ["--model", f"{name}/{TEACHERS[name]}", "--lora", folder]
            command_line(
                ["generate", *model, "--prompt", "a dog", "--steps", "2", "--seed", "3", "--out", f"{name}.png"]
            )
            drawn = np.asarray(Image.open(f"{name}.png"), dtype=np.float32) / 255
            # Rounded to 8 bits, and the card's times to 6 digits
            np.testing.assert_allclose(pictures[folder.replace("/", "-")][0], drawn, rtol=0, atol=0.6 / 255)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("script", [train_scm, train_sana_sprint, train_lcm])
def test_the_methods_on_pictures_train_it_too(name, script, trained, picture_flags, root, monkeypatch):
    trained(name)
    monkeypatch.chdir(root)
    method = script.__name__.rpartition("_")[2]
    script.main(
        picture_flags(
            pretrained_model_name_or_path=f"{name}/{TEACHERS[name]}", output_dir=f"{name}/{method}", resolution=64,
            max_sequence_length=FAMILIES[name].tokens, latents_cache=f"{name}/latents", guidance_scales=4.5,
        )
    )  # fmt: skip
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics(root / name / method))
    card = (root / name / method / "README.md").read_text()
    assert "sigmas=[1.0, 0.608979]" in card and "on captioned pictures" in card


@pytest.mark.parametrize("name", NAMES)
def test_a_student_is_finished_by_distribution_matching(name, trained, tbcm):
    folder = trained(name)
    train_dmd.main(
        tbcm(
            name,
            student_model_name_or_path=f"{name}/run",
            output_dir=f"{name}/finished",
            student_every=2,
            **NOT_PREPARATIONS,
        )
    )
    assert {"critic_loss", "dm_loss", "endpoint_loss"} <= metrics(folder / "finished")[1].keys()
    after, before = student_weights(folder / "finished"), student_weights(folder / "run")
    assert after.keys() == before.keys() and any(not torch.equal(after[key], before[key]) for key in before)
    assert "sigmas=[1.0, 0.608979]" in (folder / "finished" / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_student_and_its_teacher_are_measured(name, trained, prompts_file, root):
    trained(name)
    evaluate_student.main(
        arguments(
            model=f"{name}/run", teacher=f"{name}/{TEACHERS[name]}", steps=[1, 2], teacher_steps=[2],
            num_images_per_prompt=2, prompts_file=prompts_file, output_dir=f"{name}/measured", debug=True,
        )
    )  # fmt: skip
    folder = root / name / "measured"
    rows = load_metrics(folder).measurements
    assert [(row.model, row.num_inference_steps) for row in rows] == [("teacher", 2), ("student", 1), ("student", 2)]
    assert {"diversity", "decisiveness"} <= rows[1].metrics.keys()
    for model, scale, guided in (("student-2", 1.0, {}), ("teacher-2", 4.5, FAMILIES[name].backbone.GUIDED_OPTIONS)):
        found = json.loads((folder / "pictures" / f"{model}-steps" / "settings.json").read_text())
        assert found.items() >= {"guidance_scale": scale, "height": 64, "instruction": False, **guided}.items()


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_distilled_is_refused(name, trained, tbcm):
    folder = trained(name)
    with pytest.raises(ValueError, match=r"`guidance_scales` is \[4.0, 5.0\]: .* learns one scale: give one"):
        train_tbcm_distill.main(tbcm(name, output_dir=f"{name}/several", guidance_scales=[4.0, 5.0]))
    with pytest.raises(ValueError, match="`intermediate_timesteps` is for students of Sana"):
        train_tbcm_distill.main(tbcm(name, output_dir=f"{name}/several", intermediate_timesteps=[1.0]))
    assert not (folder / "several").exists()
    if name == "sd3":
        with pytest.raises(ValueError, match=r"plain teacher, which sees time multiplied by 1000: .*prepare_teacher"):
            train_tbcm_distill.main(
                tbcm(name, output_dir=f"{name}/plain", pretrained_model_name_or_path=f"{name}/teacher")
            )
    prepared = name in PREPARED
    with pytest.raises(ValueError, match="in dense time already" if prepared else "only one with an unconditional"):
        prepare_teacher.main(
            tbcm(
                name,
                pretrained_model_name_or_path=f"{name}/{'prepared' if prepared else 'teacher'}",
                output_dir=f"{name}/two",
                **NOT_PREPARATIONS,
            )
        )


def test_a_conditioning_vector_may_be_smaller_than_the_hidden_states(tbcm, root):
    if "z_image" not in FAMILIES:
        pytest.skip("this diffusers has no Z-Image that is taken")
    wide = {"dim": 288, "n_heads": 18, "n_kv_heads": 18, "n_layers": 1}
    tiny_z_image(**wide).save_pretrained(root / "wide" / "teacher")
    changes = {"pretrained_model_name_or_path": "wide/teacher", "output_dir": "wide/run", "max_train_steps": 1}
    train_tbcm_distill.main(tbcm("z_image", **changes, precompute_embeddings=None))
    saved = load_file(root / "wide" / "run" / "checkpoint-1" / "model.safetensors")
    assert saved["logvar_head.linear.weight"].shape == (1, 256)


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_leaves_nothing(name, trained, tbcm, root):
    trained(name)
    there = {path.name for path in (root / name).iterdir()}
    train_tbcm_distill.main(
        tbcm(name, output_dir=f"{name}/dry", dry_run=True, precompute_embeddings=None, mixed_precision="bf16")
    )
    assert {path.name for path in (root / name).iterdir()} == there
