"""Steps of CDM that are not finite, of the critic or of the student, and rollouts that are not."""

from dataclasses import replace

import pytest
import torch
from runs import metrics
from safetensors.torch import load_file
from tiny import student_weights

from diffusers_tbcm.scripts import train_cdm
from diffusers_tbcm.scripts.train_cdm import main
from diffusers_tbcm.training.checkpoints import load_run_state


def poison(monkeypatch, name, calls, spoil):
    """Let a function of the script give what `spoil` makes of its result, in some of its calls, counted from 1."""
    function, made = getattr(train_cdm, name), []

    def spoilt(*args, **kwargs):
        made.append(function(*args, **kwargs))
        return spoil(made[-1]) if len(made) in calls else made[-1]

    monkeypatch.setattr(train_cdm, name, spoilt)


def nan(loss):
    return loss * float("nan")


def nan_losses(losses):
    return losses | {"dm": nan(losses["dm"])}


def spoil_all(rollouts):
    return replace(rollouts, pred_original_sample=rollouts.pred_original_sample * float("nan"))


def moved(run, step, file):
    before, after = (load_file(run / f"checkpoint-{number}" / file) for number in (step - 1, step))
    assert all(weight.isfinite().all() for weight in after.values())
    return any(not torch.equal(after[name], before[name]) for name in before)


def states(run, step, file):
    state = torch.load(run / f"checkpoint-{step}" / file, weights_only=True)["state"]
    return [value for entry in state.values() for value in entry.values()]


@pytest.mark.parametrize(("step", "student_moves"), [(3, False), (4, True)])
def test_a_critics_loss_that_is_not_a_number_skips_the_critics_update_alone(
    cdm_flags, tmp_path, monkeypatch, caplog, step, student_moves
):
    poison(monkeypatch, "critic_loss", {step}, nan)
    main(cdm_flags(use_ema=True, max_train_steps=6, critic_merge=0.5))
    run = tmp_path / "run"
    assert not moved(run, step, "model_1.safetensors")  # no step, and nothing of the student flows into it
    before, after = (states(run, number, "optimizer_1.bin") for number in (step - 1, step))
    assert all(map(torch.equal, before, after))
    assert moved(run, step, "model.safetensors") == student_moves
    assert moved(run, step + 1, "model_1.safetensors") and moved(run, 6, "model.safetensors")
    assert load_run_state(run / "checkpoint-6")["averaged_steps"] == {"student": 3}
    assert f"Step {step}: gradient norm nan of the critic, no update" in caplog.text
    assert [line["skipped_steps"] for line in metrics(run)] == [int(number >= step) for number in range(1, 7)]


def test_a_students_loss_that_is_not_a_number_skips_the_students_update_alone(
    cdm_flags, tmp_path, monkeypatch, caplog
):
    poison(monkeypatch, "student_losses", {2}, nan_losses)  # in step 4
    main(cdm_flags(use_ema=True, max_train_steps=6))
    run = tmp_path / "run"
    assert not moved(run, 4, "model.safetensors") and not moved(run, 4, "ema.safetensors")
    assert moved(run, 4, "model_1.safetensors") and moved(run, 6, "model.safetensors")
    before, after = (states(run, number, "optimizer.bin") for number in (3, 4))
    assert all(map(torch.equal, before, after))
    assert load_run_state(run / "checkpoint-6")["averaged_steps"] == {"student": 2}
    assert "Step 4: gradient norm nan of the student, no update" in caplog.text
    assert all(weight.isfinite().all() for weight in student_weights(run).values())


@pytest.mark.parametrize(("name", "spoil"), [("critic_loss", nan), ("record_rollout", spoil_all)])
def test_too_many_in_a_row_end_the_run_with_the_weights_from_before(cdm_flags, tmp_path, monkeypatch, name, spoil):
    poison(monkeypatch, name, {3, 4, 5}, spoil)
    with pytest.raises(RuntimeError, match=r"2 steps in a row .*max_skipped_steps.*in checkpoint-4; .*checkpoint-1"):
        main(cdm_flags(max_train_steps=9, max_skipped_steps=2))
    run = tmp_path / "run"
    assert not moved(run, 3, "model_1.safetensors") and not moved(run, 4, "model_1.safetensors")
    assert not (run / "model_index.json").exists()


def test_a_rollout_that_is_not_finite_drops_its_prompt_and_the_others_count(cdm_flags, tmp_path, monkeypatch, caplog):
    def spoil(rows):
        rows.pred_original_sample[0] = float("inf")
        return rows

    poison(monkeypatch, "record_rollout", {2}, spoil)
    main(cdm_flags(train_batch_size=4))
    run = tmp_path / "run"
    assert [line["filtered_share"] for line in metrics(run)] == [0, 1 / 8, 1 / 12, 1 / 16]
    assert moved(run, 2, "model.safetensors") and moved(run, 2, "model_1.safetensors")
    assert metrics(run)[-1]["skipped_steps"] == 0 and "not finite" not in caplog.text
