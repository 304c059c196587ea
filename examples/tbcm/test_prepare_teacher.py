"""prepare_teacher.py on a tiny plain Sana."""

import json
import re
import shlex
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SanaPipeline
from families import FAMILIES
from peft import LoraConfig
from runs import assert_same_state, fork_two, largest_relative_difference, metrics
from safetensors.torch import load_file, save_file
from tiny import generate, student_weights, write_plain_pipeline, write_tiny_flow_lora, write_tiny_pipeline

from diffusers_tbcm import dense_time
from diffusers_tbcm.backbones.sana import TIME_EMBEDDER, load_transformer, timestep_scale
from diffusers_tbcm.export.model_card import render_model_card
from diffusers_tbcm.export.selection import select_files
from diffusers_tbcm.scripts import prepare_teacher, train_scm, train_tbcm_distill
from diffusers_tbcm.scripts.prepare_teacher import PreparationSettings, main
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import parse_settings
from examples.tbcm.conftest import arguments


@pytest.fixture
def prepare_flags(shared_flags, prompts_file, plain_teacher):
    """The flags of a short preparation of a plain teacher, with changes."""
    short = {
        "pretrained_model_name_or_path": plain_teacher, "prompts_file": prompts_file, "route_steps": 3,
        "held_out_prompts": 2, "max_train_steps": 0, "checkpointing_steps": 1, "logging_steps": 1,
    }  # fmt: skip
    return lambda **changes: arguments(**(shared_flags | short | changes))


@pytest.fixture(scope="session")
def lora(plain_teacher, tmp_path_factory):
    """A LoRA as diffusers' training scripts save it: of a plain teacher's attention, and strong."""
    transformer = load_transformer(plain_teacher)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, weight in transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
            layers[name.replace(".default", "")] = weight.detach()
    folder = tmp_path_factory.mktemp("lora")
    SanaPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


@pytest.fixture(scope="session")
def unnormalised_teacher(tmp_path_factory):
    """A plain teacher whose queries and keys are not normalised, as those of Sana 1.0, and attend sharply."""
    folder = write_plain_pipeline(tmp_path_factory.mktemp("unnormalised_teacher"), qk_norm=None)
    transformer = load_transformer(folder).requires_grad_(False)
    for block in transformer.transformer_blocks:
        block.attn2.to_q.weight *= 10
        block.attn2.to_k.weight *= 10
    transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def asked(monkeypatch):
    """The draws of every recording, as they are asked for."""
    asked = []
    record = prepare_teacher.record_trajectories

    def noting(*arguments):
        inner = record(*arguments)
        return lambda draws: asked.append(draws) or inner(draws)

    monkeypatch.setattr(prepare_teacher, "record_trajectories", noting)
    return asked


def psnr(first, second):
    return -10 * (first - second).square().mean().log10().item()


def card_entry(folder, name):
    return json.loads((folder / "training.json").read_text())["training"][name]


def test_the_fit_alone_gives_a_dense_teacher_that_draws_what_the_plain_one_draws(
    prepare_flags, flags, plain_teacher, tmp_path
):
    main(prepare_flags(validation_prompts=["a dog", "an owl"]))
    folder = tmp_path / "run"
    prepared, plain = DiffusionPipeline.from_pretrained(folder), SanaPipeline.from_pretrained(plain_teacher)
    assert type(prepared) is SanaPipeline and type(prepared.scheduler) is FlowMatchEulerDiscreteScheduler
    assert dict(prepared.scheduler.config) == dict(plain.scheduler.config)
    assert prepared.transformer.config.timestep_scale == 0.001 and timestep_scale(prepared.transformer) == 1
    call = {"num_inference_steps": 20, "height": 64, "width": 64, "use_resolution_binning": False}
    found = psnr(*(generate(pipeline, ["a dog", "an owl"], **call) for pipeline in (prepared, plain)))
    assert found > 30
    said = float(re.match(r"PSNR (\d+\.\d) dB", card_entry(folder, "pictures"))[1])
    assert said > 30  # from other noises
    before, after = student_weights(plain_teacher), student_weights(folder)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.startswith(TIME_EMBEDDER)
    }
    assert not [*folder.glob("checkpoint-*")] and (folder / "validation" / "step-0.png").is_file()

    main(prepare_flags(output_dir=tmp_path / "again", resume_from_checkpoint=None))  # deterministic
    again = student_weights(tmp_path / "again")
    assert all(torch.equal(after[name], again[name]) for name in after)

    with pytest.raises(ValueError, match="is in dense time already: distil it as it is"):
        main(prepare_flags(pretrained_model_name_or_path=folder, output_dir=tmp_path / "twice"))
    student = tmp_path / "student"
    train_tbcm_distill.main(flags(pretrained_model_name_or_path=folder, output_dir=student, max_train_steps=1))
    assert (student / "model_index.json").is_file()


