"""The training script as users start it, on a tiny teacher of real components."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline, SanaPipeline, SanaTransformer2DModel
from huggingface_hub import ModelCard
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from tiny import student_weights, tiny_sana_pipeline, write_tiny_pipeline

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.draws import draw_generator
from diffusers_tbcm.errors import Failure
from diffusers_tbcm.export.hub import MIN_HUB_VERSION
from diffusers_tbcm.owned import OwnedFolder
from diffusers_tbcm.rows import TrainingRows
from diffusers_tbcm.scheduling_tbcm import MAX_TIMESTEP, TIMESTEPS_BY_STEPS
from diffusers_tbcm.scripts import train_tbcm_distill
from diffusers_tbcm.scripts.train_tbcm_distill import TBCMSettings, main
from diffusers_tbcm.training import accelerators, run
from diffusers_tbcm.training.accelerators import check_launch
from diffusers_tbcm.training.consistency import ConsistencyDistillation
from diffusers_tbcm.training.settings import parse_settings


SCRIPT = Path(__file__).with_name("train_tbcm_distill.py")
NEEDS_PUSH = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version(MIN_HUB_VERSION), reason="pushing needs a newer huggingface_hub"
)


def test_launched_run_ends_in_a_pipeline_that_plain_diffusers_loads(flags, teacher, tmp_path):
    arguments = flags(
        report_to="tensorboard",
        validation_prompts=["a dog", "a cat"],
        validation_steps=2,
        use_ema=True,
        guidance_scales=[1.5, 2.0, 2.5],
    )
    trained = {"guidance_scale": 2.0, "max_sequence_length": 16, "complex_human_instruction": None}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(SCRIPT)]
    finished = subprocess.run([*launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count("3 prompts, after leaving out 0 empty and 0 duplicate ones\n") == 1
    run = tmp_path / "run"
    assert type(DiffusionPipeline.from_pretrained(run)).__name__ == "SanaSprintPipeline"
    pipeline = SanaTBCMPipeline.from_pretrained(run)
    image = pipeline("a dog", num_inference_steps=1).images[0]
    assert image.size == (64, 64) and pipeline.default_call_options == trained
    before = make_student(SanaTransformer2DModel.from_pretrained(teacher, subfolder="transformer")).state_dict()
    after = student_weights(run)
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert (run / "validation" / "step-2.png").exists() and list((run / "logs").rglob("events.*"))
    config = json.loads((run / "training_config.json").read_text())
    assert config["flags"]["route_steps"] == 3 and str(tmp_path) not in json.dumps(config)
    card = ModelCard.load(run / "README.md")
    assert [example["text"] for example in card.data.widget] == ["a dog"] * 3 + ["a cat"] * 3
    with Image.open(run / card.data.widget[0]["output"]["url"]) as picture:  # drawn with the weights that were saved
        generator = draw_generator(0, 0)
        drawn = pipeline("a dog", num_inference_steps=1, generator=generator).images[0]  # as it was distilled
        assert np.abs(np.asarray(picture, dtype=int) - np.asarray(drawn)).max() <= 1  # in a batch of two, and alone


def test_a_student_carries_how_it_is_drawn_and_another_way_takes_no_training(flags, tmp_path):
    run = tmp_path / "run"
    said = "where this checkpoint takes the noise that the student predicts"
    arguments = flags(validation_prompts=["a dog"])
    main(arguments)
    config, weights = TBCMScheduler.from_pretrained(run / "scheduler").config, student_weights(run)
    assert config.stochastic_sampling and config.timesteps_by_steps == TIMESTEPS_BY_STEPS
    assert said not in (run / "README.md").read_text()
    sampling = ["--no-stochastic_sampling", "--intermediate_timesteps", "1.0", "0.3", "0.1"]
    main([*arguments, "--resume_from_checkpoint", "latest", *sampling])
    config = TBCMScheduler.from_pretrained(run / "scheduler").config
    assert not config.stochastic_sampling
    assert config.timesteps_by_steps == {**TIMESTEPS_BY_STEPS, "4": [MAX_TIMESTEP, 1.0, 0.3, 0.1, 0.0]}
    assert said in (run / "README.md").read_text()
    assert all(torch.equal(weight, weights[name]) for name, weight in student_weights(run).items())
    with Image.open(run / ModelCard.load(run / "README.md").data.widget[-1]["output"]["url"]) as picture:
        pipeline = SanaTBCMPipeline.from_pretrained(run)
        drawn = pipeline("a dog", num_inference_steps=4, generator=draw_generator(0, 0)).images[0]
        assert np.abs(np.asarray(picture, dtype=int) - np.asarray(drawn)).max() <= 1


def test_accumulation_is_a_larger_batch(flags, tmp_path):
    main(flags(output_dir=tmp_path / "batch", train_batch_size=2))
    main(flags(output_dir=tmp_path / "accumulated", gradient_accumulation_steps=2))
    batch, accumulated = student_weights(tmp_path / "batch"), student_weights(tmp_path / "accumulated")
    for name in batch:
        # Adam divides by the root of tiny squares: rounding of the gradient shows at the scale of the learning rate.
        torch.testing.assert_close(accumulated[name], batch[name], rtol=1e-4, atol=2e-4)


def test_replay_records_every_few_steps_and_a_resumed_run_fills_its_buffer_again(flags, tmp_path, monkeypatch):
    recorded, record = [], train_tbcm_distill.record_trajectory
    monkeypatch.setattr(
        train_tbcm_distill, "record_trajectory", lambda *args, **kwargs: recorded.append(1) or record(*args, **kwargs)
    )
    replay = {"train_batch_size": 2, "replay_buffer_size": 6, "replay_steps": 3, "max_train_steps": 14}
    arguments = flags(checkpointing_steps=5, endpoint_warmup_steps=4, logging_steps=1, **replay)
    main(arguments)
    run = tmp_path / "run"
    assert len(recorded) == 5  # before steps 1, 4, 7, 10, 13
    assert json.loads((run / "training.json").read_text())["training"]["prompts seen"] == 10
    straight = student_weights(run)
    (run / "checkpoint-14" / "checkpoint.json").unlink()
    main([*arguments, "--resume_from_checkpoint", "latest"])
    assert len(recorded) == 5 + 3 + 1  # from step 10: the three that the buffer held, and the one before step 13
    resumed = student_weights(run)
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


def test_a_larger_teacher_batch_gives_the_same_rows_and_resumes_in_its_middle(flags, tmp_path, monkeypatch):
    batches, record = [], train_tbcm_distill.record_trajectory

    def remember(*args):
        batches.append(len(args[1]))
        return record(*args)

    monkeypatch.setattr(train_tbcm_distill, "record_trajectory", remember)
    main(flags(output_dir=tmp_path / "one", max_train_steps=5))
    assert batches == [1] * 5
    batches.clear()
    arguments = flags(max_train_steps=5, teacher_batch_size=2, checkpointing_steps=2)
    main(arguments)
    assert batches == [2] * 3
    straight, one = student_weights(tmp_path / "run"), student_weights(tmp_path / "one")
    for name in one:
        torch.testing.assert_close(straight[name], one[name], rtol=1e-4, atol=2e-4)  # Adam enlarges rounding
    batches.clear()
    (tmp_path / "run" / "checkpoint-5" / "checkpoint.json").unlink()
    main([*arguments, "--resume_from_checkpoint", "latest"])  # number 4, and 3, which the buffer held
    assert batches == [2] * 2
    resumed = student_weights(tmp_path / "run")
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


def test_gradients_are_the_mean_over_the_rows_that_the_filter_keeps(flags, tmp_path, monkeypatch):
    # The first prompt of two is the only one of a smaller batch: clipping and Adam hide a factor, the norm does not.
    once = {"max_train_steps": 1, "logging_steps": 1}
    main(flags(output_dir=tmp_path / "one", brightness_threshold=0, **once))
    monkeypatch.setattr(train_tbcm_distill, "keep_mask", lambda *args, **kwargs: torch.tensor([True, False]))
    main(flags(output_dir=tmp_path / "two", train_batch_size=2, **once))
    norms = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])["grad_norm"]
        for run in ("one", "two")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize(("wanted", "told"), [("norm", {}), ("l2", {"endpoint_loss_type": "l2"})])
def test_the_endpoint_warm_up_comes_first_and_aims_at_the_ends_of_the_rows_trajectories(
    flags, tmp_path, monkeypatch, wanted, told
):
    ends, aims = [], []
    record, loss = train_tbcm_distill.record_trajectory, train_tbcm_distill.endpoint_loss

    def remember_end(*args, **kwargs):
        trajectory = record(*args, **kwargs)
        ends.append(trajectory.pred_original_sample)
        return trajectory

    def remember_aim(trig_output, latents, pred_original_sample, timesteps, *, loss_type):
        aims.append(pred_original_sample)
        assert loss_type == wanted
        return loss(trig_output, latents, pred_original_sample, timesteps, loss_type=loss_type)

    monkeypatch.setattr(train_tbcm_distill, "record_trajectory", remember_end)
    monkeypatch.setattr(train_tbcm_distill, "endpoint_loss", remember_aim)
    main(flags(max_train_steps=41, endpoint_warmup_steps=40, logging_steps=1, learning_rate=3e-3, **told))
    assert len(ends) == 41 and len(aims) == 40
    assert all(torch.equal(aim, end.expand_as(aim)) for aim, end in zip(aims, ends[:-1], strict=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [("tangent_norm" in line) for line in lines] == [False] * 40 + [True]
    first, last = (sum(line["loss"] for line in lines[part]) for part in (slice(0, 6), slice(34, 40)))
    assert last < 0.8 * first
    assert f"| endpoint warm-up | 40 steps, {wanted} |" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("warm_up", [1, 2])
def test_a_run_of_the_warm_up_alone_says_so_and_its_card_claims_no_other_loss(flags, tmp_path, caplog, warm_up):
    main(flags(endpoint_warmup_steps=warm_up))
    warned = [message for message in caplog.messages if "no step is of the consistency loss" in message]
    card = (tmp_path / "run" / "README.md").read_text()
    assert ("| endpoint warm-up | all steps, norm; no consistency loss |" in card) == (warm_up == 2)
    assert len(warned) == (warm_up == 2)
    assert ("| tangent ratio |" in card) == ("| loss weighting |" in card) == (warm_up == 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "came"},
        {"mixed_precision": "bf16", "allow_tf32": True, "offload_text_encoder": True},
        {"gradient_checkpointing": True, "tangent_resolution_invariant": True, "brightness_hard": True},
        {"sampling_scheme": "logit_normal", "brightness_threshold": 0, "tangent_cooldown_start_step": -1},
    ],
    ids=["came", "bf16", "options", "no filter"],
)
def test_options_run_and_stay_finite(flags, tmp_path, changes):
    main(flags(**changes))
    assert all(weight.isfinite().all() for weight in student_weights(tmp_path / "run").values())
    assert (tmp_path / "run" / "black_latent_64.safetensors").exists() == (changes.get("brightness_threshold") != 0)


def test_prompts_from_a_data_set(flags, tmp_path):
    file = tmp_path / "captions.csv"
    file.write_text("caption,n\na dog,1\na cat,2\n")
    dataset = {"prompts_file": None, "dataset_name": file}
    with pytest.raises(ValueError, match="no column 'text'"):
        main(flags(**dataset))
    main(flags(**dataset, caption_column="caption"))


def test_precomputed_embeddings_give_the_same_weights_and_the_text_encoder_is_not_loaded_again(
    flags, tmp_path, monkeypatch
):
    main(flags(output_dir=tmp_path / "plain"))
    precomputed = {"precompute_embeddings": tmp_path / "embeddings", "validation_prompts": ["a cat"]}
    main(flags(output_dir=tmp_path / "first", **precomputed))

    def refuse(*args, **kwargs):
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(SanaPipeline, "from_pretrained", refuse)
    main(flags(output_dir=tmp_path / "second", **precomputed))
    plain, first, second = (student_weights(tmp_path / name) for name in ("plain", "first", "second"))
    assert all(torch.equal(first[name], value) and torch.equal(second[name], value) for name, value in plain.items())
    with pytest.raises(ValueError, match="max_sequence_length"):
        main(flags(output_dir=tmp_path / "third", max_sequence_length=8, **precomputed))


def test_lora_adapters_draw_what_the_merged_pipeline_draws_and_resume(flags, teacher, tmp_path):
    lora = {"rank": 2, "merge_lora": True, "export_variants": ["bf16"], "validation_prompts": ["a dog"]}
    arguments = flags(**lora, use_ema=True, ema_decay=0.5, learning_rate=1e-2, checkpointing_steps=1)
    main(arguments)
    run = tmp_path / "run"
    assert (run / "transformer" / "diffusion_pytorch_model.bf16.safetensors").exists()
    cards = [ModelCard.load(folder / "README.md") for folder in (run, run / "lora")]
    assert ["lora" in card.data.tags for card in cards] == [False, True]
    assert [len(card.data.widget) for card in cards] == [3, 3] and 'load_lora_weights("run/lora")' in cards[1].text
    assert (run / "lora" / "training_config.json").read_bytes() == (run / "training_config.json").read_bytes()
    merged = SanaTBCMPipeline.from_pretrained(run)
    stock = SanaPipeline.from_pretrained(teacher)
    adapted = SanaTBCMPipeline(stock.tokenizer, stock.text_encoder, stock.vae, stock.transformer, merged.scheduler)
    adapted.load_lora_weights(run / "lora")
    options = {"num_inference_steps": 1, "max_sequence_length": 16, "output_type": "pt"}
    pictures = []
    for pipeline in (merged, adapted):
        pictures.append(pipeline("a dog", generator=torch.Generator().manual_seed(0), **options).images)
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-5, rtol=0)  # sums in another order
    before = make_student(stock.transformer).state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in merged.transformer.state_dict().items())
    saved = load_file(run / "checkpoint-2" / "model.safetensors")
    assert all("lora" in name or "guidance_embedder" in name or "logvar" in name for name in saved)
    adapters = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    (run / "checkpoint-2" / "checkpoint.json").unlink()
    main([*arguments, "--resume_from_checkpoint", "latest"])
    again = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[name], value) for name, value in adapters.items())


def test_adapters_are_merged_into_the_teachers_own_weights_and_not_into_rounded_ones(flags, teacher, tmp_path):
    main(flags(rank=2, merge_lora=True, mixed_precision="bf16", lora_target_modules=["attn1.to_q"]))
    before = make_student(SanaTransformer2DModel.from_pretrained(teacher, subfolder="transformer")).state_dict()
    merged = student_weights(tmp_path / "run")
    kept = [name for name in before if "guidance_embedder" not in name and "attn1.to_q" not in name]
    assert [name for name in kept if not torch.equal(merged[name], before[name])] == []
    assert any(not torch.equal(before[name].bfloat16().float(), before[name]) for name in kept)


def test_a_dry_run_does_everything_once_and_leaves_nothing(flags, tmp_path, capsys):
    main(flags(dry_run=True, validation_prompts=["a dog"], use_ema=True, max_train_steps=10_000))
    printed = capsys.readouterr().out
    assert '"step": 1' in printed and '"step": 2' in printed and "peak_memory_gib" in printed
    assert "Memory plan: " in printed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_comes_to_the_steps_that_follow_the_first(flags, monkeypatch, capsys):
    """Those of the consistency loss, on rows of several recordings; a run of the warm-up alone has none."""
    parts, cat = [], TrainingRows.cat
    monkeypatch.setattr(TrainingRows, "cat", lambda rows: parts.append(len(rows)) or cat(rows))
    replay = {"replay_buffer_size": 8, "replay_steps": 4}
    for warm_up, found in ((1000, [False, True]), (10_000, [False, False])):
        main(flags(dry_run=True, max_train_steps=10_000, endpoint_warmup_steps=warm_up, **replay))
        steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        assert ["tangent_norm" in line for line in steps] == found
    assert parts == [2, 2]


def test_metrics_go_to_a_file_whatever_the_tracker(flags, tmp_path):
    main(flags(logging_steps=1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["tangent_ratio"] == 0.5
    assert lines[0]["rows_per_second"] > 0 and 0.05 < lines[0]["peak_memory_gib"] < 100
    assert {"loss", "error", "tangent_norm", "grad_norm", "filtered_share", "skipped_steps", "lr"} <= lines[0].keys()


def test_a_filter_that_drops_everything_says_so_and_exports_nothing(flags, tmp_path, caplog):
    with pytest.raises(RuntimeError, match=r"nothing is exported: .* are still those .*2 prompts were dropped"):
        main(flags(brightness_threshold=1e9, brightness_hard=True))
    dropped = [message for message in caplog.messages if "dropped every prompt" in message]
    assert ["Step 1:" in dropped[0], "Step 2:" in dropped[1], len(dropped)] == [True, True, 2]
    assert not (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.parametrize("changes", [{"learning_rate": 1e30}, {"weight_decay": 1e30, "rank": 2}])
def test_a_student_of_finite_weights_that_gives_no_numbers_is_not_exported(flags, tmp_path, changes):
    with pytest.raises(Failure, match="nothing is exported: what the student gives for noise is not finite at step 2"):
        main(flags(**changes))
    assert not (tmp_path / "run" / "model_index.json").exists() and not (tmp_path / "run" / "lora").exists()


def test_more_tokens_than_the_text_encoder_reads_are_refused(flags):
    with pytest.raises(
        ValueError, match="`max_sequence_length` is 8193: the teacher's text encoder reads 8192 tokens"
    ):
        main(flags(max_sequence_length=8193))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"route_steps": 1}, "--route_steps is 1"),
        ({"guidance_scales": [4.5, 0]}, r"--guidance_scales is \[4.5, 0.0\]"),
        ({"max_train_steps": 0}, "--max_train_steps is 0"),
        ({"learning_rate": "inf"}, "--learning_rate is inf: it has to be finite"),
        ({"guidance_scales": [4.5, "nan"]}, r"--guidance_scales is \[4.5, nan\]: it has to be finite"),
        ({"flow_shift": "inf"}, "--flow_shift is inf: it has to be finite"),
        ({"logit_mean": "nan"}, "--logit_mean is nan: it has to be finite"),
        ({"seed": 2**32}, "--seed is 4294967296: the largest is 4294967295"),
        ({"lr_warmup_steps": -1}, "--lr_warmup_steps is -1"),
        ({"weight_decay": -0.1}, "--weight_decay is -0.1"),
        ({"lr_scheduler": "piecewise_constant"}, "invalid choice: 'piecewise_constant'"),
        ({"prompts_file": None}, "either --prompts_file or --dataset_name"),
        ({"tangent_final_ratio": 1.5}, "`final_ratio` is 1.5"),
        ({"brightness_threshold": -1}, "--brightness_threshold is -1"),
        ({"ema_decay": 1}, "--ema_decay is 1"),
        ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit is 0"),
        ({"rank": 0}, "--rank is 0"),
        ({"merge_lora": True}, "--merge_lora needs --rank"),
        ({"rank": 4, "export_variants": ["fp16"]}, "they need --merge_lora"),
        ({"rank": 4, "no-stochastic_sampling": True}, "stochastic_sampling is of a student's own pipeline"),
        ({"rank": 4, "intermediate_timesteps": [1.0]}, "--intermediate_timesteps is of a student's own pipeline"),
        ({"intermediate_timesteps": [0.3, 1.0]}, r"--intermediate_timesteps is \[0.3, 1.0\]: it has to descend"),
        ({"intermediate_timesteps": [1.0, 0.99999999]}, "between pi/2 and 0, in float32"),
        ({"intermediate_timesteps": [1e-50]}, "between pi/2 and 0, in float32"),
        ({"intermediate_timesteps": [1.6]}, r"--intermediate_timesteps is \[1.6\]"),
        ({"intermediate_timesteps": [1.0, 0.0]}, r"--intermediate_timesteps is \[1.0, 0.0\]"),
        ({"intermediate_timesteps": ["nan"]}, r"--intermediate_timesteps is \[nan\]: it has to be finite"),
        ({"max_prompts": 0}, "--max_prompts is 0"),
        ({"streaming": True}, "--streaming is for --dataset_name"),
        ({"replay_buffer_size": 3, "train_batch_size": 2}, "--replay_buffer_size is 3: it has to be a multiple"),
        ({"replay_steps": 2}, "--replay_steps is 2, which trains on the same rows 2 times in a row"),
        ({"endpoint_warmup_steps": -1}, "--endpoint_warmup_steps is -1"),
        ({"use_8bit_adam": True, "optimizer": "came"}, "--use_8bit_adam is AdamW's"),
        ({"hub_model_id": "me/student"}, "--hub_model_id needs --push_to_hub"),
        ({"hub_strategy": "checkpoint"}, "--hub_strategy checkpoint needs --push_to_hub"),
        ({"push_to_hub": True, "hub_token": "hf_x", "report_to": "wandb"}, "--hub_token could be sent to wandb"),
    ],
)
def test_bad_flags_end_with_their_name(flags, changes, message, capsys):
    with pytest.raises(SystemExit):
        parse_settings(TBCMSettings, flags(**changes))
    captured = capsys.readouterr().err
    assert re.search(message, captured), captured


@NEEDS_PUSH
def test_a_run_that_cannot_be_pushed_ends_before_training(flags, tmp_path):
    with pytest.raises(ValueError, match=r"`hub_license`: license is None"):
        main(flags(push_to_hub=True, hub_token="hf_x"))
    with pytest.raises(ValueError, match="repo_id 'a/b/c' is not of the form"):
        main(flags(push_to_hub=True, hub_token="hf_x", hub_license="mit", hub_model_id="a/b/c"))
    assert not (tmp_path / "run").exists()


@NEEDS_PUSH
def test_a_push_that_fails_at_the_end_leaves_the_student_and_exit_code_1(flags, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run, "prepare_repo", lambda repo_id, **access: repo_id)
    with pytest.raises(SystemExit) as ended:  # the token cannot even be sent
        main(flags(push_to_hub=True, hub_token="hf_with space", hub_license="mit"))
    assert ended.value.code == 1
    assert "was not pushed: token is empty, or has a space" in caplog.text
    assert f"python -m diffusers_tbcm push {tmp_path / 'run'} run --license mit" in caplog.text
    SanaTBCMPipeline.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED, "is_fsdp2": False}, r"DEEPSPEED.*DDP and FSDP2"),
        ({"distributed_type": DistributedType.FSDP, "is_fsdp2": False}, r"FSDP.*fsdp_version: 2"),
    ],
    ids=["DeepSpeed", "FSDP1"],
)
def test_a_configuration_that_is_not_tested_is_refused(configuration, message):
    with pytest.raises(ValueError, match=message):
        check_launch(SimpleNamespace(**configuration), "none")


def test_lora_under_fsdp2_is_refused():
    run = SimpleNamespace(accelerator=SimpleNamespace(is_fsdp2=True))
    with pytest.raises(ValueError, match=r"`rank` .* use DDP"):
        ConsistencyDistillation(run, SimpleNamespace(rank=4), [], method="TBCM")


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(accelerators, "get_available_trackers", lambda: ["tensorboard"])
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, is_fsdp2=False)
    with pytest.raises(ValueError, match="`report_to` is 'wandb', which is not installed"):
        check_launch(accelerator, "wandb")


def test_another_run_is_not_overwritten(flags, tmp_path, capsys):
    OwnedFolder(tmp_path / "run").claim()
    (tmp_path / "run" / "checkpoint-2").mkdir()
    with pytest.raises(SystemExit):
        parse_settings(TBCMSettings, flags())
    assert "holds another run" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        main(flags(resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "no pipeline folder"),
        (lambda folder: (folder / "vae").rename(folder / "av"), "lacks its vae"),
        (
            lambda folder: (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
            "of no known family: its transformer is None",
        ),
    ],
)
def test_a_folder_that_is_no_teacher_is_refused(flags, tmp_path, damage, message):
    folder = write_tiny_pipeline(tmp_path / "teacher")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        main(flags(pretrained_model_name_or_path=folder))


@pytest.mark.parametrize("resolution", [0, 20, -64])
def test_a_resolution_that_the_autoencoder_does_not_divide_is_refused(flags, resolution):
    with pytest.raises(ValueError, match=f"`resolution` is {resolution}: it has to be a positive multiple of 8"):
        main(flags(resolution=resolution))


def test_a_plain_teacher_that_is_allowed_is_warned_of_and_marks_its_student(flags, plain_teacher, tmp_path, caplog):
    arguments = flags(pretrained_model_name_or_path=plain_teacher, allow_plain_teacher=True)
    main(arguments)
    assert any("multiplied by timestep_scale=1000" in message for message in caplog.messages)
    with pytest.raises(ValueError, match=r"timestep_scale` is 1000"):
        SanaTBCMPipeline.from_pretrained(tmp_path / "run")("a dog")
    with pytest.raises(ValueError, match="`validation_prompts` cannot be drawn"):
        main([*arguments, "--validation_prompts", "a dog", "--resume_from_checkpoint", "latest"])


def test_a_teacher_of_half_precision_weights_alone_is_distilled(flags, tmp_path):
    half = tiny_sana_pipeline().to(torch.bfloat16)
    half.save_pretrained(tmp_path / "teacher", variant="bf16", max_shard_size="5KB")
    main(flags(pretrained_model_name_or_path=tmp_path / "teacher", variant="bf16", max_train_steps=1))
    student = SanaTBCMPipeline.from_pretrained(tmp_path / "run")
    for name in ("vae", "text_encoder"):
        for found, weight in zip(getattr(student, name).parameters(), getattr(half, name).parameters(), strict=True):
            assert torch.equal(found, weight.float())
    assert student("a dog", num_inference_steps=1, max_sequence_length=16).images
