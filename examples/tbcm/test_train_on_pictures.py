"""The training scripts of sCM, Sana-Sprint and LCM, on a tiny teacher of real components and a few pictures."""

import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import adversarial_objective
import objectives
import pytest
import torch
from accelerate import Accelerator
from diffusers import SanaTransformer2DModel
from distill_args import parse_args
from huggingface_hub import ModelCard
from image_rows import GridRows, LogitNormalRows
from methods import LCM, SANA_SPRINT, SCM, TBCM
from row_stream import RowStream
from safetensors.torch import load_file
from test_train_distributed import largest_relative_difference, launch
from test_train_faults import assert_same_state, metrics
from tiny import student_weights, tiny_transformer
from train_tbcm_distill import main

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.adversarial import DiscriminatorHeads
from diffusers_tbcm.data.prompts import prompt_at
from diffusers_tbcm.text import Text
from diffusers_tbcm.trajectory import reference_route
from diffusers_tbcm.trigflow import TrigFlowTransformer, make_student


METHODS = {"train_scm": SCM, "train_sana_sprint": SANA_SPRINT, "train_lcm": LCM}
FOLDER = Path(__file__).parent


def train(method, arguments):
    main(parse_args(arguments, method=method), method)


def same(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def head_parameters(checkpoint):
    """The heads' weights of a checkpoint, without the state of the power iteration, which every forward moves."""
    state = load_file(checkpoint / "model_1.safetensors")
    heads = DiscriminatorHeads(16, (0, 1))
    assert state.keys() == heads.state_dict().keys()
    return {name: state[name] for name, _ in heads.named_parameters()}


@pytest.mark.parametrize("script", METHODS)
def test_each_script_ends_in_a_pipeline_whose_card_names_the_method(
    picture_flags, teacher, tmp_path, monkeypatch, script
):
    arguments = picture_flags(validation_prompts=["a dog"], use_ema=True, ema_decay=0.5, latents_cache=None)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    run = tmp_path / "run"
    image = SanaTBCMPipeline.from_pretrained(run)("a dog", num_inference_steps=1, max_sequence_length=16).images[0]
    assert image.size == (64, 64)
    before = make_student(SanaTransformer2DModel.from_pretrained(teacher, subfolder="transformer")).state_dict()
    after = student_weights(run)
    assert after.keys() == before.keys() and all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    card = ModelCard.load(run / "README.md")
    assert f"| method | {METHODS[script].name} |" in card.text and "on captioned pictures" in card.text
    assert "trajectories" not in card.text and not {"tbcm", "image-free-distillation"} & set(card.data.tags)
    assert (run / "latents" / "000000000.safetensors").exists()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(picture_flags, tmp_path, method):
    arguments = picture_flags(
        max_train_steps=5, checkpointing_steps=3, use_ema=True, lr_scheduler="cosine", gradient_accumulation_steps=2
    )
    train(method, arguments)
    run = tmp_path / "run"
    (run / "checkpoint-5").rename(run / "straight")
    straight = student_weights(run)
    train(method, [*arguments, "--resume_from_checkpoint", "latest"])
    assert_same_state(run / "checkpoint-5", run / "straight")
    assert same(student_weights(run), straight)
    if method is SANA_SPRINT:
        heads, expected = (
            load_file(folder / "model_1.safetensors") for folder in (run / "checkpoint-5", run / "straight")
        )
        assert same(heads, expected)
        states = [torch.load(run / name / "optimizer_1.bin")["state"] for name in ("checkpoint-5", "straight")]
        assert len(states[0]) == len(head_parameters(run / "straight"))
        for state, other in zip(*(found.values() for found in states), strict=True):
            assert state["exp_avg"].any() and torch.equal(state["exp_avg"], other["exp_avg"])


@pytest.mark.parametrize(
    ("method", "loss"), [(SCM, {}), (LCM, {"loss_type": "l2", "num_ddim_timesteps": 4})], ids=["sCM", "LCM"]
)  # short steps and the kinks of the Huber loss would enlarge rounding
def test_accumulation_is_a_larger_batch(picture_flags, tmp_path, method, loss):
    options = {"max_train_steps": 3, "learning_rate": 1e-4, **loss}
    train(method, picture_flags(output_dir=tmp_path / "batch", train_batch_size=4, **options))
    train(method, picture_flags(output_dir=tmp_path / "accumulated", gradient_accumulation_steps=2, **options))
    batch, accumulated = student_weights(tmp_path / "batch"), student_weights(tmp_path / "accumulated")
    assert largest_relative_difference(accumulated, batch) < 1e-5


@pytest.fixture
def make_rows(picture_flags, teacher):
    def build(kind, method, **changes):
        args = parse_args(picture_flags(**changes), method=method)
        network = TrigFlowTransformer(SanaTransformer2DModel.from_pretrained(teacher, subfolder="transformer"), 1.0)

        def encode(prompts):  # says which prompt it was
            seeds = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
            embeds = torch.stack([torch.randn(3, 16, generator=seed) for seed in seeds])
            return Text.unmasked(embeds)

        data = kind.load_data(args)
        accelerator = Accelerator(cpu=True)
        rows = kind(args, accelerator, network, teacher, encode, data, (4, 8, 8), sigma_data=0.5)
        return args, rows, encode

    return build


@pytest.mark.parametrize(("kind", "method"), [(LogitNormalRows, SCM), (GridRows, LCM)])
def test_a_draw_is_the_same_row_beside_whatever_others(make_rows, kind, method):
    _, rows, _ = make_rows(kind, method)
    together, keep = rows.record([0, 1, 2, 3, 7])
    assert keep.all() and together.trajectory.timesteps.shape == (5, 1) and len(together) == 5
    for place, draw in enumerate([0, 1, 2, 3, 7]):
        alone, _ = rows.record([draw])
        for name in ("latents", "timesteps", "pred_original_sample"):
            assert torch.equal(getattr(alone.trajectory, name)[0], getattr(together.trajectory, name)[place])
        assert torch.equal(alone.prompt_embeds[0], together.prompt_embeds[place])
        torch.testing.assert_close(alone.trajectory.velocity[0], together.trajectory.velocity[place])


def test_a_row_is_a_picture_under_one_of_its_own_captions(make_rows):
    args, rows, encode = make_rows(LogitNormalRows, SCM)
    recording, _ = rows.record(list(range(40)))
    pictures = [prompt_at(draw, 5, args.seed) for draw in range(40)]
    torch.testing.assert_close(recording.trajectory.pred_original_sample, 0.5 * rows.latents(pictures))
    used = set()
    for picture, embeds in zip(pictures, recording.prompt_embeds, strict=True):
        found = [text for text in rows.images.captions[picture] if torch.equal(encode([text]).embeds[0], embeds)]
        assert len(found) == 1
        used.add(found[0])
    assert used == {caption for captions in rows.images.captions for caption in captions}
    # x_t = cos(t) x_0 + sin(t) sigma_data e with a standard normal e
    trajectory = recording.trajectory
    t = trajectory.timesteps[:, 0, None, None, None]
    noise = (trajectory.latents[:, 0] - torch.cos(t) * trajectory.pred_original_sample) / (0.5 * torch.sin(t))
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5


def test_processes_share_the_draws_of_one(picture_flags):
    def draws(processes, batch, number):
        args = parse_args(picture_flags(train_batch_size=batch), method=SCM)
        streams = [
            RowStream(args, SimpleNamespace(num_processes=processes, process_index=index), SimpleNamespace())
            for index in range(processes)
        ]
        return [draw for stream in streams for draw in stream.draws(number)]

    assert [draws(2, 2, number) for number in range(3)] == [draws(1, 4, number) for number in range(3)]


def test_sana_sprint_without_its_adversary_is_scm_while_the_heads_learn(picture_flags, tmp_path):
    options = {"max_train_steps": 3, "checkpointing_steps": 1}
    train(SCM, picture_flags(output_dir=tmp_path / "scm", **options))
    train(SANA_SPRINT, picture_flags(output_dir=tmp_path / "sprint", adv_lambda=0, **options))
    assert same(student_weights(tmp_path / "sprint"), student_weights(tmp_path / "scm"))
    first, last = (head_parameters(tmp_path / "sprint" / f"checkpoint-{step}") for step in (1, 3))
    assert not any(torch.equal(first[name], last[name]) for name in first if not name.endswith("conv.bias"))


def test_the_student_learns_from_the_heads_and_leaves_them_alone(picture_flags, tmp_path, monkeypatch):
    loss = adversarial_objective.hinge_discriminator_loss
    monkeypatch.setattr(adversarial_objective, "hinge_discriminator_loss", lambda *verdicts: 0 * loss(*verdicts))
    options = {"max_train_steps": 2, "checkpointing_steps": 1}
    train(SANA_SPRINT, picture_flags(scm_lambda=0, adv_lambda=1, **options))
    run = tmp_path / "run"
    assert same(*(head_parameters(run / f"checkpoint-{step}") for step in (1, 2)))
    first, second = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    assert not same(first, second)


@pytest.mark.parametrize(("changes", "factor"), [({}, 1), ({"discriminator_learning_rate": 5e-3}, 5)])
def test_the_heads_may_have_a_learning_rate_of_their_own(picture_flags, tmp_path, changes, factor):
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-3, "weight_decay": 0}
    train(SANA_SPRINT, picture_flags(**options, **changes))
    states = [torch.load(tmp_path / "run" / f"checkpoint-{step}" / "optimizer_1.bin") for step in (1, 2)]
    assert [group["lr"] for state in states for group in state["param_groups"]] == [factor * 1e-3] * 2
    student = torch.load(tmp_path / "run" / "checkpoint-1" / "optimizer.bin")
    assert student["param_groups"][0]["lr"] == 1e-3


