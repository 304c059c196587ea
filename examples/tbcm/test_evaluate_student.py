"""The evaluation script on tiny pipelines: what it writes, how it resumes, and one process against two."""

import ast
import csv
import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from PIL import Image
from runs import fork_two
from safetensors.torch import load_file, save_file
from tiny import save_tiny_clip, tiny_tbcm_pipeline, tiny_transformer, write_tiny_flow_lora
from transformers import Dinov2Config, Dinov2Model

from diffusers_tbcm import TBCMScheduler
from diffusers_tbcm.data.prompts import EvaluationPrompts
from diffusers_tbcm.draws import draw_generator
from diffusers_tbcm.evaluation.features import Dinov2Features, MobileNetFeatures
from diffusers_tbcm.evaluation.preference import PickScorer
from diffusers_tbcm.evaluation.reference import FeatureReference
from diffusers_tbcm.evaluation.text_image import CLIPScorer
from diffusers_tbcm.export.folders import save_flow_student, save_student_pipeline
from diffusers_tbcm.export.record import StudentDescription, load_metrics
from diffusers_tbcm.owned import OwnedFolder
from diffusers_tbcm.scheduling_flow import FlowStudentScheduler
from examples.tbcm.evaluate_student import Settings, Task, check_task, main, parse_settings
from examples.tbcm.mini_teacher.emoji_metrics import TEACHER_DIR


