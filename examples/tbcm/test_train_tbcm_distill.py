"""The training script as users start it, on a tiny teacher of real components."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, SanaTransformer2DModel
from safetensors.torch import load_file
from tiny import tiny_sana_pipeline, write_tiny_pipeline
from train_tbcm_distill import main, parse_args

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.checkpoints import list_checkpoints
from diffusers_tbcm.trigflow import make_student


SCRIPT = Path(__file__).with_name("train_tbcm_distill.py")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a dog\na violin\nthree little birds\n")
    return file


@pytest.fixture
def flags(teacher, prompts_file, tmp_path):
    """The flags of a short run, with changes."""

    def build(**changes):
        values = {
            "pretrained_model_name_or_path": teacher,
            "prompts_file": prompts_file,
            "output_dir": tmp_path / "run",
            "route_steps": 3,
            "max_train_steps": 2,
            "max_sequence_length": 16,
            "no-complex_human_instruction": True,
            "learning_rate": 1e-3,
            "tangent_warmup_steps": 2,
            "tangent_cooldown_start_step": 2,
            "tangent_cooldown_steps": 2,
            "report_to": "none",
            **changes,
        }
        arguments = []
        for name, value in values.items():
            if value is None or value is False:
                continue
            arguments.append(f"--{name}")
            if value is not True:
                arguments += [str(part) for part in (value if isinstance(value, list) else [value])]
        return arguments

    return build


def student_weights(folder):
    return load_file(Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors")


def test_launched_run_ends_in_a_pipeline_that_plain_diffusers_loads(flags, teacher, tmp_path):
    arguments = flags(report_to="tensorboard", validation_prompts=["a dog", "a cat"], validation_steps=2, use_ema=True)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(SCRIPT)]
    finished = subprocess.run([*launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert finished.returncode == 0, finished.stdout
    run = tmp_path / "run"
    assert type(DiffusionPipeline.from_pretrained(run)).__name__ == "SanaSprintPipeline"
    image = SanaTBCMPipeline.from_pretrained(run)("a dog", num_inference_steps=1, max_sequence_length=16).images[0]
    assert image.size == (64, 64)
    before = make_student(SanaTransformer2DModel.from_pretrained(teacher, subfolder="transformer")).state_dict()
    after = student_weights(run)
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert (run / "validation" / "step-2.png").exists() and list((run / "logs").rglob("events.*"))
    assert json.loads((run / "training_config.json").read_text())["route_steps"] == 3


def test_a_resumed_run_is_the_uninterrupted_one(flags, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    common = {"use_ema": True, "lr_scheduler": "cosine", "max_train_steps": 4, "checkpointing_steps": 2}
    main(parse_args(flags(output_dir=straight, **common)))
    main(parse_args(flags(output_dir=resumed, **common)))
    # What is left when the run is killed after step 2.
    (resumed / "model_index.json").unlink()
    last = list_checkpoints(resumed)[-1]
    (last / "checkpoint.json").unlink()
    main(parse_args(flags(output_dir=resumed, resume_from_checkpoint="latest", **common)))
    expected, actual = student_weights(straight), student_weights(resumed)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_accumulation_is_a_larger_batch(flags, tmp_path):
    main(parse_args(flags(output_dir=tmp_path / "batch", train_batch_size=2)))
    main(parse_args(flags(output_dir=tmp_path / "accumulated", gradient_accumulation_steps=2)))
    batch, accumulated = student_weights(tmp_path / "batch"), student_weights(tmp_path / "accumulated")
    for name in batch:
        # Adam divides by the root of tiny squares: rounding of the gradient shows at the scale of the learning rate.
        torch.testing.assert_close(accumulated[name], batch[name], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "came"},
        {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True, "tangent_resolution_invariant": True, "brightness_hard": True},
        {"sampling_scheme": "logit_normal", "brightness_threshold": 0, "tangent_cooldown_start_step": -1},
    ],
    ids=["came", "bf16", "options", "no filter"],
)
def test_options_run_and_stay_finite(flags, tmp_path, changes):
    main(parse_args(flags(**changes)))
    assert all(weight.isfinite().all() for weight in student_weights(tmp_path / "run").values())
    assert (tmp_path / "run" / "black_latent_64.safetensors").exists() == (changes.get("brightness_threshold") != 0)


def test_prompts_from_a_data_set(flags, tmp_path):
    file = tmp_path / "captions.csv"
    file.write_text("caption,n\na dog,1\na cat,2\n")
    dataset = {"prompts_file": None, "dataset_name": file}
    with pytest.raises(ValueError, match="no column 'text'"):
        main(parse_args(flags(**dataset)))
    main(parse_args(flags(**dataset, caption_column="caption")))


def test_a_step_without_rows_changes_nothing_and_says_so(flags, teacher, tmp_path, caplog):
    main(parse_args(flags(brightness_threshold=1e9, brightness_hard=True)))
    before = make_student(SanaTransformer2DModel.from_pretrained(teacher, subfolder="transformer")).state_dict()
    after = student_weights(tmp_path / "run")
    kept = [name for name in before if "guidance_embedder.linear_1" not in name]  # random where a student is made
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert sum("dropped every prompt" in message for message in caplog.messages) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"route_steps": 1}, "--route_steps is 1"),
        ({"guidance_scales": [4.5, 0]}, r"--guidance_scales is \[4.5, 0.0\]"),
        ({"max_train_steps": 0}, "--max_train_steps is 0"),
        ({"prompts_file": None}, "either --prompts_file or --dataset_name"),
        ({"tangent_final_ratio": 1.5}, "`final_ratio` is 1.5"),
        ({"brightness_threshold": -1}, "--brightness_threshold is -1"),
        ({"ema_decay": 1}, "--ema_decay is 1"),
        ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit is 0"),
    ],
)
def test_bad_flags_end_with_their_name(flags, changes, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags(**changes))
    captured = capsys.readouterr().err
    assert re.search(message, captured), captured


def test_another_run_is_not_overwritten(flags, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(SystemExit):
        parse_args(flags())
    assert "holds another run" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        main(parse_args(flags(resume_from_checkpoint="latest")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "no pipeline folder"),
        (lambda folder: (folder / "vae").rename(folder / "av"), "lacks its vae"),
        (
            lambda folder: (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
            "no Sana pipeline",
        ),
    ],
)
def test_a_folder_that_is_no_teacher_is_refused(flags, tmp_path, damage, message):
    folder = write_tiny_pipeline(tmp_path / "teacher")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        main(parse_args(flags(pretrained_model_name_or_path=folder)))


@pytest.mark.parametrize("resolution", [0, 20, -64])
def test_a_resolution_that_the_autoencoder_does_not_divide_is_refused(flags, resolution):
    with pytest.raises(ValueError, match=f"--resolution is {resolution}: it has to be a positive multiple of 8"):
        main(parse_args(flags(resolution=resolution)))


def test_a_teacher_in_scaled_time_is_warned_of_and_marks_its_student(flags, tmp_path, caplog):
    tiny_sana_pipeline(timestep_scale=1000.0).save_pretrained(tmp_path / "teacher")
    arguments = flags(pretrained_model_name_or_path=tmp_path / "teacher")
    main(parse_args(arguments))
    assert any("multiplied by timestep_scale=1000" in message for message in caplog.messages)
    with pytest.raises(ValueError, match=r"timestep_scale` is 1000"):
        SanaTBCMPipeline.from_pretrained(tmp_path / "run")("a dog")
    with pytest.raises(ValueError, match="--validation_prompts cannot be drawn"):
        main(parse_args([*arguments, "--validation_prompts", "a dog", "--resume_from_checkpoint", "latest"]))
