"""CDM with `--rank`: student and critic are two adapters on the teacher's own weights, and nothing leaks between."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from runs import fork_two, largest_relative_difference
from safetensors.torch import load_file
from tiny import LATENT_CHANNELS, TEXT_HIDDEN_SIZE, student_weights

from diffusers_tbcm.backbones import sana
from diffusers_tbcm.export.selection import select_files
from diffusers_tbcm.scripts.train_cdm import main
from diffusers_tbcm.training.flow_distillation import FlowDistillation
from diffusers_tbcm.training.run import Run


LORA = {"rank": 2, "lora_alpha": 4}
ADAPTERS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def roles(monkeypatch):
    """The networks of a run, by name, once they are made."""
    found, add = {}, FlowDistillation.add_networks

    def keep(self, **options):
        student, critic = add(self, **options)
        found.update(teacher=self.teacher, student=student, critic=critic)
        return student, critic

    monkeypatch.setattr(FlowDistillation, "add_networks", keep)
    return found


@torch.no_grad()
def outputs(roles, precision):
    """What each network makes of the same noise and prompt."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, LATENT_CHANNELS, 8, 8, generator=generator)
    embeds = torch.randn(2, 4, TEXT_HIDDEN_SIZE, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return {name: network(noise, torch.tensor([0.3, 0.9]), embeds) for name, network in roles.items()}


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "mixed_precision": "bf16"}])
def test_an_update_changes_its_own_network_and_no_other(cdm_flags, teacher, roles, monkeypatch, changes):
    update, moved, start = Run.update, [], {}
    precision = changes.get("mixed_precision", "no")

    def watch(self, *models, **options):
        before = outputs(roles, precision)
        start.update({name: start.get(name, output) for name, output in before.items()})
        update(self, *models, **options)
        after = outputs(roles, precision)
        moved.append({name for name in roles if not torch.equal(before[name], after[name])})

    monkeypatch.setattr(Run, "update", watch)
    main(cdm_flags(**LORA, **changes, validation_prompts="a dog", validation_steps=1))
    assert torch.equal(start["student"], start["teacher"]) and torch.equal(start["critic"], start["teacher"])
    critic, student = {"critic"}, {"student"}
    assert moved == [critic, critic, student, critic, critic, student]
    assert torch.equal(outputs(roles, precision)["teacher"], start["teacher"])  # after validation and export, too
    if precision == "no":
        before = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
        now = roles["teacher"].transformer.state_dict()
        assert all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_weights_are_in_memory_once(cdm_flags, roles, precision):
    def storages(of=("teacher", "student", "critic")):
        weights = [weight for name in of for weight in roles[name].parameters()]
        return {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}

    main(cdm_flags(**LORA, mixed_precision=precision, max_train_steps=2))
    trained = {name: [w for w in roles[name].parameters() if w.requires_grad] for name in ("student", "critic")}
    assert all(weight.dtype == torch.float32 for weights in trained.values() for weight in weights)
    adapters = sum(weight.nbytes for weights in trained.values() for weight in weights)
    once = sum(storages(["teacher"]).values())
    assert sum(storages().values()) == once + adapters
    base = {weight.dtype for name in roles for weight in roles[name].parameters() if not weight.requires_grad}
    assert base == {torch.bfloat16 if precision == "bf16" else torch.float32}
    main(cdm_flags(output_dir="full", dry_run=True, mixed_precision=precision))
    assert sum(storages().values()) >= 3 * once  # what training all weights holds


def test_adapters_are_merged_into_the_teachers_own_weights_and_not_into_rounded_ones(cdm_flags, teacher, tmp_path):
    main(cdm_flags(**LORA, merge_lora=True, mixed_precision="bf16", lora_target_modules=["attn1.to_q"]))
    before, merged = student_weights(teacher), student_weights(tmp_path / "run")
    kept = [name for name in before if "attn1.to_q" not in name]
    assert [name for name in kept if not torch.equal(merged[name], before[name])] == []