SCRIPT = Path(__file__).with_name("evaluate_student.py")
PROMPTS = [f"{count} {colour} dogs" for count in range(7) for colour in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tiny_tbcm_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(student, tmp_path):
    """The flags of a small evaluation, with changes."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": p, "colour": p.split()[1]}) for p in PROMPTS))

    def build(**changes):
        values = {
            "model": student,
            "prompts_file": prompts,
            "caption_column": "prompt",
            "output_dir": tmp_path / "out",
            "steps": 1,
            "max_sequence_length": 16,
            "no-complex_human_instruction": True,
            "resolution": 32,
            "bootstrap_resamples": 20,
            "debug": True,  # errors come as they are raised
            **changes,
        }
        flags = []
        for name, value in values.items():
            if value is not None:
                flags += [f"--{name}"] + ([] if value is True else str(value).split(" "))
        return flags

    return build


@pytest.fixture
def few_components(monkeypatch):
    monkeypatch.setattr(MobileNetFeatures, "num_components", 8)  # so that 21 pictures suffice


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def test_an_evaluation_against_the_teacher_writes_metrics_and_a_plot(
    arguments, teacher, few_components, tmp_path, capsys
):
    flags = arguments(
        teacher=teacher, teacher_steps="1 2", steps="2 1", reference_teacher=True, label_column="colour",
        text_image_head=TEACHER_DIR, num_images_per_prompt=2,
    )  # fmt: skip
    main(flags)
    found = load_metrics(tmp_path / "out")
    rows = {(row.model, row.num_inference_steps): row for row in found.measurements}
    assert list(rows) == [("teacher", 1), ("teacher", 2), ("student", 2), ("student", 1)]
    names = [
        "MobileNet-FD", "MobileNet-KD", "precision", "recall", "top-1 retrieval", "top-5 retrieval",
        "text-image head score", "diversity", "decisiveness", "s / image", "diversity / teacher's",
    ]  # fmt: skip
    for row in rows.values():
        assert list(row.metrics) == names and {*row.intervals} == {*names} - {"s / image", "diversity / teacher's"}
        assert all(low <= row.metrics[name] <= high for name, (low, high) in row.intervals.items())
    # The reference is the teacher's own pictures from other noise: near its others, and not equal to them.
    distances = {key: row.metrics["MobileNet-FD"] for key, row in rows.items()}
    assert min(distances, key=distances.get)[0] == "teacher" and distances["teacher", 2] > 0
    assert rows["teacher", 2].metrics["diversity / teacher's"] == 1
    assert rows["teacher", 2].metrics["decisiveness"] == pytest.approx(1, abs=1e-12)
    assert rows["student", 1].intervals["decisiveness"][0] > 0.1  # untrained, but from the same noise
    reference = FeatureReference.load(tmp_path / "out" / "reference.safetensors")
    assert len(reference.features) == 42 and reference.labels[:4] == ("red", "red", "green", "green")
    assert reference.prompts == tuple(prompt for prompt in PROMPTS for _ in range(2))
    assert found.dataset == "21 prompts of prompts.jsonl"
    assert found.command.startswith("python examples/tbcm/evaluate_student.py --model ")
    assert str(tmp_path) not in found.command and "--teacher_steps 1 2" in found.command
    assert found.details["text_image_head"]["held-out pairs"]["pictures"] == 100
    with Image.open(tmp_path / "out" / "metrics.png") as picture:
        assert picture.width > 1000
    assert "MobileNet-FD" in capsys.readouterr().out
    with (tmp_path / "out" / "prompts.csv").open(newline="") as file:
        table = [*csv.DictReader(file)]
    assert [row["prompt"] for row in table] == 4 * PROMPTS
    assert [*table[0]] == ["model", "steps", "prompt", "text-image head score", "diversity"]
    of_student = [float(row["diversity"]) for row in table if (row["model"], row["steps"]) == ("student", "2")]
    assert sum(of_student) / 21 == pytest.approx(rows["student", 2].metrics["diversity"], rel=1e-5)

    # The same command again draws nothing; without one picture it draws that one, the same.
    folder = tmp_path / "out" / "pictures" / "student-2-steps"
    before = pictures(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    (folder / "000003-01.png").unlink()
    main(flags)
    after = pictures(folder)
    assert before.keys() == after.keys() and len(after) == 42
    assert max(np.abs(before[name] - after[name]).max() for name in before) <= 1  # its batch was another
    unchanged = {path for path, time in times.items() if path.stat().st_mtime_ns == time}
    assert {path.name for path in times.keys() - unchanged} == {"000003-01.png"}
    again = {(row.model, row.num_inference_steps): row for row in load_metrics(tmp_path / "out").measurements}
    assert again["teacher", 1].metrics["MobileNet-FD"] == rows["teacher", 1].metrics["MobileNet-FD"]


def test_scores_and_features_are_measured_once_for_every_picture(arguments, tmp_path, monkeypatch):
    clip = save_tiny_clip(make(tmp_path / "clip"))
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path / "dinov2")
    flags = arguments(
        clip_model=clip, pickscore_model=clip, features="dinov2", dinov2_model=tmp_path / "dinov2",
        num_images_per_prompt=2,
    )  # fmt: skip
    main(flags)
    metrics = load_metrics(tmp_path / "out").measurements[0].metrics
    assert list(metrics) == ["CLIP score", "PickScore", "diversity", "s / image"]
    assert load_metrics(tmp_path / "out").details["features"] == ["dinov2"]
    kept = {path.name for path in (tmp_path / "out" / "pictures" / "student-1-steps").glob("*.safetensors")}
    assert kept == {"clip_score.safetensors", "pickscore.safetensors", "dinov2features.safetensors"}

    def refuse(self, *arguments):
        raise AssertionError("measured again")

    for scorer in (CLIPScorer, PickScorer):
        monkeypatch.setattr(scorer, "__call__", refuse)
    monkeypatch.setattr(Dinov2Features, "extract", refuse)
    main(flags)
    again = load_metrics(tmp_path / "out").measurements[0].metrics
    assert {**again, "s / image": 0} == {**metrics, "s / image": 0}


def make(folder):
    folder.mkdir()
    return folder


def test_distances_in_several_features_stand_beside_each_other(arguments, teacher, few_components, tmp_path):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path / "dinov2")
    main(arguments(
        teacher=teacher, teacher_steps=1, reference_teacher=True, features="mobilenet dinov2",
        dinov2_model=tmp_path / "dinov2",
    ))  # fmt: skip
    metrics = load_metrics(tmp_path / "out")
    names = ["MobileNet-FD", "MobileNet-KD", "precision", "recall", "FD-DINOv2", "KD-DINOv2"]
    assert all(list(row.metrics)[:6] == names for row in metrics.measurements)
    assert metrics.details["features"] == ["mobilenet", "dinov2"]
    reference = FeatureReference.load(tmp_path / "out" / "reference-dinov2.safetensors")
    assert reference.features.shape == (21, 12)


def test_distances_by_label_are_those_of_few_labels(arguments, teacher, few_components, tmp_path):
    flags = arguments(
        teacher=teacher, teacher_steps=1, reference_teacher=True, label_column="colour", distance_by_label=True,
        num_images_per_prompt=2,
    )  # fmt: skip
    main(flags)
    for row in load_metrics(tmp_path / "out").measurements:
        names = {f"MobileNet-FD ({colour})" for colour in ("red", "green", "blue")}
        assert names <= {*row.metrics} and names <= {*row.intervals}


def test_geneval_is_exported_and_its_results_are_read_back(arguments, tmp_path, capsys):
    lines = [{"tag": tag, "include": [], "prompt": f"a photo of {tag}"} for tag in ("colors", "counting", "colors")]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = arguments(
        prompts_file=None, geneval=tmp_path / "evaluation_metadata.jsonl", num_images_per_prompt=2, read_scores="HPSv3"
    )
    main(flags)
    folder, drawn = (tmp_path / "out" / name / "student-1-steps" for name in ("geneval", "pictures"))
    said = capsys.readouterr().out
    assert f"python evaluation/evaluate_images.py {folder} --outfile {folder}/results.jsonl" in said
    assert f"write HPSv3.jsonl beside {drawn}/metadata.jsonl" in said
    assert len([*folder.rglob("*.png")]) == 6
    correct = [
        {"filename": str(path), "correct": path.parent.parent.name == "00000"} for path in folder.rglob("*.png")
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in correct))
    scores = [json.dumps({"file_name": path.name, "score": 2.5}) for path in drawn.glob("*.png")]
    (drawn / "HPSv3.jsonl").write_text("\n".join(scores))
    main(flags)
    metrics = load_metrics(tmp_path / "out")
    found = metrics.measurements[0].metrics
    assert {name: found[name] for name in found if "GenEval" in name or "HPS" in name} == {
        "GenEval": 0.25, "GenEval colors": 0.5, "GenEval counting": 0, "HPSv3": 2.5,
    }  # fmt: skip
    assert metrics.dataset == "3 prompts of evaluation_metadata.jsonl"


def test_dpg_bench_is_exported_and_its_results_are_read_back(arguments, tmp_path, capsys):
    prompts = make(tmp_path / "prompts")
    for name in ("0", "7"):
        (prompts / f"{name}.txt").write_text(f"a picture of {name}")
    flags = arguments(prompts_file=None, dpg_bench=prompts, num_images_per_prompt=4)
    main(flags)
    folder = tmp_path / "out" / "dpg_bench" / "student-1-steps"
    assert f"PIC_NUM=4 bash dpg_bench/dist_eval.sh {folder} 32" in capsys.readouterr().out
    with Image.open(folder / "7.png") as sheet:
        assert sheet.size == (64, 64)
    results = f"{folder}/7.png, 0.5, 0.5, 0.5, 0.5, 0.5\n{folder}/0.png, 1.0, 1.0, 1.0, 1.0, 1.0\n"
    (folder / "dpg-bench_20250101-000000_results.txt").write_text(results)
    main(flags)
    assert load_metrics(tmp_path / "out").measurements[0].metrics["DPG-Bench"] == 75


def test_a_changed_seed_or_model_is_refused(arguments, student, tmp_path):
    main(arguments(max_prompts=2))
    with pytest.raises(ValueError, match=r"holds pictures of another run: seed is 0 there and 1 here"):
        main(arguments(max_prompts=2, seed=1))
    other = tmp_path / "other"
    changed = tiny_tbcm_pipeline()
    changed.transformer.proj_out.bias.data += 0.1
    changed.save_pretrained(other)
    with pytest.raises(ValueError, match="another run: transformer is "):
        main(arguments(max_prompts=2, model=other))


def test_drawing_is_as_the_student_was_distilled_and_as_the_flags_say(arguments, teacher, tmp_path):
    pipeline = tiny_tbcm_pipeline()
    trained = {"max_sequence_length": 8, "complex_human_instruction": None, "height": 32, "width": 32}
    pipeline.scheduler = TBCMScheduler(guidance_scales=[1.5, 2.0, 2.5], call_options=trained)
    pipeline.save_pretrained(tmp_path / "student")
    told_nothing = dict.fromkeys(("max_sequence_length", "no-complex_human_instruction", "resolution"))
    both = {"model": tmp_path / "student", "teacher": teacher, "teacher_steps": 1, "max_prompts": 2, **told_nothing}
    drawn = {"guidance_scale": 2.0, "max_sequence_length": 8, "instruction": False, "height": 32, "width": 32}
    told = {"guidance_scale": 4.0, "max_sequence_length": 9, "complex_human_instruction": True, "resolution": 64}
    for flags, expected in (
        ({}, drawn),
        (told, {"guidance_scale": 4.0, "max_sequence_length": 9, "instruction": True, "height": 64, "width": 64}),
    ):
        main(arguments(**both | flags, output_dir=tmp_path / f"out{len(flags)}"))
        for model in ("student", "teacher"):
            file = tmp_path / f"out{len(flags)}" / "pictures" / f"{model}-1-steps" / "settings.json"
            found = json.loads(file.read_text())
            assert {name: found[name] for name in expected} == expected
        details = load_metrics(tmp_path / f"out{len(flags)}").details
        assert {name: details[name] for name in expected} == expected


@pytest.mark.parametrize(("real_labels", "said"), [(["owl"] * 200, False), ([], True)])
def test_labels_that_real_pictures_lack_are_warned_of(real_labels, said, arguments, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr("examples.tbcm.evaluate_student.logger", logging.getLogger("diffusers.test"))
    settings = parse_settings(arguments(num_images_per_prompt=100))
    reference = FeatureReference(torch.zeros(200, 1), tuple(real_labels), torch.zeros(1), None)
    prompts = EvaluationPrompts(["an owl", "owls"], ["owl", "owl"])
    check_task(settings, Task(prompts, None, reference, [MobileNetFeatures()], [], None))
    assert ("The real pictures have no labels: no retrieval is measured." in caplog.messages) is said


def test_fewer_prompts_than_subsets_of_the_kernel_distance_suffice(arguments, few_components, tmp_path):
    reference = TEACHER_DIR / "reference_features.safetensors"
    main(arguments(max_prompts=4, num_images_per_prompt=3, reference_file=reference))
    found = load_metrics(tmp_path / "out").measurements[0]
    low, high = found.intervals["MobileNet-KD"]
    assert low < found.metrics["MobileNet-KD"] < high


def test_a_real_picture_that_cannot_be_read_is_named_before_anything_is_drawn(arguments, few_components, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    for index in range(12):
        Image.new("RGB", (32, 32), (20 * index, 0, 0)).save(real / f"{index:02}.png")
    torn = (real / "07.png").read_bytes()
    (real / "07.png").write_bytes(torn[: len(torn) // 2])
    with pytest.raises(ValueError, match=r"1 of 12 real pictures cannot be read: picture .*07.png"):
        main(arguments(reference_dir=real))
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_not_finite_are_no_pictures_and_their_run_binds_nobody(arguments, tmp_path):
    pipeline = tiny_tbcm_pipeline()
    pipeline.transformer.proj_out.bias.data[0] = torch.nan
    pipeline.save_pretrained(tmp_path / "overflown")
    with pytest.raises(ValueError, match=r"picture of '0 red dogs' at 1 step is not finite"):
        main(arguments(model=tmp_path / "overflown", max_prompts=2))
    assert not [*(tmp_path / "out").rglob("*.png")]
    main(arguments(max_prompts=2))  # the same folder, with a student that draws


def test_processes_that_do_not_know_of_each_other_are_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    with pytest.raises(ValueError, match="2 processes were started and accelerate has not joined them"):
        main(arguments(max_prompts=2))
    assert not (tmp_path / "out").exists()


def test_two_processes_draw_the_pictures_of_one(arguments, tmp_path):
    main(arguments(max_prompts=7, num_images_per_prompt=2, output_dir=tmp_path / "one"))
    fork_two(main, arguments(max_prompts=7, num_images_per_prompt=2, output_dir=tmp_path / "two", batch_size=3))
    one, two = (pictures(tmp_path / run / "pictures" / "student-1-steps") for run in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 14
    assert max(np.abs(one[name] - two[name]).max() for name in one) <= 1  # batches round differently
    first, second = (load_metrics(tmp_path / run) for run in ("one", "two"))
    assert (first.details["processes"], second.details["processes"]) == (1, 2)
    assert second.measurements[0].metrics["diversity"] == pytest.approx(
        first.measurements[0].metrics["diversity"], abs=1e-3
    )


def test_the_card_of_the_student_gets_the_results(arguments, teacher, tmp_path):
    folder = tmp_path / "published"
    save_student_pipeline(
        tiny_transformer(guidance_embeds=True), teacher, folder, StudentDescription("a dog", {"steps": 1})
    )
    main(arguments(model=folder, max_prompts=2, num_images_per_prompt=2, update_card=True))
    value = load_metrics(folder).measurements[0]
    low, high = value.intervals["diversity"]
    line = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| student | 1 |"))
    assert f"{value.metrics['diversity']:.4g} ({low:.4g} to {high:.4g})" in line


@pytest.fixture
def flow_student(teacher, tmp_path):
    trained = {"max_sequence_length": 8, "complex_human_instruction": None, "height": 32, "width": 32}
    description, folder = StudentDescription("a dog", {"steps": 1}), tmp_path / "flow"
    return save_flow_student(
        tiny_transformer(), teacher, folder, description, scheduler=FlowStudentScheduler(3.0, trained)
    )


@pytest.mark.parametrize(("guidance_scale", "teachers"), [(None, 4.5), (3, 3.0)])
def test_a_flow_student_is_measured_without_guidance_and_its_teacher_with(
    arguments, flow_student, teacher, few_components, tmp_path, guidance_scale, teachers
):
    told_nothing = dict.fromkeys(("max_sequence_length", "no-complex_human_instruction", "resolution"))
    flags = arguments(
        model=flow_student, teacher=teacher, teacher_steps="4 2", steps="1 2 4", guidance_scale=guidance_scale,
        reference_teacher=True, num_images_per_prompt=2, update_card=True, **told_nothing,
    )  # fmt: skip
    main(flags)
    drawn = {"max_sequence_length": 8, "instruction": False, "height": 32, "width": 32}
    for model, scale in (("student-1", 1.0), ("student-4", 1.0), ("teacher-4", teachers), ("reference-2", teachers)):
        found = json.loads((tmp_path / "out" / "pictures" / f"{model}-steps" / "settings.json").read_text())
        assert found.items() >= {**drawn, "guidance_scale": scale}.items()
    for folder in (tmp_path / "out", flow_student):
        metrics = load_metrics(folder)
        rows = [(row.model, row.num_inference_steps) for row in metrics.measurements]
        assert rows == [("teacher", 4), ("teacher", 2), ("student", 1), ("student", 2), ("student", 4)]
        assert metrics.details.items() >= {**drawn, "guidance_scale": teachers, "student_guidance_scale": 1.0}.items()
    card = (flow_student / "README.md").read_text()
    assert "| student | 4 |" in card and "sigmas=[1.0, 0.75, 0.5, 0.25]" in card
    first = Image.open(tmp_path / "out" / "pictures" / "student-4-steps" / "000000-00.png")
    plain = SanaPipeline.from_pretrained(flow_student)
    expected = plain(
        PROMPTS[:8],
        sigmas=[1.0, 0.75, 0.5, 0.25],
        guidance_scale=1.0,
        generator=[draw_generator(2 * place, 0) for place in range(8)],
        height=32,
        width=32,
        max_sequence_length=8,
        complex_human_instruction=None,
        use_resolution_binning=False,
    ).images[0]
    assert np.abs(np.asarray(first).astype(int) - np.asarray(expected)).max() <= 1  # its batch was another


def test_a_teacher_with_a_flow_lora_is_measured_beside_itself(arguments, teacher, tmp_path):
    lora = write_tiny_flow_lora(tmp_path / "lora", teacher)
    main(arguments(model=teacher, lora=lora, teacher=teacher, teacher_steps=2, max_prompts=2, steps="1 2"))
    drawn = tmp_path / "out" / "pictures"
    scales = {
        path.name: json.loads((path / "settings.json").read_text())["guidance_scale"] for path in drawn.iterdir()
    }
    assert scales == {"student-1-steps": 1.0, "student-2-steps": 1.0, "teacher-2-steps": 4.5}
    rows = load_metrics(tmp_path / "out").measurements
    assert [(row.model, row.num_inference_steps) for row in rows] == [("teacher", 2), ("student", 1), ("student", 2)]


def test_guidance_for_a_flow_student_alone_and_one_as_teacher_are_refused(arguments, flow_student, tmp_path):
    with pytest.raises(ValueError, match=r"`guidance_scale` is 3.0, but this student has learned its guidance"):
        main(arguments(model=flow_student, guidance_scale=3))
    with pytest.raises(ValueError, match="is a few-step student: give the teacher that it was distilled from"):
        main(arguments(teacher=flow_student))
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_lacks_a_weight_is_not_measured(arguments, teacher, tmp_path):
    lacking = shutil.copytree(teacher, tmp_path / "lacking")
    file = lacking / "vae" / "diffusion_pytorch_model.safetensors"
    name, *others = sorted(weights := load_file(file))
    save_file({other: weights[other] for other in others}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"teacher .* it lacks 1 of the weights of a AutoencoderDC, such as {name}"):
        main(arguments(teacher=lacking, teacher_steps=1, max_prompts=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_dir": "{tmp}/none"}, "folder .* holds no picture"),
        ({"label_column": "breed"}, "has no column 'breed'"),
        ({"reference_file": "{reference}"}, "21 drawn pictures are too few: the covariance of .* takes 129"),
        ({"text_image_head": "{tmp}"}, "has no text_image_head"),
        ({"clip_model": "{tmp}/none"}, "CLIP model .* is neither a folder"),
        ({"pickscore_model": "{tmp}/none"}, "PickScore model .* is neither a folder"),
        ({"hpsv2_model": "{tmp}"}, "HPSv2 model .* has no HPS_v2.1_compressed.pt"),
        ({"image_reward_model": "{tmp}"}, "ImageReward model .* has no ImageReward.pt"),
        ({"features": "dinov2", "dinov2_model": "{tmp}/none"}, "DINOv2 model .* is neither a folder"),
        ({"prompts_file": None, "geneval": "{tmp}/none"}, "GenEval file .* does not exist"),
        ({"prompts_file": None, "dpg_bench": "{tmp}/none"}, "DPG-Bench folder .* holds no .txt file"),
        ({"max_prompts": 1}, "there is 1 prompt"),
        ({"model": "{tmp}/none"}, "is neither a pipeline folder nor a model on the Hub"),
        ({"teacher": "{tmp}/none"}, "teacher .* is neither a folder nor a model on the Hub"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_drawn(changes, message, arguments, tmp_path):
    places = {"tmp": tmp_path, "reference": TEACHER_DIR / "reference_features.safetensors"}
    changes = {name: value.format(**places) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        main(arguments(**changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["metrics.json", "notes.txt", "pictures/student-1-steps/000000-00.png"])
def test_a_folder_that_is_not_ours_is_left_alone(name, arguments, tmp_path):
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(ValueError, match=r"`output_dir` .* holds files that are not this package's"):
        main(arguments())
    assert theirs.read_text() == "mine" and len([*(tmp_path / "out").rglob("*.*")]) == 1


@pytest.mark.parametrize("name", ["metrics.json", "metrics.png", "prompts.csv", "reference.safetensors"])
def test_what_is_in_the_way_is_named_before_anything_is_drawn(name, arguments, tmp_path):
    OwnedFolder(tmp_path / "out").claim()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"did not write, or what was changed since \({name}\)"):
        main(arguments())
    assert (tmp_path / "out" / name).read_text() == "mine" and not (tmp_path / "out" / "pictures").exists()


def test_what_somebody_has_changed_of_an_evaluation_is_named_and_left_alone(arguments, tmp_path):
    main(arguments())
    names = ("metrics.json", "metrics.png", "prompts.csv")
    for file in (tmp_path / "out" / name for name in names):
        written = file.read_bytes()
        file.write_text("mine")
        with pytest.raises(ValueError, match=rf"did not write, or what was changed since \({file.name}\)"):
            main(arguments())
        assert file.read_text() == "mine"
        file.write_bytes(written)
    main(arguments())  # as it was


@pytest.mark.parametrize("name", ["geneval", "geneval/student-1-steps", "pictures", "pictures/student-1-steps"])
def test_a_file_where_a_folder_is_to_be_is_named_before_anything_is_drawn(name, arguments, tmp_path):
    OwnedFolder(tmp_path / "out").claim()
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    (tmp_path / "prompts.jsonl").write_text('{"tag": "x", "prompt": "a dog"}\n{"tag": "x", "prompt": "a cat"}\n')
    with pytest.raises(ValueError, match=rf"--output_dir is to hold a folder '.*/{name}', which is a file"):
        main(arguments(prompts_file=None, geneval=tmp_path / "prompts.jsonl"))
    assert not [*(tmp_path / "out").rglob("*.png")]


def test_labels_that_no_real_picture_has_are_refused(arguments, few_components, tmp_path):
    reference = TEACHER_DIR / "reference_features.safetensors"
    with pytest.raises(ValueError, match="3 labels of prompts, such as 'blue', are those of no real picture"):
        main(arguments(reference_file=reference, label_column="colour"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "1 0"}, "--steps is [1, 0]"),
        ({"steps": "2 2"}, "--steps is [2, 2]"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"steps": "1 1001"}, "--steps is [1, 1001]: it takes different numbers from 1 to 1000"),
        ({"seed": -1}, "--seed is -1: it takes at least 0"),
        ({"guidance_scale": "nan"}, "--guidance_scale is nan"),
        ({"reference_dir": "..", "output_dir": "out"}, "--output_dir is in --reference_dir"),
        ({"bootstrap_resamples": 1}, "--bootstrap_resamples is 1"),
        ({"reference_teacher": True}, "--reference_teacher needs --teacher"),
        ({"image_column": "image"}, "--image_column is of --dataset_name"),
        ({"reference_file": "none.safetensors"}, "--reference_file 'none.safetensors' does not exist"),
        ({"update_card": True}, "--update_card needs --model to be a folder that training wrote"),
        ({"reference_dir": ".", "reference_file": "."}, "not allowed with"),
        (
            {"prompts_file": None},
            "one of the arguments --prompts_file --dataset_name --geneval --dpg_bench is required",
        ),
        ({"features": "resnet"}, "argument --features: invalid choice: 'resnet'"),
        ({"features": "dinov2 dinov2"}, "--features is ['dinov2', 'dinov2']: it takes different ones"),
        (
            {"features": "mobilenet dinov2", "reference_file": "none.safetensors"},
            "--reference_file holds one kind of features: give one of --features",
        ),
        ({"geneval": "x"}, "argument --geneval: not allowed with argument --prompts_file"),
        ({"distance_by_label": True}, "--distance_by_label needs --label_column"),
        (
            {"distance_by_label": True, "label_column": "colour"},
            "--distance_by_label needs real pictures: give --reference_dir",
        ),
        ({"read_scores": "a/b"}, "--read_scores is ['a/b']: it takes names of letters, digits, - and _"),
        ({"read_scores": "metadata"}, "--read_scores is metadata: the evaluation has something of that name"),
        ({"read_scores": "HPSv3 Diversity"}, "--read_scores is Diversity: the evaluation has something of that name"),
        ({"read_scores": "FD-DINOv2"}, "--read_scores is FD-DINOv2: the evaluation has something of that name"),
        ({"stepss": 1}, "unrecognized arguments: --stepss 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(changes, message, arguments, capsys):
    with pytest.raises(SystemExit):
        parse_settings(arguments(**changes))
    assert message in capsys.readouterr().err


def test_every_flag_is_read_after_it_was_checked():
    tree = ast.parse(SCRIPT.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name != "parse_settings"]
    read = {
        node.attr
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "settings"
    }
    assert {field.name for field in dataclasses.fields(Settings)} == read


def test_a_student_is_no_teacher_to_measure_beside_it(arguments, student, tmp_path):
    with pytest.raises(
        ValueError, match=r"teacher .* is a few-step student: give the teacher that it was distilled from"
    ):
        main(arguments(teacher=student))
    assert not (tmp_path / "out").exists()


def test_a_real_picture_without_a_label_beside_others_is_refused(arguments, few_components, tmp_path):
    for name in ("red", "green", "blue"):
        (tmp_path / "real" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (32, 32), (20 * index, 0, 0)).save(tmp_path / "real" / name / f"{index}.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "real" / "stray.png")
    with pytest.raises(ValueError, match=r"holds pictures, such as 'stray\.png', beside folders of pictures"):
        main(arguments(reference_dir=tmp_path / "real", label_column="colour"))
    assert not (tmp_path / "out").exists()
