"""The script of DMD on a tiny teacher: what its losses are, what it begins as, how it goes on, what it leaves."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, SanaSprintPipeline
from families import FAMILIES
from runs import assert_same_models, fork_two, kill_after_updates, largest_relative_difference
from safetensors.torch import load_file, save_file
from tiny import student_weights, tiny_transformer, write_tiny_pipeline

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.scheduling_flow import FlowStudentScheduler
from diffusers_tbcm.scripts import train_dmd, train_tbcm_distill
from diffusers_tbcm.training.distillation import Distillation
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.trigflow import SIGMA_DATA


@pytest.fixture
def dmd_flags(flags):
    """The flags of a short run of DMD, with changes."""
    dmd = {
        "route_steps": 3, "train_batch_size": 2, "lr_scheduler": "constant", "critic_learning_rate": 1e-3,
        "max_train_steps": 4, "student_every": 2, "checkpointing_steps": 1, "logging_steps": 1,
    }  # fmt: skip
    others = {"tangent_warmup_steps": None, "tangent_cooldown_start_step": None, "tangent_cooldown_steps": None}
    return lambda **changes: flags(**(others | dmd | changes))


@pytest.fixture
def start(flags, tmp_path):
    """A TBCM student."""
    train_tbcm_distill.main(flags(output_dir=tmp_path / "start"))
    return tmp_path / "start"


def test_a_student_goes_on_and_is_exported_as_tbcms(dmd_flags, start, teacher, tmp_path):
    main, run = train_dmd.main, tmp_path / "run"
    main(dmd_flags(use_ema=True, student_model_name_or_path=start))
    first, begun, moved = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 1, 2))
    for name, weight in student_weights(start).items():
        assert torch.equal(begun[f"transformer.{name}"], weight)  # the first step is the critic's
    assert any(not torch.equal(moved[name], weight) for name, weight in first.items())
    critic = load_file(run / "checkpoint-1" / "model_1.safetensors")
    before = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "proj_out.weight"
    assert 0 < (critic[f"transformer.{name}"] - before[name]).abs().max() <= 1.01e-3  # an update from the teacher
    card = (run / "README.md").read_text()
    assert "DMD after TBCM" in card and "a TBCM student" in card
    pictures = [
        pipeline(
            "a dog", num_inference_steps=1, height=64, width=64, generator=torch.Generator().manual_seed(0),
            max_sequence_length=16, complex_human_instruction=None, guidance_scale=4.5, output_type="pt",
            intermediate_timesteps=None, use_resolution_binning=False,
        ).images
        for pipeline in (SanaTBCMPipeline.from_pretrained(run), SanaSprintPipeline.from_pretrained(run))
    ]  # fmt: skip
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(dmd_flags, start, tmp_path):
    shared = {"use_ema": True, "student_model_name_or_path": start, "replay_buffer_size": 4}
    train_dmd.main(dmd_flags(**shared))
    broken = {"output_dir": tmp_path / "broken", **shared}
    kill_after_updates(1, train_dmd.main, dmd_flags(**broken))  # before the student's first
    for stop in (2, 3, 4):
        train_dmd.main(dmd_flags(max_train_steps=stop, resume_from_checkpoint="latest", **broken))
    assert_same_models(*(tmp_path / name / "checkpoint-4" for name in ("broken", "run")))


def test_a_resumed_run_is_told_of_the_student_that_it_began_with(dmd_flags, start, tmp_path):
    """By its weights, wherever they lie."""
    begun = dmd_flags(student_model_name_or_path=start, max_train_steps=2)
    train_dmd.main(begun)
    goes_on = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    other = write_tiny_pipeline(tmp_path / "other")
    tiny_transformer(guidance_embeds=True).save_pretrained(other / "transformer")
    for wrong in (other, None):
        with pytest.raises(ValueError, match=r"^checkpoint .* was trained with another start"):
            train_dmd.main(dmd_flags(student_model_name_or_path=wrong, **goes_on))
    moved = start.rename(tmp_path / "moved")
    train_dmd.main(dmd_flags(student_model_name_or_path=moved, **goes_on))
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_the_losses_are_those_of_the_critic_and_teacher_as_they_stand(dmd_flags, monkeypatch):
    """From outside: the teacher's two branches in float64, and DMD's target by hand."""
    checked, judge = [], train_dmd.judge

    def check(distillation, critic, rows, sample, tau):
        real, fake = judge(distillation, critic, rows, sample, tau)
        trig_time = torch.atan2(tau, 1 - tau)  # of s = tau; f of TrigFlow is then the same clean prediction
        shape = (-1, 1, 1, 1)
        trig_sample = sample / (tau**2 + (1 - tau) ** 2).sqrt().view(shape)
        teacher, negative = distillation.teacher, distillation.negative_text.expand(len(rows.text))
        with torch.no_grad():
            with_prompt, without = (
                teacher(trig_sample, trig_time, **text.arguments()) for text in (rows.text, negative)
            )
        guided = without + rows.guidance_scale.view(shape) * (with_prompt - without)
        expected = trig_time.cos().view(shape) * trig_sample - trig_time.sin().view(shape) * guided
        torch.testing.assert_close(real, expected, rtol=1e-4, atol=1e-4)
        assert not real.requires_grad and not fake.requires_grad
        checked.append((real, fake))
        return real, fake

    losses = []

    def remember(prediction, real, fake):
        weight = 1 / (real - prediction).abs().mean((1, 2, 3)).clamp(min=0.1)
        losses.append((weight.view(-1, 1, 1, 1) * (real - fake)).square().mean().item())
        found = distribution_loss(prediction, real, fake)
        assert found.item() == pytest.approx(losses[-1], rel=1e-5) and prediction.requires_grad
        return found

    distribution_loss = train_dmd.distribution_loss
    monkeypatch.setattr(train_dmd, "judge", check)
    monkeypatch.setattr(train_dmd, "distribution_loss", remember)
    train_dmd.main(dmd_flags())
    assert len(checked) == len(losses) == 2


def test_predictions_are_on_unit_scale_and_their_noise_is_flow_matchings(dmd_flags, monkeypatch):
    seen, critic_loss = [], train_dmd.critic_loss

    def remember(velocity, prediction, noise):
        seen.append((prediction, noise))
        return critic_loss(velocity, prediction, noise)

    drawn, predict = [], train_dmd.predict

    def watch(distillation, student, rows):
        trig_output, prediction = predict(distillation, student, rows)
        clean = rows.timesteps.cos().view(-1, 1, 1, 1) * rows.latents
        clean = clean - rows.timesteps.sin().view(-1, 1, 1, 1) * SIGMA_DATA * trig_output
        torch.testing.assert_close(prediction, clean / SIGMA_DATA)
        drawn.append(prediction.detach())
        return trig_output, prediction

    monkeypatch.setattr(train_dmd, "critic_loss", remember)
    monkeypatch.setattr(train_dmd, "predict", watch)
    train_dmd.main(dmd_flags(max_train_steps=2))
    assert torch.equal(seen[0][0], drawn[0]) and not seen[0][0].requires_grad
    assert seen[0][1].std().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("share", "rows"), [(0, 0), (0.5, 2), (1, 4)])
def test_a_share_of_the_rows_is_where_a_single_step_begins(dmd_flags, monkeypatch, tmp_path, share, rows):
    times, predict = [], train_dmd.predict

    def watch(distillation, student, rows):
        times.append(rows.timesteps)
        return predict(distillation, student, rows)

    monkeypatch.setattr(train_dmd, "predict", watch)
    train_dmd.main(dmd_flags(max_train_steps=1, student_every=1, route_steps=5, train_batch_size=1, noise_share=share))
    assert [(each == torch.tensor(torch.pi / 2)).sum() for each in times] == [rows, rows]
    assert f"| rows at pi/2 | {rows} of 4 |" in (tmp_path / "run" / "README.md").read_text()


def test_a_share_of_the_weights_it_began_with_is_saved(dmd_flags, start, tmp_path):
    """Training is the same; so the share may change when a run goes on, even one that has ended."""
    begun, run = student_weights(start), tmp_path / "run"
    train_dmd.main(dmd_flags(student_model_name_or_path=start, use_ema=True))
    trained = student_weights(run)
    again = {"student_model_name_or_path": start, "use_ema": True, "resume_from_checkpoint": "latest"}
    train_dmd.main(dmd_flags(start_share=0.25, **again))
    for name, weight in student_weights(run).items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.double(), 0.75 * trained[name].double() + 0.25 * begun[name].double())
    assert any(not torch.equal(begun[name], weight) for name, weight in trained.items())
    assert "| saved | 0.25 of the weights it began with |" in (run / "README.md").read_text()
    two = {"output_dir": tmp_path / "two", "train_batch_size": 1}
    fork_two(train_dmd.main, dmd_flags(student_model_name_or_path=start, use_ema=True, start_share=0.25, **two))
    assert largest_relative_difference(student_weights(run), student_weights(tmp_path / "two")) < 1e-4


@pytest.mark.parametrize("changed", ["student_model_name_or_path", "pretrained_model_name_or_path"])
def test_what_is_read_again_is_what_the_run_began_with(dmd_flags, start, teacher, tmp_path, monkeypatch, changed):
    """Its folder may be trained or downloaded anew in between; put back, the run goes on."""
    named = {"student_model_name_or_path": start, "pretrained_model_name_or_path": tmp_path / "teacher"}
    shutil.copytree(teacher, tmp_path / "teacher")
    weights = named[changed] / "transformer" / "diffusion_pytorch_model.safetensors"
    before, update = weights.read_bytes(), Run.update

    def change(self, *models, **options):
        update(self, *models, **options)
        save_file({name: 0.9 * weight for name, weight in load_file(weights).items()}, weights)

    monkeypatch.setattr(Run, "update", change)
    arguments = dmd_flags(start_share=0.5, max_train_steps=2, **named)
    with pytest.raises(ValueError, match=rf"^`{changed}` .* was changed since the run began: put back what was there"):
        train_dmd.main(arguments)
    assert not (tmp_path / "run" / "model_index.json").exists()
    monkeypatch.undo()
    weights.write_bytes(before)
    train_dmd.main([*arguments, "--resume_from_checkpoint", "latest"])
    assert (tmp_path / "run" / "model_index.json").exists()


def test_two_processes_and_two_micro_steps_give_the_weights_of_one(dmd_flags, tmp_path):
    """Two processes that hold every weight, and two that share it."""
    rates = {"learning_rate": 1e-4, "critic_learning_rate": 1e-4, "max_train_steps": 2}
    train_dmd.main(dmd_flags(output_dir=tmp_path / "one", **{**rates, "train_batch_size": 4}))
    train_dmd.main(dmd_flags(output_dir=tmp_path / "cut", gradient_accumulation_steps=2, **rates))
    fork_two(train_dmd.main, dmd_flags(output_dir=tmp_path / "two", **rates))
    fork_two(train_dmd.main, dmd_flags(output_dir=tmp_path / "sharded", **rates), sharded=True)
    for other in ("cut", "two", "sharded"):
        assert largest_relative_difference(student_weights(tmp_path / "one"), student_weights(tmp_path / other)) < 1e-5


def test_a_dry_run_comes_to_a_step_of_the_student(dmd_flags, tmp_path, capsys):
    train_dmd.main(dmd_flags(dry_run=True, student_every=3, max_train_steps=100))
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert ["dm_loss" in line for line in steps] == [False, False, True]
    assert not (tmp_path / "run").exists()


def test_adapters_begin_as_the_teacher_and_are_drawn(dmd_flags, tmp_path):
    train_dmd.main(dmd_flags(rank=2, merge_lora=True))
    assert (tmp_path / "run" / "lora").is_dir()
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "run"), SanaSprintPipeline)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dm_weight": 0}, "--dm_weight is 0.0: it has to be positive"),
        ({"student_every": 0}, "--student_every is 0"),
        ({"max_train_steps": 1}, "--max_train_steps is 1: the student is first updated in step 2 (--student_every)"),
        ({"route_steps": 1}, "--route_steps is 1"),
        ({"noise_share": 1.5}, "--noise_share is 1.5: it is a share, at most 1"),
        ({"start_share": 2, "student_model_name_or_path": "x"}, "--start_share is 2.0: it is a share, at most 1"),
        ({"start_share": 0.2}, "--start_share is of the weights of --student_model_name_or_path: give that too"),
        ({"rank": 2, "student_model_name_or_path": "x"}, "--student_model_name_or_path has others: give one of them"),
    ],
)
def test_wrong_settings_are_named(dmd_flags, capsys, changes, message):
    with pytest.raises(SystemExit):
        train_dmd.main(dmd_flags(**changes))
    assert message in capsys.readouterr().err


def test_what_is_no_student_of_this_teacher_is_refused(dmd_flags, teacher, tmp_path):
    larger = write_tiny_pipeline(tmp_path / "larger")
    tiny_transformer(guidance_embeds=True, num_layers=4).save_pretrained(larger / "transformer")
    for start in (tmp_path / "nowhere", teacher, larger):
        with pytest.raises(ValueError, match="is no consistency student of this teacher") as refused:
            train_dmd.main(dmd_flags(student_model_name_or_path=start))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["nowhere", "a teacher", "of CDM", "without scheduler"])
def test_a_start_of_the_wrong_kind_is_found_before_anything_is_loaded(dmd_flags, kind, monkeypatch, tmp_path):
    """Prompts may take hours to embed."""
    teacher, wrong = FAMILIES["sd3"].make_pipeline(), tmp_path / "wrong"
    teacher.save_pretrained(tmp_path / "sd3")
    monkeypatch.setattr(Distillation, "_load_teacher", lambda distillation: pytest.fail("the teacher was loaded"))
    if kind != "nowhere":
        student = kind == "of CDM"
        teacher.scheduler = FlowStudentScheduler().to_stock() if student else teacher.scheduler
        teacher.save_pretrained(wrong)
    if kind == "without scheduler":
        shutil.rmtree(wrong / "scheduler")
    with pytest.raises(ValueError, match="is no consistency student of this teacher"):
        train_dmd.main(
            dmd_flags(
                pretrained_model_name_or_path=tmp_path / "sd3",
                student_model_name_or_path=wrong,
                guidance_scales=4.5,
                allow_plain_teacher=True,
            )
        )
