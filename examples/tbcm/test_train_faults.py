"""Whatever goes wrong while the training script runs, no finished work is lost and the weights stay right."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs import assert_same_state, metrics, run_until
from safetensors.torch import load_file, save_file
from tiny import student_weights, write_tiny_pipeline

from diffusers_tbcm.data.embeddings import PromptEncoder
from diffusers_tbcm.files import beside
from diffusers_tbcm.pipeline_folder import list_checkpoints
from diffusers_tbcm.scripts import train_tbcm_distill
from diffusers_tbcm.scripts.train_tbcm_distill import main
from diffusers_tbcm.training import consistency
from diffusers_tbcm.training.checkpoints import MANIFEST, load_run_state
from diffusers_tbcm.training.interruption import RESUMABLE_EXIT_CODE


def test_kill_9_then_sigterm_then_resume_gives_the_uninterrupted_run_bit_for_bit(flags, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    common = {
        "use_ema": True,
        "lr_scheduler": "cosine",
        "max_train_steps": 20,
        "checkpointing_steps": 5,
        "logging_steps": 1,
        "gradient_accumulation_steps": 2,
        "tangent_warmup_steps": 10,
        "tangent_cooldown_start_step": 12,
        "tangent_cooldown_steps": 6,
    }
    main(flags(output_dir=straight, **common))
    arguments = flags(output_dir=broken, **common)
    code, output = run_until(arguments, broken, 7, signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    assert [path.name for path in list_checkpoints(broken)] == ["checkpoint-5"]
    arguments += ["--resume_from_checkpoint", "latest"]
    code, output = run_until(arguments, broken, 8, signal.SIGTERM)
    assert code == RESUMABLE_EXIT_CODE and "--resume_from_checkpoint latest goes on" in output, output
    assert output.count(f"Resumed from {broken / 'checkpoint-5'} at step 5\n") == 1
    stopped = int(list_checkpoints(broken)[-1].name.removeprefix("checkpoint-"))
    assert 8 <= stopped < 20 and not (broken / "model_index.json").exists()
    main(arguments)
    assert_same_state(broken / "checkpoint-20", straight / "checkpoint-20")
    expected, actual = student_weights(straight), student_weights(broken)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert [line["step"] for line in metrics(broken)] == list(range(1, 21))


def test_sigint_writes_a_checkpoint_too(flags, tmp_path):
    arguments = flags(max_train_steps=1000, logging_steps=1)
    code, output = run_until(arguments, tmp_path / "run", 1, signal.SIGINT)
    assert code == RESUMABLE_EXIT_CODE and "Traceback" not in output, output
    assert len(list_checkpoints(tmp_path / "run")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_stops_at_once_and_the_same_command_goes_on(flags, tmp_path, monkeypatch, number):
    encode, arguments = PromptEncoder.encode, flags(precompute_embeddings=tmp_path / "embeddings")

    def interrupt(self, prompt):
        os.kill(os.getpid(), number)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(PromptEncoder, "encode", interrupt)
        started = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    assert ended.value.code == RESUMABLE_EXIT_CODE and time.monotonic() - started < 50
    assert not list((tmp_path / "embeddings").glob("*.safetensors")) and encode is PromptEncoder.encode
    main(arguments)
    assert student_weights(tmp_path / "run")


def test_kill_9_while_a_checkpoint_is_written_leaves_the_one_before(flags, tmp_path):
    run = tmp_path / "run"
    main(flags(checkpointing_steps=1))
    expected = student_weights(run)
    checkpoint = run / "checkpoint-2"
    (checkpoint / MANIFEST).unlink()
    checkpoint.rename(beside(checkpoint))
    (run / "model_index.json").unlink()
    main(flags(checkpointing_steps=1, resume_from_checkpoint="latest"))
    assert all(torch.equal(value, expected[name]) for name, value in student_weights(run).items())


@pytest.mark.parametrize("damage", ["cut short", "without its manifest"])
def test_a_torn_checkpoint_is_named_and_skipped(flags, tmp_path, caplog, damage):
    run = tmp_path / "run"
    main(flags(checkpointing_steps=1))
    expected = student_weights(run)
    if damage == "cut short":
        weights = run / "checkpoint-2" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        (run / "checkpoint-2" / MANIFEST).unlink()
    main(flags(checkpointing_steps=1, resume_from_checkpoint="latest"))
    assert any("checkpoint-2" in message and "one before" in message for message in caplog.messages)
    assert all(torch.equal(value, expected[name]) for name, value in student_weights(run).items())


def test_kill_9_while_the_student_is_exported_leaves_its_checkpoint(flags, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(consistency, "save_student_pipeline", killed)
        with pytest.raises(SystemExit):
            main(flags())
    assert not (tmp_path / "run" / "model_index.json").exists()
    main(flags(resume_from_checkpoint="latest"))
    assert student_weights(tmp_path / "run")


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(flags, tmp_path, monkeypatch, caplog):
    save_state, calls = Accelerator.save_state, []

    def full(self, output_dir, **kwargs):
        calls.append(output_dir)
        save_state(self, output_dir, **kwargs)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    main(flags(max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1))
    run = tmp_path / "run"
    assert "No space left on device" in caplog.text
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"] and len(calls) == 3


def test_metrics_that_cannot_be_written_are_a_warning(flags, tmp_path, monkeypatch, caplog):
    write = Path.open

    def refuse(self, mode="r", *args, **kwargs):
        if self.name == "metrics.jsonl" and mode == "a":
            raise PermissionError(errno.EACCES, "Permission denied")
        return write(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    main(flags(logging_steps=1))
    assert "could not be written" in caplog.text and student_weights(tmp_path / "run")


def test_a_tracker_that_is_lost_is_left_out(flags, tmp_path, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    def lost(self, values, step=None, **kwargs):
        raise ConnectionError("the tracker is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", lost)
    main(flags(report_to="tensorboard", logging_steps=1))
    assert caplog.text.count("the tracker is gone") == 1
    assert len(metrics(tmp_path / "run")) == 2 and student_weights(tmp_path / "run")


def poison(monkeypatch, steps):
    """Make the loss of some steps, counted from 1, not a number."""
    consistency_loss, calls = train_tbcm_distill.consistency_loss, []

    def loss(*args, **kwargs):
        calls.append(None)
        return consistency_loss(*args, **kwargs) * (float("nan") if len(calls) in steps else 1)

    monkeypatch.setattr(train_tbcm_distill, "consistency_loss", loss)


def test_a_loss_that_is_not_a_number_skips_its_step_and_names_its_prompts(flags, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, {2})
    main(flags(max_train_steps=3, checkpointing_steps=1, logging_steps=1, train_batch_size=2, use_ema=True))
    run = tmp_path / "run"
    assert load_run_state(run / "checkpoint-3")["averaged_steps"] == {"student": 2}
    assert any("Step 2: gradient norm nan" in message and "numbers [" in message for message in caplog.messages)
    assert [line["skipped_steps"] for line in metrics(run)] == [0, 1, 1]
    first, second, third = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3))
    assert all(torch.equal(second[name], first[name]) for name in first)
    assert any(not torch.equal(third[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in third.values())


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_weights_from_before(flags, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 3, 4, 5})
    with pytest.raises(RuntimeError, match=r"2 steps in a row .*max_skipped_steps.*checkpoint-4"):
        main(flags(max_train_steps=9, max_skipped_steps=2, checkpointing_steps=2))
    run = tmp_path / "run"
    good, last = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    assert all(torch.equal(last[name], good[name]) for name in good)
    assert not (run / "model_index.json").exists()


def test_a_torn_black_latent_is_made_again(flags, tmp_path):
    main(flags())
    cache = tmp_path / "run" / "black_latent_64.safetensors"
    whole = {name: latent.clone() for name, latent in load_file(cache).items()}  # the file is written over
    cache.write_bytes(cache.read_bytes()[:-8])
    main(flags(max_train_steps=3, resume_from_checkpoint="latest"))
    again = load_file(cache)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


def test_another_run_of_the_script_is_refused_and_the_finished_student_left_alone(flags, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text("quite another prompt\n")
    main(flags())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for changes, message in (
        ({"prompts_file": other}, "another prompts"),
        ({"route_steps": 5}, "`route_steps` 3, now 5"),
        ({"rank": 2}, "`rank` null, now 2"),
        ({"guidance_scales": [2.0]}, "`guidance_scales`"),
    ):
        with pytest.raises(ValueError, match=message):
            main(flags(resume_from_checkpoint="latest", max_train_steps=3, **changes))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_card_says_what_was_changed_on_the_way(flags, tmp_path):
    main(flags())
    main(
        flags(
            max_train_steps=3, resume_from_checkpoint="latest", learning_rate=1e-4, resume_with_changed="learning_rate"
        )
    )
    card = (tmp_path / "run" / "README.md").read_text()
    assert "learning_rate 0.001 until step 2, then 0.0001" in card and "lr 0.0001" in card
    assert [line["lr"] for line in metrics(tmp_path / "run")] == [1e-3, 1e-4]


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("transformer", "its weights are not all finite"),
        ("text_encoder", "its weights are not all finite, embed_tokens.weight of its text_encoder"),
    ],
)
def test_a_teacher_that_is_not_finite_is_refused(flags, tmp_path, component, message):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    (file,) = (teacher / component).glob("*.safetensors")
    weights = load_file(file)
    for weight in weights.values():
        weight.view(-1)[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        main(flags(pretrained_model_name_or_path=teacher))
    assert not (tmp_path / "run" / "model_index.json").exists()
