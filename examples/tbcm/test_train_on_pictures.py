"""The training scripts of sCM, Sana-Sprint and LCM, on a tiny teacher of real components and a few pictures."""

import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import SanaTransformer2DModel
from huggingface_hub import ModelCard
from runs import assert_same_state, fork_two, largest_relative_difference, metrics
from safetensors.torch import load_file
from tiny import student_weights

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.adversarial import DiscriminatorHeads
from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.draws import prompt_at
from diffusers_tbcm.scripts import train_lcm, train_sana_sprint, train_scm, train_tbcm_distill
from diffusers_tbcm.text import Text
from diffusers_tbcm.training.accelerators import check_launch
from diffusers_tbcm.training.consistency import ConsistencyDistillation
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import parse_settings
from diffusers_tbcm.trajectory import reference_route


METHODS = {
    train_scm: "sCM (arXiv 2410.11081)",
    train_sana_sprint: "Sana-Sprint (arXiv 2503.09641)",
    train_lcm: "LCM (arXiv 2310.04378)",
}
IDS = [script.__name__.rpartition(".")[2] for script in METHODS]
SETTINGS = {
    train_tbcm_distill: train_tbcm_distill.TBCMSettings,
    train_scm: train_scm.SCMSettings,
    train_sana_sprint: train_sana_sprint.SanaSprintSettings,
    train_lcm: train_lcm.LCMSettings,
}
FOLDER = Path(__file__).parent


