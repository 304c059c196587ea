"""The tables on few prompts: what is trained, the pictures of methods that need some, and the whole way in little."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
from runs import run_forked

from benchmarks import emoji_judge
from benchmarks.paper import few_prompts, study_runs
from benchmarks.paper.few_prompts import OF_METHOD, ROWS_PER_STEP, SHOWN, draw_pictures, settings_of
from diffusers_tbcm.data.pictures import CaptionedImages
from diffusers_tbcm.evaluation.judge import TeacherJudge
from diffusers_tbcm.training.settings import parse_settings
from examples.tbcm import quickstart, train_lcm, train_sana_sprint, train_scm, train_tbcm_distill
from examples.tbcm.mini_teacher.emoji_metrics import TEACHER_DIR
from examples.tbcm.quickstart import PROMPTS_FILE, Task


SETTINGS = {
    "tbcm": train_tbcm_distill.TBCMSettings,
    "scm": train_scm.SCMSettings,
    "sana_sprint": train_sana_sprint.SanaSprintSettings,
    "lcm": train_lcm.LCMSettings,
}
LITTLE = {"train_batch_size": 2, "route_steps": 3, "teacher_batch_size": 2, "lr_warmup_steps": 0}
TASK = Task("few", PROMPTS_FILE, ["dolphin", "noto owl"] * 3, ["dolphin", "owl"] * 3, 2)


@pytest.mark.parametrize("table", SHOWN)
def test_every_setting_trains_as_many_rows_at_all_times_on_the_few_prompts(table, tmp_path):
    (tmp_path / "pictures").mkdir()
    study = study_runs.Study(TEACHER_DIR, tmp_path / "runs", 6, tmp_path / "pictures", PROMPTS_FILE)
    names = set()
    for setting in settings_of(table).values():
        args = parse_settings(SETTINGS[setting.method], study.training_arguments(setting, 400, seed=3))
        on_trajectories = setting.method == "tbcm"
        assert args.train_batch_size * (args.route_steps - 1 if on_trajectories else 1) == ROWS_PER_STEP
        assert getattr(args, "loss_weighting", "uniform") == "uniform"
        assert args.learning_rate == setting.flags.get("learning_rate", 2e-4)
        if on_trajectories:
            assert args.prompts_file == str(PROMPTS_FILE)
        names.add(setting.run_name(400, 3))
    assert len(names) == len(settings_of(table))


def test_pictures_are_the_teachers_of_the_training_prompts(monkeypatch, tmp_path):
    monkeypatch.setattr(few_prompts, "TEACHER_STEPS", 1)
    draw_pictures(TASK, tmp_path, each=2)
    images = CaptionedImages(tmp_path)
    assert len(images) == 48
    assert images.captions == [(prompt,) for prompt in TASK.training * 2]
    assert (tmp_path / "00000.png").read_bytes() != (tmp_path / "00024.png").read_bytes()  # another noise
    monkeypatch.setattr(few_prompts, "draw", lambda *_, **__: pytest.fail("was drawn again"))
    draw_pictures(TASK, tmp_path, each=2)


def test_the_whole_way_in_little(monkeypatch, tmp_path):
    """The second time nothing is trained or drawn."""
    monkeypatch.setattr(quickstart, "TeacherJudge", partial(TeacherJudge, num_components=2))
    monkeypatch.setattr(emoji_judge, "TEACHER_STEPS", 2)
    monkeypatch.setattr(few_prompts, "few", lambda: TASK)
    monkeypatch.setitem(OF_METHOD, "tbcm", {**OF_METHOD["tbcm"], **LITTLE})
    monkeypatch.setitem(SHOWN, "table4", {name: SHOWN["table4"][name] for name in ("random", "reference")})
    monkeypatch.setattr(study_runs, "subprocess", SimpleNamespace(run=run_forked))
    command = ["table4", "--seeds", "0", "--max_train_steps", "1"]
    command += ["--work_dir", f"{tmp_path / 'work'}", "--output_dir", f"{tmp_path}"]
    few_prompts.main(command)
    result = json.loads((tmp_path / "few_table4.json").read_text())
    assert [(row["way"], row["less"], row["steps"]) for row in result["rows"]] == [
        ("random", "reference", steps) for steps in (1, 2, 4)
    ]
    assert len({row["FD to the teacher"] for row in result["students"]}) == 6
    assert not any("(" in row["FD to the teacher"] for row in result["rows"])  # no interval of one seed
    assert result["flags"]["random"]["sampling_scheme"] == "random"
    assert "Means over seeds" in (tmp_path / "few_table4.md").read_text()
    monkeypatch.setattr(study_runs.subprocess, "run", lambda *_, **__: pytest.fail("was trained again"))
    few_prompts.main(command)
    assert json.loads((tmp_path / "few_table4.json").read_text())["rows"] == result["rows"]
    few_prompts.main([*command, "--work_dir", str(tmp_path / "another machine's")])
    assert json.loads((tmp_path / "few_table4.json").read_text())["students"] == result["students"]

    monkeypatch.setattr(study_runs.subprocess, "run", run_forked)
    few_prompts.main([*command, "--seeds", "1", "--work_dir", str(tmp_path / "another machine's")])
    added = json.loads((tmp_path / "few_table4.json").read_text())
    assert added["students"][: len(result["students"])] == result["students"] and added["details"]["seeds"] == [0, 1]
    assert all("(" in row["FD to the teacher"] for row in added["rows"])


def test_students_of_a_result_are_those_of_the_same_flags(tmp_path):
    file, flags = tmp_path / "few_table4.json", {"random": {"learning_rate": 1e-4}, "reference": {"rank": 2}}
    assert few_prompts.kept_students(file, flags) == []
    students = [{"seed": seed, "model": name} for seed in (0, 1) for name in flags]
    file.write_text(json.dumps({"flags": flags, "students": students}))
    assert few_prompts.kept_students(file, flags) == students
    changed = {**flags, "random": {"learning_rate": 2e-4}}
    assert few_prompts.kept_students(file, changed) == [each for each in students if each["model"] == "reference"]
