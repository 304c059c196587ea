import json
import subprocess

import pandas
import pytest
import torch
from PIL import Image

from benchmarks.paper import study, study_runs, tbcm_variants
from benchmarks.paper.study_report import report, summarize
from benchmarks.paper.study_runs import Setting, Study, training_costs
from diffusers_tbcm.evaluation.features import NUM_COMPONENTS
from diffusers_tbcm.training.settings import parse_settings
from examples.tbcm import train_lcm, train_sana_sprint, train_scm, train_tbcm_distill
from examples.tbcm.mini_teacher.emoji_metrics import REFERENCE_FILE, TEACHER_DIR


SETTINGS = {
    "tbcm": train_tbcm_distill.TBCMSettings,
    "scm": train_scm.SCMSettings,
    "sana_sprint": train_sana_sprint.SanaSprintSettings,
    "lcm": train_lcm.LCMSettings,
}
ALL_SETTINGS = [(table, name) for table, settings in study.TABLES.items() for name in settings]
STEPS = 240


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "pictures").mkdir()
    return Study(TEACHER_DIR, tmp_path / "runs", 500, tmp_path / "pictures")


def parsed(setting, runs, steps=STEPS):
    return parse_settings(SETTINGS[setting.method], runs.training_arguments(setting, steps, seed=3))


@pytest.mark.parametrize(("table", "name"), ALL_SETTINGS)
def test_every_setting_is_accepted_by_its_script_and_differs_in_nothing_else(table, name, runs):
    setting = study.TABLES[table][name]
    if setting.variant:
        assert setting.script == ["-m", tbcm_variants.__name__, setting.variant]
        assert setting.variant in tbcm_variants.VARIANTS
    else:
        assert study_runs.Path(setting.script[0]).is_file()
    for steps in (12, STEPS):
        args = parsed(setting, runs, steps)
        assert (args.max_train_steps, args.seed, args.resume_from_checkpoint) == (steps, 3, None)
    rows = args.train_batch_size * (args.route_steps - 1 if setting.method == "tbcm" else 1)
    assert abs(rows - study_runs.ROWS_PER_STEP) <= 2
    paths = {"output_dir", "hub_model_id", "prompts_file", "train_data_dir", "latents_cache"}
    plain = vars(parsed(Setting(setting.method), runs))
    different = {flag for flag, value in vars(args).items() if plain[flag] != value} - paths
    assert different <= {*setting.flags, *setting.common}
    for flag in ("optimizer", "learning_rate", "lr_scheduler", "lr_warmup_steps", "weight_decay", "max_grad_norm"):
        assert flag in setting.flags or getattr(args, flag) == getattr(parsed(Setting(), runs), flag)


@pytest.mark.parametrize("table", study.TABLES)
def test_settings_of_a_table_are_different_runs(table):
    names = {setting.run_name(STEPS, 0) for setting in study.TABLES[table].values()}
    assert len(names) == len(study.TABLES[table])


def test_students_are_drawn_with_the_guidance_that_they_were_trained_with(runs, monkeypatch):
    setting = study.TABLES["guidance"]["guidance 1.5 to 2.5"]
    assert parsed(setting, runs).guidance_scales == [1.5, 2.0, 2.5]
    assert " " not in setting.run_name(STEPS, 0)
    drawn = []
    monkeypatch.setattr(Study, "measure", lambda self, *what: drawn.append((what[2].name, *what[3:])) or [])
    runs.measure_student(setting, STEPS, 0)
    runs.measure_teacher([2.0, 4.5])
    assert [scale for _, scale in drawn[:1]] == [2.0]
    assert drawn[1:] == [("untrained",), ("teacher-guidance 2", 2.0), ("teacher", 4.5)]


def test_floats_that_count_steps_are_shares_of_the_run():
    flags = Setting(flags={"endpoint_warmup_steps": 0.7, "tangent_final_ratio": 0.5}).all_flags(240, 0)
    assert (flags["tangent_warmup_steps"], flags["tangent_cooldown_start_step"]) == (48, 180)
    assert (flags["endpoint_warmup_steps"], flags["tangent_final_ratio"]) == (168, 0.5)


class FakeTraining:
    """Takes the place of a training subprocess: writes the log, or fails as often as it is told to."""

    def __init__(self, failures=0):
        self.failures = failures
        self.commands = []

    def __call__(self, command, check):
        assert check
        self.commands.append(command)
        if len(self.commands) <= self.failures:
            raise subprocess.CalledProcessError(1, command)
        folder = study_runs.Path(command[command.index("--output_dir") + 1])
        rate = {"train_lcm.py": 60.0, "train_scm.py": 30.0}.get(study_runs.Path(command[1]).name, 20.0)
        line = {"rows_per_second": rate, "peak_memory_gib": 1.5, "filtered_share": 0.0}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        for step in (120, 240):
            (folder / f"checkpoint-{step}").mkdir()