def same(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def head_parameters(checkpoint):
    """The heads' weights of a checkpoint, without the state of the power iteration, which every forward moves."""
    state = load_file(checkpoint / "model_1.safetensors")
    heads = DiscriminatorHeads(16, (0, 1))
    assert state.keys() == heads.state_dict().keys()
    return {name: state[name] for name, _ in heads.named_parameters()}


@pytest.mark.parametrize("script", IDS)
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
    assert (
        f"| method | {METHODS[sys.modules[f'diffusers_tbcm.scripts.{script}']]} |" in card.text
        and "on captioned pictures" in card.text
    )
    assert "trajectories" not in card.text and not {"tbcm", "image-free-distillation"} & set(card.data.tags)
    assert (run / "latents" / "000000000.safetensors").exists()


@pytest.mark.parametrize("script", METHODS, ids=IDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(picture_flags, tmp_path, script):
    arguments = picture_flags(
        max_train_steps=5, checkpointing_steps=3, use_ema=True, lr_scheduler="cosine", gradient_accumulation_steps=2
    )
    script.main(arguments)
    run = tmp_path / "run"
    (run / "checkpoint-5").rename(run / "straight")
    straight = student_weights(run)
    script.main([*arguments, "--resume_from_checkpoint", "latest"])
    assert_same_state(run / "checkpoint-5", run / "straight")
    assert same(student_weights(run), straight)
    if script is train_sana_sprint:
        heads, expected = (
            load_file(folder / "model_1.safetensors") for folder in (run / "checkpoint-5", run / "straight")
        )
        assert same(heads, expected)
        states = [torch.load(run / name / "optimizer_1.bin")["state"] for name in ("checkpoint-5", "straight")]
        assert len(states[0]) == len(head_parameters(run / "straight"))
        for state, other in zip(*(found.values() for found in states), strict=True):
            assert state["exp_avg"].any() and torch.equal(state["exp_avg"], other["exp_avg"])


@pytest.mark.parametrize(
    ("script", "loss"),
    [(train_scm, {}), (train_lcm, {"loss_type": "l2", "num_ddim_timesteps": 4})],
    ids=["sCM", "LCM"],
)  # short steps and the kinks of the Huber loss would enlarge rounding
def test_accumulation_is_a_larger_batch(picture_flags, tmp_path, script, loss):
    options = {"max_train_steps": 3, "learning_rate": 1e-4, **loss}
    script.main(picture_flags(output_dir=tmp_path / "batch", train_batch_size=4, **options))
    script.main(picture_flags(output_dir=tmp_path / "accumulated", gradient_accumulation_steps=2, **options))
    batch, accumulated = student_weights(tmp_path / "batch"), student_weights(tmp_path / "accumulated")
    assert largest_relative_difference(accumulated, batch) < 1e-5


class Recorded(Exception):
    """Ends a run where its loop begins."""


@pytest.fixture
def make_rows(picture_flags, monkeypatch):
    """What a script gives to its run to make rows with, and what it makes them of."""

    def build(script, **changes):
        found = {}

        def batches(run, record, **options):
            found["record"] = record
            raise Recorded

        class Encoding(ConsistencyDistillation):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                self.encode = encode

            def cache_latents(self, images, folder):
                found["images"], found["latents"] = images, super().cache_latents(images, folder)
                return found["latents"]

        monkeypatch.setattr(Run, "batches", batches)
        monkeypatch.setattr(script, "ConsistencyDistillation", Encoding)
        with pytest.raises(Recorded):
            script.main(picture_flags(**changes))
        return SimpleNamespace(**found)

    return build


def encode(prompts):  # says which prompt it was
    seeds = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
    return Text.unmasked(torch.stack([torch.randn(3, 16, generator=seed) for seed in seeds]))


@pytest.mark.parametrize("script", [train_scm, train_lcm], ids=["sCM", "LCM"])
def test_a_draw_is_the_same_row_beside_whatever_others(make_rows, script):
    found = make_rows(script)
    together, keep = found.record([0, 1, 2, 3, 7])
    assert keep.all() and together.timesteps.shape == (5, 1) and len(together) == 5
    for place, draw in enumerate([0, 1, 2, 3, 7]):
        alone, _ = found.record([draw])
        for name in ("latents", "timesteps", "pred_original_sample"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[place])
        assert torch.equal(alone.text.embeds[0], together.text.embeds[place])
        torch.testing.assert_close(alone.velocity[0], together.velocity[place])


def test_a_row_is_a_picture_under_one_of_its_own_captions(make_rows):
    found = make_rows(train_scm)
    recording, _ = found.record(list(range(40)))
    pictures = [prompt_at(draw, 5, 0) for draw in range(40)]
    torch.testing.assert_close(recording.pred_original_sample, 0.5 * found.latents(pictures))
    used = set()
    for picture, embeds in zip(pictures, recording.text.embeds, strict=True):
        captions = [text for text in found.images.captions[picture] if torch.equal(encode([text]).embeds[0], embeds)]
        assert len(captions) == 1
        used.add(captions[0])
    assert used == {caption for captions in found.images.captions for caption in captions}
    # x_t = cos(t) x_0 + sin(t) sigma_data e with a standard normal e
    t = recording.timesteps[:, 0, None, None, None]
    noise = (recording.latents[:, 0] - torch.cos(t) * recording.pred_original_sample) / (0.5 * torch.sin(t))
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5


def test_sana_sprint_without_its_adversary_is_scm_while_the_heads_learn(picture_flags, tmp_path):
    options = {"max_train_steps": 3, "checkpointing_steps": 1}
    train_scm.main(picture_flags(output_dir=tmp_path / "scm", **options))
    train_sana_sprint.main(picture_flags(output_dir=tmp_path / "sprint", adv_lambda=0, **options))
    assert same(student_weights(tmp_path / "sprint"), student_weights(tmp_path / "scm"))
    first, last = (head_parameters(tmp_path / "sprint" / f"checkpoint-{step}") for step in (1, 3))
    assert not any(torch.equal(first[name], last[name]) for name in first if not name.endswith("conv.bias"))


def test_the_student_learns_from_the_heads_and_leaves_them_alone(picture_flags, tmp_path, monkeypatch):
    loss = train_sana_sprint.hinge_discriminator_loss
    monkeypatch.setattr(train_sana_sprint, "hinge_discriminator_loss", lambda *verdicts: 0 * loss(*verdicts))
    options = {"max_train_steps": 2, "checkpointing_steps": 1}
    train_sana_sprint.main(picture_flags(scm_lambda=0, adv_lambda=1, **options))
    run = tmp_path / "run"
    assert same(*(head_parameters(run / f"checkpoint-{step}") for step in (1, 2)))
    first, second = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    assert not same(first, second)


@pytest.mark.parametrize(("changes", "factor"), [({}, 1), ({"discriminator_learning_rate": 5e-3}, 5)])
def test_the_heads_may_have_a_learning_rate_of_their_own(picture_flags, tmp_path, changes, factor):
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-3, "weight_decay": 0}
    train_sana_sprint.main(picture_flags(**options, **changes))
    states = [torch.load(tmp_path / "run" / f"checkpoint-{step}" / "optimizer_1.bin") for step in (1, 2)]
    assert [group["lr"] for state in states for group in state["param_groups"]] == [factor * 1e-3] * 2
    student = torch.load(tmp_path / "run" / "checkpoint-1" / "optimizer.bin")
    assert student["param_groups"][0]["lr"] == 1e-3


def test_a_dry_run_is_of_the_method_and_leaves_nothing(picture_flags, tmp_path, capsys):
    train_sana_sprint.main(picture_flags(dry_run=True))
    assert '"discriminator_loss"' in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_the_adversary_is_in_the_metrics(picture_flags, tmp_path):
    train_sana_sprint.main(picture_flags(logging_steps=1))
    for line in metrics(tmp_path / "run"):
        assert {"tangent_norm", "adversarial_loss", "discriminator_loss"} <= line.keys()
        assert 0.5 < line["discriminator_loss"] < 1.5


def test_verdicts_that_are_not_numbers_skip_the_step_of_both_sides(picture_flags, tmp_path, monkeypatch, caplog):
    hinge, calls = train_sana_sprint.hinge_discriminator_loss, []

    def loss(real, fake):
        calls.append(None)
        return hinge(real, fake) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(train_sana_sprint, "hinge_discriminator_loss", loss)
    train_sana_sprint.main(picture_flags(max_train_steps=3, checkpointing_steps=1))
    run = tmp_path / "run"
    assert any("Step 2: gradient norm nan" in message for message in caplog.messages)
    students = [load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3)]
    heads = [head_parameters(run / f"checkpoint-{step}") for step in (1, 2, 3)]
    for before, skipped, after in (students, heads):
        assert same(skipped, before) and not same(after, skipped)
        assert all(weight.isfinite().all() for weight in after.values())