def test_alignment_makes_up_for_a_poor_fit_and_resumes_bit_for_bit(prepare_flags, monkeypatch, tmp_path):
    monkeypatch.setattr(dense_time, "RIDGE", 1.0)
    aligned = {"max_train_steps": 30, "learning_rate": 1e-4, "checkpointing_steps": 10, "use_ema": True}
    aligned["ema_decay"] = 0.8
    main(prepare_flags(**aligned))
    folder = tmp_path / "run"
    before, after = map(float, re.findall(r"\d\S*", card_entry(folder, "relative error of v'")))
    assert after < 0.7 * before
    losses = [line["loss"] for line in metrics(folder)]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.7 * sum(losses[:5])

    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed)
    main(prepare_flags(**aligned, output_dir=resumed, resume_from_checkpoint=resumed / "checkpoint-10"))
    assert_same_state(resumed / "checkpoint-30", folder / "checkpoint-30")
    expected, actual = student_weights(folder), student_weights(resumed)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert card_entry(resumed, "relative error of v'") == card_entry(folder, "relative error of v'")


def test_the_card_says_how_it_was_made_and_the_folder_can_be_pushed(prepare_flags, plain_teacher, tmp_path):
    main(prepare_flags(max_train_steps=1))
    folder = tmp_path / "run"
    card = (folder / "README.md").read_text()
    assert "in *dense time*" in card and "the network was then aligned" in card and "- dense-time" in card
    for words in ("| steps | 1 |", "before alignment", "relative residual", "3 steps, the teacher's shift"):
        assert words in card
    assert f"| teacher | `{plain_teacher.name}` |" in card
    command = re.search(r"diffusers-tbcm train tbcm_distill (.*)", card)[1]
    assert shlex.split(command)[:2] == ["--pretrained_model_name_or_path", "run"]
    renamed = render_model_card(folder, license="apache-2.0", model_id="me/teacher")
    assert renamed.data.license == "apache-2.0" and 'from_pretrained("me/teacher")' in renamed.text
    files = select_files(folder).files
    assert {"README.md", "training.json", "transformer/config.json", "model_index.json"} <= files.keys()
    assert not any(name.startswith("checkpoint-") for name in files)


@pytest.mark.parametrize("rank", [None, 2])
def test_alignment_that_comes_no_closer_is_left_out(prepare_flags, rank, tmp_path, caplog):
    main(prepare_flags(output_dir=tmp_path / "fit"))
    main(prepare_flags(max_train_steps=2, learning_rate=1e-1, lr_scheduler="constant", rank=rank))
    assert "alignment is left out of what is saved" in caplog.text
    assert card_entry(tmp_path / "run", "relative error of v'").endswith("after, which was left out")
    fitted, saved = student_weights(tmp_path / "fit"), student_weights(tmp_path / "run")
    assert all(torch.equal(saved[name], fitted[name]) for name in fitted)


def test_alignment_is_left_out_of_a_teacher_with_a_lora_by_one_process_alone(
    prepare_flags, lora, monkeypatch, tmp_path
):
    """The others do not come along: what they all have to say to each other is said before."""
    noted, depends_on = [], Run.depends_on
    monkeypatch.setattr(
        Run, "depends_on", lambda self, **content: noted.append({*content}) or depends_on(self, **content)
    )
    main(prepare_flags(lora=lora, output_dir=tmp_path / "fit"))
    of_the_fit, noted[:] = [*noted], []
    main(prepare_flags(lora=lora, max_train_steps=2, learning_rate=1e-1, lr_scheduler="constant"))
    assert card_entry(tmp_path / "run", "relative error of v'").endswith("after, which was left out")
    assert noted == of_the_fit and {"lora"} in noted
    fitted, saved = student_weights(tmp_path / "fit"), student_weights(tmp_path / "run")
    assert all(torch.equal(saved[name], fitted[name]) for name in fitted)