def test_a_dry_run_is_of_the_method_and_leaves_nothing(picture_flags, tmp_path, capsys):
    train(SANA_SPRINT, picture_flags(dry_run=True))
    assert '"discriminator_loss"' in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_the_adversary_is_in_the_metrics(picture_flags, tmp_path):
    train(SANA_SPRINT, picture_flags(logging_steps=1))
    for line in metrics(tmp_path / "run"):
        assert {"tangent_norm", "adversarial_loss", "discriminator_loss"} <= line.keys()
        assert 0.5 < line["discriminator_loss"] < 1.5


def test_verdicts_that_are_not_numbers_skip_the_step_of_both_sides(picture_flags, tmp_path, monkeypatch, caplog):
    hinge, calls = adversarial_objective.hinge_discriminator_loss, []

    def loss(real, fake):
        calls.append(None)
        return hinge(real, fake) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(adversarial_objective, "hinge_discriminator_loss", loss)
    train(SANA_SPRINT, picture_flags(max_train_steps=3, checkpointing_steps=1))
    run = tmp_path / "run"
    assert any("Step 2: gradient norm nan" in message for message in caplog.messages)
    students = [load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3)]
    heads = [head_parameters(run / f"checkpoint-{step}") for step in (1, 2, 3)]
    for before, skipped, after in (students, heads):
        assert same(skipped, before) and not same(after, skipped)
        assert all(weight.isfinite().all() for weight in after.values())