@pytest.fixture
def fake(monkeypatch):
    training = FakeTraining()
    monkeypatch.setattr(study_runs.subprocess, "run", training)
    return training


def test_a_run_that_is_done_is_not_done_again_and_one_that_failed_is(fake, runs):
    fake.failures = 1
    with pytest.raises(subprocess.CalledProcessError):
        runs.train(Setting(), STEPS, 0)
    first = runs.train(Setting(), STEPS, 0)
    assert fake.commands[0] == fake.commands[1]
    assert runs.train(Setting(), STEPS, 0) == first
    assert len(fake.commands) == 2
    assert first["ms / row"] == 50
    assert not list(runs.work_dir.glob("*/checkpoint-*"))
    runs.train(Setting(), STEPS, 1)
    assert len(fake.commands) == 3


def test_a_folder_with_other_flags_is_refused(fake, runs, monkeypatch):
    runs.train(Setting(), STEPS, 0)
    monkeypatch.setitem(study_runs.METHOD_FLAGS["tbcm"], "teacher_batch_size", 4)
    with pytest.raises(ValueError, match="with other flags"):
        runs.train(Setting(), STEPS, 0)


def test_a_folder_with_runs_of_another_teacher_is_refused(runs, tmp_path):
    Study(TEACHER_DIR, runs.work_dir, 200)
    with pytest.raises(ValueError, match="another teacher"):
        Study(tmp_path / "fashion_teacher", runs.work_dir, 500)


def test_costs_are_typical_ones_after_the_first_steps(tmp_path):
    lines = [(1.0, 1.0), (0.1, 3.0), (16.0, 2.0), (17.0, 2.0)]
    log = tmp_path / "metrics.jsonl"
    keys = ("rows_per_second", "peak_memory_gib", "filtered_share")
    log.write_text("".join(json.dumps(dict(zip(keys, (*line, 0.25), strict=True))) + "\n" for line in lines))
    assert training_costs(log) == {"ms / row": 62.5, "peak memory (GiB)": 3.0, "filtered share": 0.25}


def test_summarize_gives_mean_and_deviation_over_seeds_by_setting_and_steps():
    of_student = [
        {
            "setting": "b",
            "seed": seed,
            "inference steps": steps,
            "train steps": 240,
            "MobileNet-FD": 100 * steps + seed,
        }
        for seed in (0, 1, 2)
        for steps in (1, 2)
    ]
    teacher = {"setting": "teacher", "inference steps": 20, "MobileNet-FD": 117.5}
    runs = pandas.DataFrame([*of_student, teacher])
    table = summarize(runs)
    assert table["setting"].tolist() == ["b", "b", "teacher"]
    assert table["seeds"].tolist() == [3, 3, 0]
    assert table["MobileNet-FD"].tolist() == ["101.0 ± 1.0", "201.0 ± 1.0", "117.5"]
    assert table["train steps"].tolist() == ["240", "240", ""]