@pytest.mark.parametrize("rank", [None, 2])
def test_queries_and_keys_are_normalised_aligned_and_distilled(
    prepare_flags, flags, unnormalised_teacher, rank, monkeypatch, tmp_path
):
    monkeypatch.setattr(dense_time, "RIDGE", 1.0)  # a poor fit of time, too
    aligned = {
        "pretrained_model_name_or_path": unnormalised_teacher, "qk_norm": True, "rank": rank, "max_train_steps": 30,
        "checkpointing_steps": 10, "use_ema": True, "ema_decay": 0.8, "gradient_checkpointing": True,
        "learning_rate": 1e-4 if rank is None else 1e-3,
    }  # fmt: skip
    main(prepare_flags(**aligned, validation_prompts=["a dog"]))
    folder = tmp_path / "run"
    prepared = SanaPipeline.from_pretrained(folder).transformer
    assert prepared.config.qk_norm == "rms_norm_across_heads" and timestep_scale(prepared) == 1
    fitted, normalised, after = map(float, re.findall(r"\d\S*", card_entry(folder, "relative error of v'")))
    assert fitted < normalised and after < 0.8 * normalised
    card = (folder / "README.md").read_text()
    assert "| queries and keys | normalised" in card and "its queries and keys were normalised" in card
    assert (card_entry(folder, "weights") == "all") is (rank is None)

    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed)
    main(prepare_flags(**aligned, output_dir=resumed, resume_from_checkpoint=resumed / "checkpoint-10"))
    assert_same_state(resumed / "checkpoint-30", folder / "checkpoint-30")
    saved, again = student_weights(folder), student_weights(resumed)
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    assert card_entry(resumed, "relative error of v'") == card_entry(folder, "relative error of v'")

    main(prepare_flags(**aligned | {"max_train_steps": 0}, output_dir=tmp_path / "fit"))
    fit = student_weights(tmp_path / "fit")
    norms = {name for name in fit if ".norm_q." in name or ".norm_k." in name}
    assert fit.keys() == saved.keys() and len(norms) == 8  # of 2 blocks
    assert all(not torch.equal(fit[name], saved[name]) for name in norms)
    before = student_weights(unnormalised_teacher)
    assert {name for name in before if not torch.equal(before[name], fit[name])} == {
        name for name in before if name.startswith(TIME_EMBEDDER)
    }
    train_tbcm_distill.main(
        flags(pretrained_model_name_or_path=folder, output_dir=tmp_path / "student", max_train_steps=1)
    )
    assert "transformer_blocks.0.attn1.norm_q.weight" in student_weights(tmp_path / "student")


@pytest.mark.parametrize("rank", [None, 2])
def test_norms_are_as_they_were_fitted_where_alignment_is_left_out(
    prepare_flags, unnormalised_teacher, rank, tmp_path, caplog
):
    own = {"pretrained_model_name_or_path": unnormalised_teacher, "qk_norm": True, "rank": rank}
    main(prepare_flags(**own, output_dir=tmp_path / "fit"))
    main(prepare_flags(**own, max_train_steps=2, learning_rate=3.0, lr_scheduler="constant"))
    assert "alignment is left out of what is saved" in caplog.text
    fitted, saved = student_weights(tmp_path / "fit"), student_weights(tmp_path / "run")
    assert saved.keys() == fitted.keys() and all(torch.equal(saved[name], fitted[name]) for name in fitted)


@pytest.mark.parametrize("rank", [None, 2])
def test_two_processes_align_norms_as_one_does(prepare_flags, unnormalised_teacher, rank, tmp_path):
    own = {"pretrained_model_name_or_path": unnormalised_teacher, "qk_norm": True, "rank": rank, "use_ema": True}
    main(prepare_flags(**own, max_train_steps=2, train_batch_size=2, output_dir=tmp_path / "one"))
    fork_two(main, prepare_flags(**own, max_train_steps=2, train_batch_size=1, output_dir=tmp_path / "two"))
    one, two = (load_file(tmp_path / name / "checkpoint-2" / "ema.safetensors") for name in ("one", "two"))
    norms = [
        {name: weight for name, weight in each.items() if ".norm_q." in name or ".norm_k." in name}
        for each in (two, one)
    ]
    assert len(norms[0]) == 8 and largest_relative_difference(*norms) < 1e-6
    assert largest_relative_difference(two, one) < 1e-3  # adapters begin at 0, and Adam steps by a gradient's sign