def test_largest_times_and_misaligned_pairs_reach_the_discriminator(picture_flags, monkeypatch):
    predicted, judged = [], []
    sample, features = adversarial_objective.sample_diffusion_timesteps, adversarial_objective.block_features

    def sample_timesteps(count, **options):
        timesteps = sample(count, **options)
        predicted.append((timesteps, options))
        return timesteps

    def block_features(teacher, blocks, latents, timesteps, prompt_embeds, *args, **kwargs):
        judged.append((latents, timesteps, prompt_embeds))
        return features(teacher, blocks, latents, timesteps, prompt_embeds, *args, **kwargs)

    monkeypatch.setattr(adversarial_objective, "sample_diffusion_timesteps", sample_timesteps)
    monkeypatch.setattr(adversarial_objective, "block_features", block_features)
    options = {"train_largest_timestep": True, "largest_timestep_prob": 1, "misaligned_pairs_D": True}
    train(SANA_SPRINT, picture_flags(max_train_steps=1, logit_mean_discriminator=-0.5, head_block_ids=[1], **options))
    (elsewhere, first), (times, second) = predicted
    assert torch.equal(elsewhere, torch.full((2,), torch.pi / 2)) and first["largest_probability"] == 1
    assert second["logit_mean"] == -0.5 and "largest_probability" not in second
    fake, real, shifted = judged
    assert all(torch.equal(timesteps, times) for _, timesteps, _ in judged)
    assert fake[0].requires_grad and not real[0].requires_grad and not shifted[0].requires_grad
    assert torch.equal(real[0], shifted[0]) and not torch.equal(real[0], fake[0])
    assert torch.equal(shifted[2], real[2].roll(1, 0)) and not torch.equal(shifted[2], real[2])


