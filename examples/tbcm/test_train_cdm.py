"""The script of CDM on a tiny teacher: what it trains, how it goes on, and that diffusers alone draws the student."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SanaPipeline
from PIL import Image
from runs import assert_same_models, fork_two, kill_after_updates, largest_relative_difference, metrics
from safetensors.torch import load_file
from tiny import student_weights, tiny_transformer, write_tiny_pipeline

from diffusers_tbcm.backbones import sana
from diffusers_tbcm.critic import TimedCritic
from diffusers_tbcm.draws import draw_generator, draw_noise
from diffusers_tbcm.evaluation.drawing import call_options, draw_pictures, load_pipeline, numbered_generators
from diffusers_tbcm.flow import flow_prediction, shift_sigmas
from diffusers_tbcm.pipeline_folder import list_checkpoints
from diffusers_tbcm.scheduling_flow import even_sigmas
from diffusers_tbcm.scripts import train_cdm, train_lcm, train_sana_sprint, train_scm, train_tbcm_distill
from diffusers_tbcm.scripts.train_cdm import main
from diffusers_tbcm.training import distillation, drift
from diffusers_tbcm.training.run import Run


CALL = {"guidance_scale": 1.0, "use_resolution_binning": False, "height": 64, "width": 64, "max_sequence_length": 16}


def test_the_student_steps_every_second_time_and_the_critic_always(cdm_flags, teacher, tmp_path):
    main(cdm_flags(use_ema=True))
    run = tmp_path / "run"
    students = [load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3, 4)]
    critics = [load_file(run / f"checkpoint-{step}" / "model_1.safetensors") for step in (1, 2, 3, 4)]
    before = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "transformer.proj_out.weight"
    assert torch.equal(students[0][name], before["proj_out.weight"])  # the first step is the critic's
    moved = [not torch.equal(students[i][name], students[i + 1][name]) for i in range(3)]
    assert moved == [True, False, True]
    assert not any(torch.equal(critics[i][name], critics[i + 1][name]) for i in range(3))
    lines = metrics(run)
    assert [{"ca_loss", "dm_loss", "cdm_loss"} <= entry.keys() for entry in lines] == [False, True, True, True]
    assert lines[1]["loss"] == pytest.approx(sum(lines[1][f"{term}_loss"] for term in ("ca", "dm", "cdm")), rel=1e-5)


@pytest.mark.parametrize("stop", [3, 2], ids=["after a critic's step", "after a student's step"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(cdm_flags, tmp_path, stop):
    main(cdm_flags(use_ema=True))
    main(cdm_flags(use_ema=True, output_dir=tmp_path / "broken", max_train_steps=stop))
    main(cdm_flags(use_ema=True, output_dir=tmp_path / "broken", resume_from_checkpoint="latest"))
    assert_same_models(*(tmp_path / name / "checkpoint-4" for name in ("broken", "run")))
    for name, weight in student_weights(tmp_path / "run").items():
        assert torch.equal(weight, student_weights(tmp_path / "broken")[name])


def test_kill_9_and_resume_give_the_uninterrupted_run_bit_for_bit(cdm_flags, tmp_path):
    """The updates of steps 1 to 4 are: critic; critic, student; critic; critic, student."""
    long = {"use_ema": True, "max_train_steps": 8, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}
    main(cdm_flags(**long))
    broken = tmp_path / "broken"
    arguments = cdm_flags(output_dir=broken, **long)
    kill_after_updates(4, main, arguments)  # in step 3
    assert list_checkpoints(broken)[-1].name == "checkpoint-3"
    arguments += ["--resume_from_checkpoint", "latest"]
    kill_after_updates(1, main, arguments)  # in step 4, between the critic's update and the student's
    assert list_checkpoints(broken)[-1].name == "checkpoint-3"
    kill_after_updates(2, main, arguments)  # in step 4, after both
    assert list_checkpoints(broken)[-1].name == "checkpoint-4"
    main(arguments)
    assert_same_models(broken / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    for name, weight in student_weights(tmp_path / "run").items():
        assert torch.equal(weight, student_weights(broken)[name])
    lines = [[entry for entry in metrics(tmp_path / name) if entry["step"] > 5] for name in ("run", "broken")]
    figures = ("loss", "critic_loss", "grad_norm", "critic_grad_norm", "disagreement", "lr", "critic_lr")
    assert len(lines[0]) == 3
    assert [[line.get(name) for name in figures] for line in lines[1]] == [
        [line.get(name) for name in figures] for line in lines[0]
    ]


@pytest.mark.parametrize("changes", [{}, {"rank": 2, "merge_lora": True}], ids=["all weights", "LoRA"])
def test_a_timed_critic_is_told_learns_and_stays_behind(cdm_flags, tmp_path, monkeypatch, changes):
    told, forward = [], TimedCritic.forward

    def listen(self, sample, timestep, *, drawn_at, **text):
        told.append(drawn_at)
        return forward(self, sample, timestep, drawn_at=drawn_at, **text)

    monkeypatch.setattr(TimedCritic, "forward", listen)
    recorded, record = [], train_cdm.record_rollout

    def keep(*args, **options):
        recorded.append(record(*args, **options))
        return recorded[-1]

    monkeypatch.setattr(train_cdm, "record_rollout", keep)
    main(cdm_flags(timed_critic=True, use_ema=True, **changes))
    own, student, anchors = *told[1:3], recorded[1].timesteps[:, 0]
    assert torch.equal(own, anchors)  # step 2: the critic's own update
    assert torch.equal(student[::2], anchors) and not torch.equal(student[1::2], anchors)  # DM's and CDM's predictions
    checkpoint = load_file(tmp_path / "run" / "checkpoint-4" / "model_1.safetensors")
    assert checkpoint["drawn_at_embedder.linear_2.weight"].abs().max() > 0
    assert not [name for name in student_weights(tmp_path / "run") if "drawn_at" in name]
    assert "timed" in (tmp_path / "run" / "README.md").read_text()
    broken = {"output_dir": tmp_path / "broken", "timed_critic": True, "use_ema": True, **changes}
    main(cdm_flags(max_train_steps=3, **broken))
    main(cdm_flags(resume_from_checkpoint="latest", **broken))
    assert_same_models(*(tmp_path / name / "checkpoint-4" for name in ("broken", "run")))


def test_two_processes_and_two_micro_steps_give_the_weights_of_one(cdm_flags, tmp_path):
    rates = {"learning_rate": 1e-4, "critic_learning_rate": 1e-4, "max_train_steps": 2}
    whole = {"train_batch_size": 4, **rates}
    main(cdm_flags(output_dir=tmp_path / "one", **whole))
    main(cdm_flags(output_dir=tmp_path / "cut", train_batch_size=2, gradient_accumulation_steps=2, **rates))
    fork_two(main, cdm_flags(output_dir=tmp_path / "two", **rates))
    for other in ("cut", "two"):
        assert largest_relative_difference(student_weights(tmp_path / "one"), student_weights(tmp_path / other)) < 1e-5


def test_fsdp2_gives_the_weights_of_one_process_and_resumes_bit_for_bit(cdm_flags, tmp_path):
    one, run = tmp_path / "one", tmp_path / "sharded"
    rates = {"learning_rate": 5e-5, "critic_learning_rate": 5e-5, "use_ema": True, "ema_decay": 0.5}
    main(cdm_flags(output_dir=one, train_batch_size=4, **rates))
    arguments = cdm_flags(output_dir=run, **rates)
    fork_two(main, arguments, sharded=True)
    whole = student_weights(run)
    assert largest_relative_difference(whole, student_weights(one)) < 1e-5
    critic = torch.load(run / "checkpoint-4" / "pytorch_model_fsdp_1.bin", weights_only=True)
    assert largest_relative_difference(critic, load_file(one / "checkpoint-4" / "model_1.safetensors")) < 1e-5
    for checkpoint in ("checkpoint-3", "checkpoint-1"):  # after a critic's step; before any of the student's
        (run / "model_index.json").unlink()
        fork_two(main, [*arguments, "--resume_from_checkpoint", checkpoint], sharded=True)
        assert all(torch.equal(weight, whole[name]) for name, weight in student_weights(run).items()), checkpoint


@pytest.mark.parametrize("time_scale", [1.0, 0.001], ids=["plain time", "dense time"])
def test_diffusers_alone_draws_the_student_as_it_was_rolled_out(cdm_flags, tmp_path, monkeypatch, time_scale):
    """Either kind of teacher is taken, and its stock pipeline feeds the student the time that it knows."""
    monkeypatch.setattr(sana, "infer_timestep_scale", lambda transformer, text: 1000 * time_scale)
    main(cdm_flags(flow_shift=3.0, max_train_steps=2, validation_prompts="a dog"))
    run = tmp_path / "run"
    pipeline = DiffusionPipeline.from_pretrained(run)
    assert pipeline.transformer.config.timestep_scale == time_scale
    assert type(pipeline) is SanaPipeline and type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert not (run / "pipeline.py").exists()
    prompt = {"prompt": "a dog", "complex_human_instruction": None}
    embeds, mask, *_ = pipeline.encode_prompt("a dog", False, complex_human_instruction=None, max_sequence_length=16)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pipeline(**prompt, sigmas=[1.0, 0.5], latents=noise.clone(), output_type="latent", **CALL).images
    sample, times = noise, [1.0, float(shift_sigmas(torch.tensor(0.5), 3.0)), 0.0]
    scale = 1000 * pipeline.transformer.config.timestep_scale
    with torch.no_grad():
        for s, next_s in pairwise(times):
            velocity = pipeline.transformer(
                sample, encoder_hidden_states=embeds, timestep=torch.full((1,), scale * s),
                encoder_attention_mask=mask, return_dict=False,
            )[0]  # fmt: skip
            sample = sample + (next_s - s) * velocity
    torch.testing.assert_close(drawn, sample, atol=1e-5, rtol=1e-4)
    ours = load_pipeline(run, device="cpu")
    options = call_options(ours)
    assert options == {**CALL, "complex_human_instruction": None}
    again = ours("a dog", num_inference_steps=2, latents=noise.clone(), output_type="latent", **options).images
    assert torch.equal(again, drawn)
    for index, steps in enumerate((1, 2, 4)):  # what training has drawn for the card
        expected = next(draw_pictures(ours, ["a dog"], numbered_generators(0), num_inference_steps=steps, **options))
        shown = np.asarray(Image.open(run / "images" / f"{index:02}.png")).astype(int)
        assert np.abs(shown - np.asarray(expected)).max() <= 1
    card = (run / "README.md").read_text()
    assert "sigmas=[1.0, 0.75, 0.5, 0.25]" in card and "arxiv.org/abs/2605.06376" in card and "SanaTBCM" not in card
    assert json.loads((run / "training.json").read_text())["training"]["method"] == train_cdm.METHOD


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_student_and_critic_begin_as_the_teacher_whatever_the_precision(cdm_flags, teacher, monkeypatch, precision):
    add, begun = Run.add, {}

    def keep(self, name, model, **options):
        begun[name] = {key: weight.clone() for key, weight in model.transformer.state_dict().items()}
        return add(self, name, model, **options)

    monkeypatch.setattr(Run, "add", keep)
    main(cdm_flags(mixed_precision=precision, max_train_steps=2))
    expected = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    for name in ("student", "critic"):
        assert begun[name].keys() == expected.keys()
        assert all(torch.equal(begun[name][key], expected[key]) for key in expected), name


def test_a_rollout_knows_this_steps_weights(cdm_flags, monkeypatch):
    record, seen = train_cdm.record_rollout, []

    def watch(student, *args, **kwargs):
        weight = next(student.parameters())
        seen.append((weight.detach().clone(), weight))
        return record(student, *args, **kwargs)

    monkeypatch.setattr(train_cdm, "record_rollout", watch)
    losses = train_cdm.student_losses

    def check(settings, run, distillation, student, critic, rows):
        before, weight = seen[-1]
        assert torch.equal(before, weight)  # nothing has moved since the rollout of this step
        torch.testing.assert_close(
            flow_prediction(rows.latents, rows.velocity, rows.timesteps), rows.pred_original_sample
        )
        return losses(settings, run, distillation, student, critic, rows)

    monkeypatch.setattr(train_cdm, "student_losses", check)
    main(cdm_flags())
    assert len(seen) == 4


@pytest.mark.parametrize("everywhere", [False, True])
def test_guidance_works_on_the_rollout_below_its_time_or_everywhere(cdm_flags, monkeypatch, everywhere):
    """The paper's CA is of the rollout's points, tau below their time; else CA is of all that DM and CDM see."""
    noised, augmentation_loss, losses = train_cdm.noised, train_cdm.augmentation_loss, train_cdm.student_losses
    points, parts, checked = {}, [], []

    def note_point(run, prediction, upper, stream):
        made = noised(run, prediction, upper, stream)
        points[stream] = prediction, upper, made[0], made[1]
        return made

    def note_part(prediction, real, unconditional, alpha):
        parts.append((augmentation_loss(prediction, real, unconditional, alpha), real, unconditional))
        return parts[-1][0]

    def check(settings, run, distillation, student, critic, rows):
        points.clear(), parts.clear()
        found = losses(settings, run, distillation, student, critic, rows)
        assert points.keys() - {train_cdm.CA_OFF_ROLLOUT} == {train_cdm.CA, train_cdm.DM, train_cdm.CDM}
        places = {train_cdm.CA: train_cdm.DM} | ({train_cdm.CA_OFF_ROLLOUT: train_cdm.CDM} if everywhere else {})
        texts = rows.text, distillation.negative_text.expand(len(rows))
        for (guided, matched), (_, *actual) in zip(places.items(), parts, strict=True):
            *_, z, tau = points[guided]
            for text, prediction in zip(texts, actual, strict=True):
                (expected,) = train_cdm.predictions(distillation.teacher, [z], [tau], text=text)
                torch.testing.assert_close(prediction, expected)
            assert torch.equal(points[guided][0], points[matched][0])
            assert torch.equal(points[guided][1], torch.ones_like(rows.timesteps) if everywhere else rows.timesteps)
            assert not torch.equal(points[guided][2], points[matched][2])  # another noise
        assert torch.equal(found["ca"], torch.stack([loss for loss, *_ in parts]).sum()) and found["ca"] > 0
        checked.append(True)
        return found

    monkeypatch.setattr(train_cdm, "noised", note_point)
    monkeypatch.setattr(train_cdm, "augmentation_loss", note_part)
    monkeypatch.setattr(train_cdm, "student_losses", check)
    main(cdm_flags(augment_everywhere=everywhere))
    assert checked


def test_the_memory_plan_counts_what_adapters_share_once(cdm_flags, monkeypatch):
    plan, made = distillation.memory_plan, []
    monkeypatch.setattr(
        distillation, "memory_plan", lambda *args, **more: made.append(plan(*args, **more)) or made[-1]
    )
    main(cdm_flags(max_train_steps=2, rank=2))
    (found,) = made
    assert found["student"] == found["critic"] == found["gradients"] > 0
    assert found["student"] < 0.5 * found["teacher"] and found["optimiser"] == 2 * 2 * found["student"]


def test_the_memory_plan_counts_all_three_networks(cdm_flags, teacher, capsys):
    main(cdm_flags(use_ema=True, dry_run=True))
    plans = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Memory plan: ")]
    parts = [part.rpartition(" ")[0] for part in plans[0].partition(" = ")[2].split(", ")]
    assert len(plans) == 2 and parts == [
        "teacher", "text encoder", "student", "critic", "gradients", "optimiser", "EMA", "activations",
        "recomputed block",
    ]  # fmt: skip


def test_the_alarm_looks_at_what_the_stock_pipelines_draw_and_changes_no_weight(
    cdm_flags, plain_teacher, tmp_path, monkeypatch, caplog
):
    fit, seen = drift.fit_colours, []
    monkeypatch.setattr(drift, "fit_colours", lambda *made: seen.append(made) or fit(*made))
    one_prompt = tmp_path / "prompt.txt"
    one_prompt.write_text("a dog\n")
    options = {"pretrained_model_name_or_path": plain_teacher, "prompts_file": one_prompt}
    options |= {"augmentation_scale": 2.5, "max_train_steps": 5, "learning_rate": 0.02}
    main(cdm_flags(drift_steps=2, drift_tolerance=1e-3, **options))
    ((latents, pictures),) = seen
    pipeline = SanaPipeline.from_pretrained(plain_teacher)
    noise = draw_noise((4, 8, 8), [draw_generator(draw, 0) for draw in range(len(latents))])
    call = CALL | {
        "prompt": "a dog", "num_images_per_prompt": 8, "complex_human_instruction": None, "guidance_scale": 3.5,
        "sigmas": even_sigmas(20), "latents": noise,
    }  # fmt: skip
    drawn = pipeline(**call, output_type="latent").images
    torch.testing.assert_close(latents, drawn, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(pictures, pipeline(**call, output_type="pt").images, atol=1e-3, rtol=1e-3)

    lines = [line for line in metrics(tmp_path / "run") if line["step"] in (1, 3, 5)]  # looked at before the step
    assert len({line["teacher_brightness"] for line in lines}) == 1
    assert len({line["brightness"] for line in lines}) == len({line["saturation"] for line in lines}) == 3
    assert "has drifted to" in caplog.text
    main(cdm_flags(output_dir=tmp_path / "unwatched", drift_steps=0, **options))
    assert "brightness" not in metrics(tmp_path / "unwatched")[-1]
    for name, weight in student_weights(tmp_path / "unwatched").items():
        assert torch.equal(weight, student_weights(tmp_path / "run")[name])


def test_the_teacher_stays_and_no_loss_reaches_the_critic(cdm_flags, teacher, monkeypatch):
    losses = train_cdm.student_losses

    def check(settings, run, distillation, student, critic, rows):
        found = losses(settings, run, distillation, student, critic, rows)
        sum(found.values()).backward(retain_graph=True)
        assert all(parameter.grad is None for parameter in critic.parameters())
        assert all(parameter.grad is None for parameter in distillation.teacher.parameters())
        assert any(parameter.grad is not None for parameter in student.parameters())
        student.zero_grad()
        now, before = distillation.teacher.transformer.state_dict(), load_file(weights)
        assert all(torch.equal(now[name], before[name]) for name in before)
        return found

    weights = teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    monkeypatch.setattr(train_cdm, "student_losses", check)
    main(cdm_flags())


def test_a_plain_teacher_that_consistency_training_refuses_is_distilled(
    cdm_flags, flags, picture_flags, plain_teacher, tmp_path
):
    consistency = (
        (train_tbcm_distill, flags), (train_scm, picture_flags), (train_sana_sprint, picture_flags),
        (train_lcm, picture_flags),
    )  # fmt: skip
    for script, arguments in consistency:
        with pytest.raises(ValueError) as refused:
            script.main(arguments(pretrained_model_name_or_path=plain_teacher))
        message = str(refused.value)
        assert "\n" not in message and "CDM with train_cdm.py" in message and "train prepare_teacher" in message
        assert "names a plain teacher, which sees time multiplied by 1000" in message
    main(cdm_flags(pretrained_model_name_or_path=plain_teacher))  # into the folder of the runs that were refused
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline) is SanaPipeline and pipeline.transformer.config.timestep_scale == 1.0
    (picture,) = pipeline("a dog", sigmas=[1.0, 0.5], complex_human_instruction=None, **CALL).images
    assert picture.size == (64, 64)
    expected, actual = student_weights(plain_teacher), student_weights(tmp_path / "run")
    assert actual.keys() == expected.keys() and largest_relative_difference(actual, expected) > 0


def test_a_teacher_that_embeds_guidance_is_refused(cdm_flags, tmp_path):
    teacher = write_tiny_pipeline(tmp_path / "guided")
    tiny_transformer(guidance_embeds=True).save_pretrained(teacher / "transformer")
    with pytest.raises(ValueError, match="a teacher that embeds guidance: it has no unconditional branch"):
        main(cdm_flags(pretrained_model_name_or_path=teacher))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchor_range": [0.9, 0.1]}, "--anchor_range is [0.9, 0.1]: it has to ascend"),
        ({"max_rollout_steps": 0}, "--max_rollout_steps is 0"),
        ({"student_every": 0}, "--student_every is 0"),
        ({"max_train_steps": 1}, "--max_train_steps is 1: the student is first updated in step 2 (--student_every)"),
        ({"critic_learning_rate": 0}, "--critic_learning_rate is 0"),
        ({"ca_weight": 0, "dm_weight": 0, "cdm_weight": 0}, "there is nothing to train the student on"),
        ({"rank": 0}, "--rank is 0"),
        ({"lora_alpha": 4}, "--lora_alpha needs --rank"),
    ],
)
def test_wrong_settings_are_named(cdm_flags, capsys, changes, message):
    with pytest.raises(SystemExit):
        main(cdm_flags(**changes))
    assert message in capsys.readouterr().err