def test_largest_times_and_misaligned_pairs_reach_the_discriminator(picture_flags, monkeypatch):
    predicted, judged = [], []
    sample, features = train_sana_sprint.sample_diffusion_timesteps, train_sana_sprint.block_features

    def sample_timesteps(count, **options):
        timesteps = sample(count, **options)
        predicted.append((timesteps, options))
        return timesteps

    def block_features(teacher, blocks, latents, timesteps, text, *args):
        judged.append((latents, timesteps, text.embeds))
        return features(teacher, blocks, latents, timesteps, text, *args)

    monkeypatch.setattr(train_sana_sprint, "sample_diffusion_timesteps", sample_timesteps)
    monkeypatch.setattr(train_sana_sprint, "block_features", block_features)
    options = {"train_largest_timestep": True, "largest_timestep_prob": 1, "misaligned_pairs_D": True}
    train_sana_sprint.main(
        picture_flags(max_train_steps=1, logit_mean_discriminator=-0.5, head_block_ids=[1], **options)
    )
    _, (elsewhere, first), (times, second) = predicted  # the first is of the rows
    assert torch.equal(elsewhere, torch.full((2,), torch.pi / 2)) and first["largest_probability"] == 1
    assert second["logit_mean"] == -0.5 and "largest_probability" not in second
    fake, real, shifted = judged
    assert all(torch.equal(timesteps, times) for _, timesteps, _ in judged)
    assert fake[0].requires_grad and not real[0].requires_grad and not shifted[0].requires_grad
    assert torch.equal(real[0], shifted[0]) and not torch.equal(real[0], fake[0])
    assert torch.equal(shifted[2], real[2].roll(1, 0)) and not torch.equal(shifted[2], real[2])


def test_lcm_aims_one_grid_step_on(picture_flags, monkeypatch):
    seen, target = [], train_lcm.discrete_target

    def remember(network, rows, next_timesteps, *args):
        seen.append((rows.timesteps, next_timesteps))
        assert not target(network, rows, next_timesteps, *args).requires_grad
        return target(network, rows, next_timesteps, *args)

    monkeypatch.setattr(train_lcm, "discrete_target", remember)
    train_lcm.main(picture_flags(num_ddim_timesteps=5, flow_shift=3, max_train_steps=8, loss_type="l2"))
    grid = [*reference_route(5, 3.0).tolist(), 0.0]
    pairs = {(t, after) for batch in seen for t, after in zip(*(part.tolist() for part in batch), strict=True)}
    assert pairs == set(pairwise(grid))