def test_lcm_aims_one_grid_step_on(picture_flags, monkeypatch):
    seen, target = [], objectives.discrete_target

    def remember(network, rows, next_timesteps, *args):
        seen.append((rows.timesteps, next_timesteps))
        assert not target(network, rows, next_timesteps, *args).requires_grad
        return target(network, rows, next_timesteps, *args)

    monkeypatch.setattr(objectives, "discrete_target", remember)
    train(LCM, picture_flags(num_ddim_timesteps=5, flow_shift=3, max_train_steps=8, loss_type="l2"))
    grid = [*reference_route(5, 3.0).tolist(), 0.0]
    pairs = {(t, after) for batch in seen for t, after in zip(*(part.tolist() for part in batch), strict=True)}
    assert pairs == set(pairwise(grid))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "replay_buffer_size": 4, "teacher_batch_size": 4},
        {"gradient_checkpointing": True, "rank": 2, "merge_lora": True},
    ],
    ids=["bf16 and replay", "LoRA"],
)
def test_options_run_and_stay_finite(picture_flags, tmp_path, method, changes):
    train(method, picture_flags(**changes))
    assert all(weight.isfinite().all() for weight in student_weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (SCM, {"train_data_dir": None}, "either --train_data_dir or --dataset_name"),
        (SCM, {"dataset_name": "me/pictures"}, "either --train_data_dir or --dataset_name"),
        (SCM, {"train_data_dir": "nowhere"}, "--train_data_dir is nowhere: there is no such folder"),
        (SCM, {"max_train_samples": 0}, "--max_train_samples is 0"),
        (SCM, {"logit_std": 0}, "--logit_std is 0"),
        (SCM, {"tangent_warmup_steps": -1}, "--tangent_warmup_steps is -1"),
        (SCM, {"route_steps": 4}, "unrecognized arguments: --route_steps 4"),
        (SCM, {"adv_lambda": 1}, "unrecognized arguments: --adv_lambda 1"),
        (SANA_SPRINT, {"adv_lambda": -1}, "--adv_lambda is -1"),
        (SANA_SPRINT, {"scm_lambda": -1}, "--scm_lambda is -1"),
        (SANA_SPRINT, {"largest_timestep_prob": 2}, "--largest_timestep_prob is 2"),
        (SANA_SPRINT, {"logit_std_discriminator": 0}, "--logit_std_discriminator is 0"),
        (SANA_SPRINT, {"discriminator_learning_rate": 0}, "--discriminator_learning_rate is 0"),
        (
            SANA_SPRINT,
            {"misaligned_pairs_D": True, "train_batch_size": 1},
            "--misaligned_pairs_D .*--train_batch_size 2",
        ),
        (SANA_SPRINT, {"compile": True}, "--compile hides"),
        (LCM, {"huber_c": 0}, "--huber_c is 0"),
        (LCM, {"num_ddim_timesteps": 0}, "--num_ddim_timesteps is 0"),
        (LCM, {"loss_type": "l1"}, "--loss_type: invalid choice: 'l1'"),
        (LCM, {"tangent_warmup_steps": 5}, "unrecognized arguments: --tangent_warmup_steps 5"),
        (TBCM, {}, "unrecognized arguments: --train_data_dir"),
    ],
)
def test_bad_flags_end_with_their_name(picture_flags, flags, pictures, method, changes, message, capsys):
    arguments = flags(train_data_dir=pictures) if method is TBCM else picture_flags(**changes)
    with pytest.raises(SystemExit):
        parse_args(arguments, method=method)
    captured = capsys.readouterr().err
    assert re.search(message, captured), captured


@pytest.mark.parametrize(
    ("launched", "blocks", "message"),
    [
        ({"is_fsdp2": True, "mixed_precision": "no"}, None, "tested with one process and DDP"),
        ({"is_fsdp2": False, "mixed_precision": "fp16"}, None, "fp16.*use bf16 or no"),
        ({"is_fsdp2": False, "mixed_precision": "no"}, [2], r"--head_block_ids: .*\[2\].* 0 to 1"),
    ],
    ids=["FSDP2", "fp16", "blocks"],
)
def test_sana_sprint_refuses_what_it_cannot_train_with(launched, blocks, message):
    args, accelerator = SimpleNamespace(head_block_ids=blocks), SimpleNamespace(**launched)
    with pytest.raises(ValueError, match=message):
        SANA_SPRINT.objective.check_run(args, accelerator, tiny_transformer())


def test_two_processes_with_heads_give_the_students_weights_of_one_without(picture_flags, tmp_path, pictures):
    options = {"max_train_steps": 4, "learning_rate": 1e-4}
    train(SCM, picture_flags(output_dir=tmp_path / "one", train_batch_size=4, **options))
    arguments = picture_flags(output_dir=tmp_path / "two", adv_lambda=0, train_largest_timestep=True, **options)
    launch(arguments, script="train_sana_sprint.py", HF_DATASETS_CACHE=str(pictures.parent))
    weights = [student_weights(tmp_path / name) for name in ("two", "one")]
    assert largest_relative_difference(*weights) < 1e-5