def test_norms_are_fitted_on_other_trajectories_than_v_is_measured_on(prepare_flags, unnormalised_teacher, asked):
    main(prepare_flags(pretrained_model_name_or_path=unnormalised_teacher, qk_norm=True))
    held_out, for_norms = prepare_teacher.HELD_OUT, prepare_teacher.FOR_NORMS
    assert asked == [[held_out], [held_out + 1], [for_norms], [for_norms + 1]]


def test_norms_are_refused_to_a_teacher_that_has_them_and_to_other_families(prepare_flags, tmp_path, monkeypatch):
    FAMILIES["sd3"].make_pipeline().save_pretrained(tmp_path / "sd3")
    monkeypatch.setattr(prepare_teacher.Preparation, "_load_teacher", lambda self: pytest.fail("weights were loaded"))
    for changes, message in (
        ({}, "`qk_norm`: the teacher normalises its queries and keys already: leave it out"),
        (
            {"pretrained_model_name_or_path": tmp_path / "sd3"},
            "`qk_norm` is for a Sana alone, and the teacher is a StableDiffusion3Pipeline: leave it out",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            main(prepare_flags(qk_norm=True, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("as_file", [False, True])
def test_a_lora_is_merged_into_the_teacher_first(prepare_flags, plain_teacher, lora, as_file, tmp_path):
    given = lora / "pytorch_lora_weights.safetensors" if as_file else lora
    main(prepare_flags(lora=given, lora_scale=0.5))
    expected = SanaPipeline.from_pretrained(plain_teacher)
    expected.load_lora_weights(lora)
    expected.fuse_lora(lora_scale=0.5)
    expected.unload_lora_weights()
    merged, plain = student_weights(tmp_path / "run"), student_weights(plain_teacher)
    for name, weight in expected.transformer.state_dict().items():
        if not name.startswith(TIME_EMBEDDER):
            torch.testing.assert_close(merged[name], weight)
    changed = [name for name in plain if not torch.equal(plain[name], merged[name])]
    assert sum("to_q" in name or "to_v" in name for name in changed) == len(changed) - 4 > 0
    assert "scale 0.5" in card_entry(tmp_path / "run", "LoRA merged into the teacher")


def test_a_lora_that_is_none_of_this_teacher_is_refused(prepare_flags, plain_teacher, tmp_path):
    dense = write_tiny_pipeline(tmp_path / "dense")
    student = write_tiny_flow_lora(tmp_path / "student", dense)
    torch_less = tmp_path / "other"
    SanaPipeline.save_lora_weights(
        torch_less, transformer_lora_layers={"elsewhere.lora_A.weight": torch.zeros(2, 4)}, safe_serialization=True
    )
    for given, message in (
        (student, "`lora` .* makes a few-step student of its teacher"),
        (torch_less, "lora .*"),
        (tmp_path / "nowhere", "lora '.*nowhere' "),
    ):
        with pytest.raises(ValueError, match=message):
            main(prepare_flags(lora=given))
    assert not (tmp_path / "run").exists()


def test_a_lora_that_was_changed_since_the_run_began_is_not_read_again(prepare_flags, lora, monkeypatch, tmp_path):
    """Where alignment is left out."""
    weights, update = tmp_path / "lora.safetensors", Run.update
    shutil.copy(lora / "pytorch_lora_weights.safetensors", weights)

    def change(self, *models):
        update(self, *models)
        save_file({name: 0.9 * weight for name, weight in load_file(weights).items()}, weights)

    monkeypatch.setattr(Run, "update", change)
    with pytest.raises(ValueError, match=r"^`lora` .* was changed since the run began"):
        main(prepare_flags(lora=weights, max_train_steps=2, learning_rate=1e-1, lr_scheduler="constant"))


def test_another_lora_is_refused_at_resumption_whatever_its_name(prepare_flags, lora, tmp_path):
    given = tmp_path / "lora"
    shutil.copytree(lora, given)
    main(prepare_flags(lora=given, max_train_steps=1))
    main(prepare_flags(max_train_steps=1, output_dir=tmp_path / "without"))
    on = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    for wrong in ({}, {"lora": given, "output_dir": tmp_path / "without"}):
        with pytest.raises(ValueError, match="was trained with another lora"):
            main(prepare_flags(**on, **wrong))
    SanaPipeline.save_lora_weights(
        given,
        transformer_lora_layers={
            f"transformer_blocks.0.attn1.to_q.lora_{part}.weight": torch.ones(shape)
            for part, shape in (("A", (1, 64)), ("B", (64, 1)))
        },
    )
    with pytest.raises(ValueError, match="was trained with another lora"):
        main(prepare_flags(lora=given, **on))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_adapters_of_the_alignment_are_merged(prepare_flags, plain_teacher, monkeypatch, tmp_path, precision):
    monkeypatch.setattr(dense_time, "RIDGE", 1.0)
    main(prepare_flags(max_train_steps=5, rank=2, validation_prompts=["a dog"], mixed_precision=precision))
    before, after = student_weights(plain_teacher), student_weights(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("to_q" in name for name in changed) and not any("norm" in name for name in changed)
    assert not any(name.startswith(("patch_embed", "caption_projection", "proj_out")) for name in changed)
    assert card_entry(tmp_path / "run", "weights") == "LoRA of rank 2"
    assert not (tmp_path / "run" / "lora").exists()


def test_the_refusal_of_a_plain_teacher_names_a_command_that_can_be_run(
    flags, plain_teacher, prompts_file, picture_flags, tmp_path
):
    for script, given, prompts in (
        (train_tbcm_distill, flags, str(prompts_file)), (train_scm, picture_flags, "PROMPTS")
    ):  # fmt: skip
        with pytest.raises(ValueError, match="Prepare it first") as refused:
            script.main(given(pretrained_model_name_or_path=plain_teacher))
        command = re.search(r"diffusers-tbcm (train prepare_teacher .*) -- or distil", str(refused.value))[1]
        settings = parse_settings(PreparationSettings, shlex.split(command)[2:])
        assert settings.pretrained_model_name_or_path == str(plain_teacher)
        assert settings.prompts_file == prompts and settings.output_dir == f"{tmp_path / 'run'}-teacher"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_train_steps": -1}, "--max_train_steps is -1: it must not be negative"),
        ({"route_steps": 1}, "--route_steps is 1: a trajectory has at least 2"),
        ({"held_out_prompts": 0}, "--held_out_prompts is 0: it has to be positive"),
        ({"guidance_scales": [0.0]}, r"--guidance_scales is \[0.0\]: every scale has to be positive"),
    ],
)
def test_settings_that_do_not_fit_are_refused(prepare_flags, changes, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(prepare_flags(**changes))
    assert re.search(message, capsys.readouterr().err)


def test_copies_in_half_precision_are_of_the_merged_adapters(prepare_flags, tmp_path):
    main(prepare_flags(rank=2, export_variants=["bf16"]))
    assert (tmp_path / "run" / "transformer" / "diffusion_pytorch_model.bf16.safetensors").is_file()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_dry_run_leaves_nothing(prepare_flags, plain_teacher, unnormalised_teacher, qk_norm, tmp_path, capsys):
    own = {"pretrained_model_name_or_path": unnormalised_teacher if qk_norm else plain_teacher, "qk_norm": qk_norm}
    main(prepare_flags(**own, max_train_steps=100, dry_run=True, validation_prompts=["a dog"]))
    assert "everything ran once" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_trajectories_that_are_held_out_are_none_of_training(prepare_flags, asked):
    main(prepare_flags(max_train_steps=3))
    assert asked[:2] == [[prepare_teacher.HELD_OUT], [prepare_teacher.HELD_OUT + 1]]
    assert sorted(draw for draws in asked[2:] for draw in draws) == [0, 1, 2]


def test_no_more_trajectories_are_held_out_at_once_than_a_step_takes(prepare_flags, asked, tmp_path):
    found = []
    for size, recorded in ((2, [2, 1]), (3, [3])):
        asked.clear()
        where = {"output_dir": tmp_path / f"{size}", "resume_from_checkpoint": None}
        main(prepare_flags(held_out_prompts=3, train_batch_size=size, **where))
        assert [len(draws) for draws in asked] == recorded
        found.append(card_entry(tmp_path / f"{size}", "relative error of v'"))
    assert found[0] == found[1]