@pytest.mark.parametrize(("table", "expected"), [("table2", [100] * 4), ("table2_equal_time", [300, 150, 100, 100])])
def test_table_2_compares_at_equal_rows_or_at_equal_time(fake, tmp_path, monkeypatch, table, expected):
    row = {"inference steps": 1, "MobileNet-FD": 150.0, "intervals": {"MobileNet-FD": [140.0, 160.0]}}
    monkeypatch.setattr(Study, "measure_student", lambda *run: [row])
    monkeypatch.setattr(Study, "measure_teacher", lambda *scales: {"teacher": [row]})
    difference = {"setting": "sCM", "FD less that of: TBCM": [-5.0, -6.0, -4.0]}
    monkeypatch.setattr(study, "differences", lambda *of: [difference])
    command = [table, "--seeds", "0", "1", "--max_train_steps", "100", "--train_data_dir", str(tmp_path)]
    study.main([*command, "--work_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "results")])
    record = json.loads((tmp_path / "results" / f"{table}.json").read_text())
    steps = {run["setting"]: run["train steps"] for run in record["runs"] if "seed" in run}
    assert [steps[name] for name in study.METHODS] == expected
    # 4 methods by 2 seeds; for equal time their costs first, and one to encode the pictures
    assert len(fake.commands) == (2 * 4 if table == "table2" else 2 * 8 + 1)
    assert record["flags"]["sCM"]["train_batch_size"] == 30
    text = (tmp_path / "results" / f"{table}.md").read_text()
    assert f"| LCM | 1 | 2 | {expected[0]} |" in text and "| teacher |" in text
    assert "| sCM | -5.0 (-6.0 to -4.0) |" in text
    assert (tmp_path / "results" / f"{table}.png").stat().st_size > 1000


def test_a_table_of_another_teacher_has_its_name(fake, tmp_path, monkeypatch):
    teacher = tmp_path / "fashion_teacher"
    teacher.mkdir()
    command = ["table3", "--teacher", str(teacher), "--train_data_dir", str(tmp_path), "--seeds", "0"]
    with pytest.raises(SystemExit):
        study.parse_args(command)
    (teacher / REFERENCE_FILE).touch()
    monkeypatch.chdir(tmp_path)
    study.main([*command, "--output_dir", "results"])
    assert json.loads((tmp_path / "results/table3_fashion_teacher.json").read_text())["details"]["teacher"]
    assert (tmp_path / "runs/study/fashion_teacher/tbcm-60_steps-seed_0").is_dir()


def test_progress_measures_every_checkpoint_that_a_run_kept(fake, runs, monkeypatch):
    drawn = []

    def measure(self, make_pipeline, all_steps, folder, guidance_scale):
        drawn.append((folder.name, all_steps))
        return [{"inference steps": 1, "MobileNet-FD": 100.0}]

    monkeypatch.setattr(Study, "measure", measure)
    setting = study.TABLES["progress"][study.TBCM]
    records = study.run("progress", study.TBCM, setting, STEPS, 0, runs)
    assert [record["after steps"] for record in records] == [120, 240]
    assert drawn == [("checkpoint-120", (1,)), ("checkpoint-240", (1,))]
    teacher = {"setting": "teacher", "inference steps": 20, "MobileNet-FD": 90.0}
    report("progress", [*records, teacher], [], {"seeds": [0]}, {}, runs.work_dir)
    assert f"| {study.TBCM} | 120 | 1 | 1 | 240 | 0.0001 | 100.0 |" in (runs.work_dir / "progress.md").read_text()
    assert (runs.work_dir / "progress.png").stat().st_size > 1000


def test_table_3_is_made_of_short_runs_and_draws_nothing(fake, tmp_path):
    command = ["table3", "--seeds", "0", "--train_data_dir", str(tmp_path)]
    study.main([*command, "--work_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "table3.json").read_text())["rows"]
    assert {row["train steps"] for row in rows} == {str(study.COST_STEPS)}
    assert [row["ms / row"] for row in rows] == ["16.7", "33.3", "50.0", "50.0"]


def test_methods_on_pictures_ask_for_them(capsys):
    with pytest.raises(SystemExit):
        study.parse_args(["table2"])
    assert "LCM, sCM, Sana-Sprint on pictures, --train_data_dir is None" in capsys.readouterr().err
    assert study.parse_args(["table4"]).seeds == [0, 1, 2]
    assert study.parse_args(["progress", "--settings", study.TBCM]).settings == [study.TBCM]
    with pytest.raises(SystemExit):
        study.parse_args(["table4", "--settings", "uniform"])
    assert "--settings names 'uniform', table4 has 'random', 'logit_normal', 'reference'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.parse_args(["table4", "--prompts", "100"])
    assert "--prompts is 100" in capsys.readouterr().err


def test_differences_are_paired_over_prompts(runs, monkeypatch):
    """Features that only move: the Frechet distance's change is that of its means, and no resample changes it much."""
    everyone = torch.Generator().manual_seed(0)
    base = torch.randn(500, NUM_COMPONENTS, generator=everyone)
    centre = study_runs.evaluators(TEACHER_DIR)[0].reference.gaussian[0].float()

    def features(self, make_pipeline, folder, steps=1):
        towards = {"untrained": 0.0, "random": 0.5, "logit_normal": 1.0, "tbcm": 0.75, "teacher": -1.0}
        name = next(key for key in towards if key in folder.name)
        assert steps == (20 if name == "teacher" else 1)
        return base - base.mean(0) + centre + 3 * (1 - towards[name])

    monkeypatch.setattr(Study, "features", features)
    settings = study.TABLES["table4"]
    rows = {
        row.pop("setting"): row for row in study.differences(settings, dict.fromkeys(settings, STEPS), [0, 1], runs)
    }
    assert rows.keys() == settings.keys() and len(rows["reference"]) == 2

    for name, place in (("random", 0.5), ("logit_normal", 1.0)):
        for baseline, other in (("untrained student", 0.0), ("reference", 0.75)):
            for measured, target in (("FD", 1.0), ("FD to the teacher", -1.0)):
                value, low, high = rows[name][f"{measured} less that of: {baseline}"]
                expected = 9 * NUM_COMPONENTS * ((target - place) ** 2 - (target - other) ** 2)
                assert value == pytest.approx(expected, rel=1e-3)
                assert low < value < high


def test_features_are_drawn_once(runs, monkeypatch):
    pictures = [Image.new("RGB", (64, 64), (40 * i, 0, 0)) for i in range(3)]
    calls = []
    monkeypatch.setattr(
        study_runs, "draw", lambda pipeline, prompts, steps: calls.append((len(prompts), steps)) or pictures
    )
    folder = runs.work_dir / "run"
    folder.mkdir()
    first = runs.features(lambda: torch.nn.Identity(), folder)
    assert first.shape == (3, NUM_COMPONENTS) and torch.equal(runs.features(None, folder), first)
    assert calls == [(500, 1)]