@pytest.mark.parametrize("stop", [3, 2], ids=["after a critic's step", "after a student's step"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(cdm_flags, tmp_path, stop):
    flags = {**LORA, "use_ema": True, "ema_decay": 0.5}
    main(cdm_flags(**flags))
    main(cdm_flags(**flags, output_dir=tmp_path / "broken", max_train_steps=stop, validation_prompts="a dog"))
    main(cdm_flags(**flags, output_dir=tmp_path / "broken", resume_from_checkpoint="latest"))
    whole, broken = (tmp_path / name / "checkpoint-4" for name in ("run", "broken"))
    for name in ("model.safetensors", "model_1.safetensors", "ema.safetensors"):
        expected, actual = load_file(whole / name), load_file(broken / name)
        assert len(expected) > 20 and all(".lora_" in key for key in expected)  # no frozen weight is in a checkpoint
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
    exported, again = (load_file(tmp_path / name / "lora" / ADAPTERS) for name in ("run", "broken"))
    assert all(torch.equal(again[name], weight) for name, weight in exported.items())
    # What is exported is the student's average, of which the critic is no part.
    average = load_file(whole / "ema.safetensors")
    assert {name.partition(".")[0] for name in average} == {"student"}
    expected = {name.replace("student.", "transformer.").replace(".default", ""): w for name, w in average.items()}
    assert exported.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in exported.items())


def test_two_processes_and_two_micro_steps_give_the_weights_of_one(cdm_flags, tmp_path):
    shared = {**LORA, "merge_lora": True, "learning_rate": 5e-5, "critic_learning_rate": 5e-5}
    main(cdm_flags(output_dir=tmp_path / "one", train_batch_size=4, **shared))
    main(cdm_flags(output_dir=tmp_path / "cut", train_batch_size=2, gradient_accumulation_steps=2, **shared))
    fork_two(main, cdm_flags(output_dir=tmp_path / "two", **shared))
    one, adapters = student_weights(tmp_path / "one"), load_file(tmp_path / "one" / "lora" / ADAPTERS)
    for other in ("cut", "two"):
        assert largest_relative_difference(student_weights(tmp_path / other), one) < 1e-5
        others = load_file(tmp_path / other / "lora" / ADAPTERS)
        up = [(others[name] - weight, weight) for name, weight in adapters.items() if ".lora_B." in name]  # 0 at first
        difference, moved = (torch.cat([part.flatten() for part in parts]) for parts in zip(*up, strict=True))
        # AdamW divides by the gradient's size: where that is near zero, rounding is a step of its own
        assert moved.any() and difference.norm() < 1e-3 * moved.norm()


def test_what_is_shown_and_exported_on_the_way_changes_nothing(cdm_flags, tmp_path):
    flags = {**LORA, "mixed_precision": "bf16", "max_train_steps": 3}
    main(cdm_flags(**flags, output_dir=tmp_path / "silent"))
    main(cdm_flags(**flags, validation_prompts="a dog", validation_steps=1))
    for name in ("model.safetensors", "model_1.safetensors"):
        expected, actual = (load_file(tmp_path / run / "checkpoint-3" / name) for run in ("silent", "run"))
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


# Runs the card's example without this package, then draws with its arguments and a fixed seed.
PLAIN_DIFFUSERS = """
import re, sys
sys.modules["diffusers_tbcm"] = None  # importing it is an error
import numpy as np, torch

card = open("run/lora/README.md", encoding="utf-8").read()
exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1])
assert image.size == (64, 64), image.size
pictures = {}
for fused in ("apart", "fused"):
    for sigmas in ([1.0], [1.0, 0.75, 0.5, 0.25]):
        drawn = pipe(prompt, sigmas=sigmas, generator=torch.Generator().manual_seed(3), output_type="np", **options)
        pictures[f"{fused} {len(sigmas)}"] = drawn.images
    pipe.fuse_lora()
np.savez("pictures.npz", **pictures)
"""


@pytest.mark.parametrize("time_scale", [1.0, 0.001], ids=["plain time", "dense time"])
def test_the_teachers_stock_pipeline_draws_with_the_adapters_what_the_merged_student_draws(
    cdm_flags, teacher, tmp_path, monkeypatch, time_scale
):
    monkeypatch.setattr(sana, "infer_timestep_scale", lambda transformer, text: 1000 * time_scale)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "teacher")
    rates = {"learning_rate": 3e-2, "critic_learning_rate": 1e-2}
    main(cdm_flags(**LORA, **rates, merge_lora=True, flow_shift=2.0, pretrained_model_name_or_path="teacher"))
    adapter = json.loads(Path("run/lora/training.json").read_text())["adapter"]
    assert adapter == {
        "pipeline": "SanaPipeline",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "shift": 2.0,
        "stochastic_sampling": False,
        "timestep_scale": time_scale,
        "call_options": {
            "guidance_scale": 1.0, "complex_human_instruction": None, "max_sequence_length": 16, "height": 64,
            "width": 64,
        },
    }  # fmt: skip
    card = Path("run/lora/README.md").read_text()
    assert "arxiv.org/abs/2605.06376" in card and "LoRA of rank 2" in card and "SanaTBCM" not in card
    selection = select_files(tmp_path / "run" / "lora")
    assert selection.files.keys() == {ADAPTERS, "README.md", "training.json", "training_config.json"}
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS], check=True, timeout=600)

    merged = DiffusionPipeline.from_pretrained("run")
    merged.set_progress_bar_config(disable=True)
    sizes = {"height": 64, "width": 64, "use_resolution_binning": False, **adapter["call_options"]}

    def draw(sigmas):
        generator = torch.Generator().manual_seed(3)
        return merged("a dog", sigmas=sigmas, generator=generator, output_type="np", **sizes).images

    with np.load("pictures.npz") as pictures:
        for sigmas in ([1.0], [1.0, 0.75, 0.5, 0.25]):
            expected = draw(sigmas)
            for way in ("apart", "fused"):  # float32 sums in another order, through the steps; pictures in [0, 1]
                np.testing.assert_allclose(pictures[f"{way} {len(sigmas)}"], expected, rtol=0, atol=1e-4)
            merged.transformer.load_state_dict(load_file("teacher/transformer/diffusion_pytorch_model.safetensors"))
            assert np.abs(draw(sigmas) - expected).max() > 1e-2  # the teacher's picture is another one
            merged.transformer.load_state_dict(student_weights("run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_target_modules": ["to_q", "to_z"]}, "`lora_target_modules`: .*'to_z', but no linear or convolution"),
        ({"lora_target_modules": ["attn1"]}, "`lora_target_modules`: .*'attn1', but no linear or convolution layer"),
    ],
)
def test_targets_that_the_teacher_lacks_are_named(cdm_flags, changes, message):
    with pytest.raises(ValueError, match=message):
        main(cdm_flags(**LORA, **changes))


def test_chosen_targets_alone_are_adapted(cdm_flags, tmp_path):
    main(cdm_flags(**LORA, lora_target_modules=["attn1.to_q"], max_train_steps=2))
    found = load_file(tmp_path / "run" / "lora" / ADAPTERS)
    assert found and all(".attn1.to_q.lora_" in name for name in found)


def test_a_dry_run_leaves_nothing(cdm_flags, tmp_path, capsys):
    main(cdm_flags(**LORA, merge_lora=True, dry_run=True, validation_prompts="a dog"))
    assert list(tmp_path.iterdir()) == [] and "Adapters for" not in capsys.readouterr().out