@pytest.mark.parametrize("script", METHODS, ids=IDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "replay_buffer_size": 4, "teacher_batch_size": 4},
        {"gradient_checkpointing": True, "rank": 2, "merge_lora": True},
    ],
    ids=["bf16 and replay", "LoRA"],
)
def test_options_run_and_stay_finite(picture_flags, tmp_path, script, changes):
    script.main(picture_flags(**changes))
    assert all(weight.isfinite().all() for weight in student_weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        (train_scm, {"train_data_dir": None}, "either --train_data_dir or --dataset_name"),
        (train_scm, {"dataset_name": "me/pictures"}, "either --train_data_dir or --dataset_name"),
        (train_scm, {"train_data_dir": "nowhere"}, "--train_data_dir is nowhere: there is no such folder"),
        (train_scm, {"max_train_samples": 0}, "--max_train_samples is 0"),
        (train_scm, {"logit_std": 0}, "--logit_std is 0"),
        (train_scm, {"tangent_warmup_steps": -1}, "--tangent_warmup_steps is -1"),
        (train_scm, {"route_steps": 4}, "unrecognized arguments: --route_steps 4"),
        (train_scm, {"adv_lambda": 1}, "unrecognized arguments: --adv_lambda 1"),
        (train_sana_sprint, {"adv_lambda": -1}, "--adv_lambda is -1"),
        (train_sana_sprint, {"scm_lambda": -1}, "--scm_lambda is -1"),
        (train_sana_sprint, {"largest_timestep_prob": 2}, "--largest_timestep_prob is 2"),
        (train_sana_sprint, {"logit_std_discriminator": 0}, "--logit_std_discriminator is 0"),
        (train_sana_sprint, {"discriminator_learning_rate": 0}, "--discriminator_learning_rate is 0"),
        (
            train_sana_sprint,
            {"misaligned_pairs_D": True, "train_batch_size": 1},
            "--misaligned_pairs_D .*--train_batch_size 2",
        ),
        (train_sana_sprint, {"compile": True}, "--compile hides"),
        (train_lcm, {"huber_c": 0}, "--huber_c is 0"),
        (train_lcm, {"num_ddim_timesteps": 0}, "--num_ddim_timesteps is 0"),
        (train_lcm, {"loss_type": "l1"}, "--loss_type.*: invalid choice: 'l1'"),
        (train_lcm, {"tangent_warmup_steps": 5}, "unrecognized arguments: --tangent_warmup_steps 5"),
        (train_tbcm_distill, {}, "unrecognized arguments: --train_data_dir"),
    ],
)
def test_bad_flags_end_with_their_name(picture_flags, flags, pictures, script, changes, message, capsys):
    arguments = flags(train_data_dir=pictures) if script is train_tbcm_distill else picture_flags(**changes)
    with pytest.raises(SystemExit):
        parse_settings(SETTINGS[script], arguments)
    captured = capsys.readouterr().err
    assert re.search(message, captured), captured


@pytest.mark.parametrize(
    ("launched", "message"),
    [
        (
            {"distributed_type": DistributedType.FSDP, "is_fsdp2": True, "mixed_precision": "no"},
            "tested with one process and DDP",
        ),
        (
            {"distributed_type": DistributedType.NO, "is_fsdp2": False, "mixed_precision": "fp16"},
            "fp16.*use bf16 or no",
        ),
    ],
    ids=["FSDP2", "fp16"],
)
def test_sana_sprint_refuses_what_it_cannot_train_with(launched, message):
    with pytest.raises(ValueError, match=message):
        check_launch(SimpleNamespace(**launched), "none", num_models=2, shards=False)


def test_heads_on_blocks_that_the_teacher_does_not_have_are_refused(picture_flags):
    with pytest.raises(ValueError, match=r"`head_block_ids`: .*\[2\].* 0 to 1"):
        train_sana_sprint.main(picture_flags(head_block_ids=[2]))


def test_two_processes_with_heads_give_the_students_weights_of_one_without(picture_flags, tmp_path):
    options = {"max_train_steps": 4, "learning_rate": 1e-4}
    train_scm.main(picture_flags(output_dir=tmp_path / "one", train_batch_size=4, **options))
    arguments = picture_flags(output_dir=tmp_path / "two", adv_lambda=0, train_largest_timestep=True, **options)
    fork_two(train_sana_sprint.main, arguments)
    weights = [student_weights(tmp_path / name) for name in ("two", "one")]
    assert largest_relative_difference(*weights) < 1e-5
