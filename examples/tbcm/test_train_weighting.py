"""The weight of the consistency loss in the training scripts: with and without a trained head."""

import json
import logging

import pytest
import torch
from runs import assert_same_state, fork_two, largest_relative_difference, metrics
from safetensors.torch import load_file
from tiny import student_weights

from diffusers_tbcm.loss import LOSS_WEIGHTINGS
from diffusers_tbcm.scripts import train_sana_sprint, train_scm
from diffusers_tbcm.scripts.train_tbcm_distill import main


HEADLESS = ("prior", "uniform")


@pytest.mark.parametrize("weighting", HEADLESS)
def test_without_a_head_a_run_resumes_bit_for_bit_and_with_another_weight_not_at_all(flags, tmp_path, weighting):
    arguments = flags(
        loss_weighting=weighting, max_train_steps=4, checkpointing_steps=2, use_ema=True, endpoint_warmup_steps=1
    )
    main(arguments)
    run = tmp_path / "run"
    assert not any("logvar" in name for name in load_file(run / "checkpoint-4" / "model.safetensors"))
    (run / "checkpoint-4").rename(run / "straight")
    straight = student_weights(run)
    resume = ["--resume_from_checkpoint", "latest"]
    for other in {"learned", *HEADLESS} - {weighting}:
        with pytest.raises(ValueError, match=f'`loss_weighting` "{weighting}", now "{other}"'):
            main([*flags(loss_weighting=other, max_train_steps=4), *resume])
    main([*arguments, *resume])
    assert_same_state(run / "checkpoint-4", run / "straight")
    resumed = student_weights(run)
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())
    assert f"| loss weighting | {weighting} |" in (run / "README.md").read_text()


def test_lora_without_a_head_trains_and_resumes(flags, tmp_path):
    arguments = flags(loss_weighting="uniform", rank=2, max_train_steps=2, checkpointing_steps=1, learning_rate=1e-2)
    main(arguments)
    run = tmp_path / "run"
    saved = load_file(run / "checkpoint-2" / "model.safetensors")
    assert all("lora" in name or "guidance_embedder" in name for name in saved)
    adapters = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    (run / "checkpoint-2" / "checkpoint.json").unlink()
    main([*arguments, "--resume_from_checkpoint", "latest"])
    again = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[name], value) for name, value in adapters.items())


@pytest.mark.parametrize("weighting", ["learned", "uniform"])
def test_weights_and_shares_are_the_same_however_a_step_is_divided(flags, tmp_path, weighting):
    def arguments(name, **changes):
        options = {"max_train_steps": 6, "logging_steps": 1, "learning_rate": 1e-4, "brightness_threshold": 6.0}
        return flags(loss_weighting=weighting, output_dir=tmp_path / name, **(options | changes))

    main(arguments("one", train_batch_size=4))
    main(arguments("sum", train_batch_size=1, gradient_accumulation_steps=4))  # some of them drop all their rows
    fork_two(main, arguments("two", train_batch_size=2))
    fork_two(main, arguments("sharded", train_batch_size=2, checkpointing_steps=6), sharded=True)
    expected, lines = student_weights(tmp_path / "one"), metrics(tmp_path / "one")
    assert 0.1 < lines[-1]["filtered_share"] < 0.9
    for name, tolerance in (("sum", 1e-5), ("two", 1e-5), ("sharded", 1e-4)):
        assert largest_relative_difference(student_weights(tmp_path / name), expected) < tolerance
        for found, line in zip(metrics(tmp_path / name), lines, strict=True):
            assert len(line["weight_shares"]) == 15 and sum(line["weight_shares"]) == pytest.approx(1)
            assert found["weight_shares"] == pytest.approx(line["weight_shares"], abs=1e-4)
            assert ("logvar_distance" in line) == (weighting == "learned")


@pytest.mark.parametrize("script", [train_scm, train_sana_sprint], ids=["sCM", "Sana-Sprint"])
def test_the_methods_on_pictures_take_the_same_weights(picture_flags, tmp_path, script):
    students, trains_head = {}, {}
    for weighting in LOSS_WEIGHTINGS:
        output_dir = tmp_path / weighting
        script.main(picture_flags(output_dir=output_dir, loss_weighting=weighting, logging_steps=1))
        students[weighting] = student_weights(output_dir)
        assert sum(metrics(output_dir)[-1]["weight_shares"]) == pytest.approx(1)
        saved = load_file(output_dir / "checkpoint-2" / "model.safetensors")
        trains_head[weighting] = any("logvar" in name for name in saved)
    assert trains_head == {"learned": True, "prior": False, "uniform": False}
    assert largest_relative_difference(students["uniform"], students["prior"]) > 1e-4


def test_the_paper_route_gives_a_uniform_loss_four_fifteenths_at_large_t(flags, tmp_path, caplog, capsys):
    with caplog.at_level(logging.WARNING):
        main(flags(loss_weighting="uniform", route_steps=16, max_train_steps=1))
        assert "has not converged" not in caplog.text
        main(flags(route_steps=16, max_train_steps=1, output_dir=tmp_path / "learned"))
    (uniform,), (learned,) = metrics(tmp_path / "run"), metrics(tmp_path / "learned")
    assert uniform["weight_share_large_t"] == pytest.approx(4 / 15)
    assert uniform["weight_share_small_t"] == pytest.approx(1 / 15)
    assert learned["weight_share_large_t"] < 0.02 < 0.3 < learned["weight_share_small_t"]
    assert "has not converged" in caplog.text
    caplog.clear()
    main(flags(dry_run=True, output_dir=tmp_path / "dry"))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"step"')]
    assert [len(line["weight_shares"]) for line in printed] == [15, 15] and "has not converged" not in caplog.text
