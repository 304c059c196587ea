"""CDM's figures on the emoji teacher: what is trained, how it is judged, and the whole way once, in little."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runs import run_forked
from safetensors.torch import load_file

from benchmarks import cdm_emoji, cdm_variants
from benchmarks.cdm_emoji import FLAGS, TABLES, Setting, describe, train
from diffusers_tbcm.evaluation.judge import TeacherJudge
from diffusers_tbcm.evaluation.reference import FeatureReference
from diffusers_tbcm.flow import shift_sigmas
from diffusers_tbcm.training.settings import parse_settings
from examples.tbcm import quickstart, train_cdm
from examples.tbcm.mini_teacher.emoji_metrics import REFERENCE_FILE
from examples.tbcm.quickstart import PROMPTS_FILE, TEACHER_DIR, Task, few, many
from examples.tbcm.train_cdm import CDMSettings


SETTINGS = {name: setting for settings in TABLES.values() for name, setting in settings.items()}


def little(rounds: int) -> Task:
    return Task("little", PROMPTS_FILE, ["dolphin", "noto owl"] * rounds, ["dolphin", "owl"] * rounds, 2)


@pytest.fixture
def commands(monkeypatch):
    """The commands that would be run."""
    found = []
    monkeypatch.setattr(cdm_emoji.subprocess, "run", lambda command, check: found.append(command))
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_taken_by_the_script_and_differs_in_nothing_else(name, commands, tmp_path):
    setting = SETTINGS[name]
    folder = train(setting, little(1), 200, 3, tmp_path)
    train(Setting(), little(1), 200, 3, tmp_path)
    command, plain = commands
    start = next(place for place, part in enumerate(command) if part.startswith("--"))
    assert command[start - 1] == setting.variant or command[start - 1].endswith("train_cdm.py")
    assert not setting.variant or setting.variant in cdm_variants.VARIANTS
    settings, others = (
        vars(parse_settings(CDMSettings, each[each.index("--pretrained_model_name_or_path") :]))
        for each in (command, plain)
    )
    assert (settings["max_train_steps"], settings["seed"], settings["output_dir"]) == (200, 3, str(folder))
    assert all(settings[flag] == value for flag, value in {**FLAGS, **setting.flags}.items() if flag in settings)
    assert {flag for flag in settings if settings[flag] != others[flag]} - {
        "output_dir",
        "hub_model_id",
        "lora_alpha",
    } == {*setting.flags}


def test_settings_are_different_runs_and_a_run_keeps_its_flags(commands, tmp_path, monkeypatch):
    folders = {train(setting, little(1), 200, 3, tmp_path) for setting in SETTINGS.values()}
    assert len(folders) == len(SETTINGS)
    monkeypatch.setitem(cdm_emoji.FLAGS, "train_batch_size", 13)
    with pytest.raises(ValueError, match="with other flags: choose another folder"):
        train(Setting(), little(1), 200, 3, tmp_path)


def test_the_prompts(commands):
    assert len({*few().prompts}) == 24 and len(few().prompts) == len(few().concepts) == 24 * 20
    assert set(few().training) == set(few().prompts)
    assert len(many().prompts) == 500 and len(many().training) > 5000


def drawn_of(features):
    return {
        "features": features,
        "brightness": torch.full((len(features),), 0.5),
        "saturation": torch.zeros(len(features)),
    }


def test_a_student_is_judged_by_the_teachers_pictures():
    task, width = little(60), len(load_file(TEACHER_DIR / REFERENCE_FILE)["mean"])
    generator = torch.Generator().manual_seed(0)
    features = torch.zeros(120, width)
    features[:, :4] = torch.randn(120, 4, generator=generator).half()
    real = FeatureReference.load(TEACHER_DIR / REFERENCE_FILE)
    judge = TeacherJudge(features, task.round_size, real=real, labels=task.concepts, num_components=4)
    assert judge.distance(features).value == pytest.approx(0, abs=1e-3)
    moved = features.clone()
    moved[:, 0] += 3.0
    away = judge.distance(moved)
    assert away.value == pytest.approx(9.0, rel=1e-2) and away.low < 9.0 < away.high  # the squared distance of means
    paired = judge.distance(features, moved)
    assert paired.value == pytest.approx(-9.0, rel=1e-2) and paired.high < 0
    row = describe(judge, "student", 4, drawn_of(moved))
    assert row["FD to the teacher"] == round(away.value, 1) and row["brightness"] == 0.5
    assert row["diversity / teacher's"] != 1  # by cosines of features
    of_four = TeacherJudge(features, 4, num_components=4)
    nearer, further = (of_four.kernel_distance(each).value for each in (features, moved))
    assert nearer == pytest.approx(0, abs=1e-9) and further > 0.01  # the very same pictures of every prompt
    alike = features[:2].repeat(60, 1)
    assert describe(judge, "student", 4, drawn_of(alike))["diversity / teacher's"] == 0
    assert describe(judge, "student", 4, drawn_of(features))["diversity / teacher's"] == 1


def test_the_variants_change_what_they_say():
    even = shift_sigmas(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), 2.5)
    rows = type("Rows", (), {"latents": torch.ones(2, 3), "timesteps": torch.tensor([0.4, 0.6])})()
    with cdm_variants.fixed_schedule():
        torch.testing.assert_close(train_cdm.draw_sigmas(torch.Generator(), max_steps=8, shift=2.5), even)
    with cdm_variants.on_trajectory():
        assert train_cdm.off_rollout(None, rows) == (rows.latents, rows.timesteps)
    with pytest.raises(SystemExit, match="The first argument is one of fixed_schedule, on_trajectory"):
        cdm_variants.main(["other"])


def test_a_table_in_little(monkeypatch, tmp_path):
    """Two settings are trained, drawn by the stock pipeline and measured; the second time nothing is done again."""
    monkeypatch.setattr(quickstart, "TeacherJudge", partial(TeacherJudge, num_components=2))
    for name, value in {"TEACHER_STEPS": 2, "GRID_ROWS": 2, "few": lambda: little(2)}.items():
        monkeypatch.setattr(cdm_emoji, name, value)
    monkeypatch.setattr(
        cdm_emoji,
        "FLAGS",
        {
            **FLAGS,
            "train_batch_size": 2,
            "max_rollout_steps": 2,
            "student_every": 1,
            "drift_steps": 0,
            "lr_warmup_steps": 0,
        },
    )
    monkeypatch.setattr(
        cdm_emoji,
        "TABLES",
        {
            "few": {
                "CDM": Setting(),
                "LoRA": Setting({"rank": 2, "learning_rate": 1e-2}),
                "fixed": Setting(variant="fixed_schedule"),
            }
        },
    )
    monkeypatch.setattr(cdm_emoji, "subprocess", SimpleNamespace(run=run_forked))
    command = ["few", "--max_train_steps", "2", "--work_dir", f"{tmp_path / 'runs'}", "--output_dir", f"{tmp_path}"]
    cdm_emoji.main(command)
    result = json.loads((tmp_path / "cdm_emoji_few.json").read_text())
    models = [(row["model"], row["steps"]) for row in result["rows"]]
    students = [(name, steps) for name in ("CDM", "LoRA", "fixed") for steps in (1, 2, 4)]
    assert models == [("teacher", 4), ("teacher", 2), ("untrained", 1), ("untrained", 2), ("untrained", 4), *students]
    figures = [json.dumps({**row, "model": "", "steps": 0}) for row in result["rows"]]
    assert len(set(figures)) == len(figures)
    assert (tmp_path / "cdm_emoji_few.png").exists()
    monkeypatch.setattr(cdm_emoji.subprocess, "run", None)
    monkeypatch.setattr(cdm_emoji, "draw", None)
    cdm_emoji.main(command)
