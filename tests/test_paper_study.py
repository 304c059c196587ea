import json
import subprocess

import pandas
import pytest
import study
import study_runs
from distill_args import parse_args
from methods import LCM, SANA_SPRINT, SCM, TBCM
from study_report import summarize
from study_runs import Setting, train, training_arguments, training_costs


METHODS = {"tbcm": TBCM, "scm": SCM, "sana_sprint": SANA_SPRINT, "lcm": LCM}
ALL_SETTINGS = [(table, name) for table, settings in study.TABLES.items() for name in settings]
STEPS = 240


def parsed(setting, folder, steps=STEPS):
    pictures = folder if setting.needs_pictures else None
    flags = setting.all_flags(steps, seed=3)
    return parse_args(
        training_arguments(flags, setting.method, folder / "run", pictures), method=METHODS[setting.method]
    )


@pytest.mark.parametrize(("table", "name"), ALL_SETTINGS)
def test_every_setting_is_accepted_by_its_script_and_differs_in_nothing_else(table, name, tmp_path):
    setting = study.TABLES[table][name]
    assert (study_runs.EXAMPLES / study_runs.SCRIPTS[setting.method]).is_file()
    for steps in (1, STEPS):
        args = parsed(setting, tmp_path, steps)
        assert (args.max_train_steps, args.seed, args.resume_from_checkpoint) == (steps, 3, "latest")
    rows = args.train_batch_size * (args.route_steps - 1 if setting.method == "tbcm" else 1)
    assert abs(rows - study_runs.ROWS_PER_STEP) <= 2
    paths = {"output_dir", "prompts_file", "train_data_dir", "latents_cache"}
    plain = vars(parsed(Setting(setting.method), tmp_path))
    different = {flag for flag, value in vars(args).items() if plain[flag] != value} - paths
    assert different <= set(setting.flags)
    for flag in ("optimizer", "learning_rate", "lr_scheduler", "lr_warmup_steps", "weight_decay", "max_grad_norm"):
        assert getattr(args, flag) == getattr(parsed(Setting(), tmp_path), flag)


@pytest.mark.parametrize("table", study.TABLES)
def test_settings_of_a_table_are_different_runs(table):
    names = {setting.run_name(STEPS, 0) for setting in study.TABLES[table].values()}
    assert len(names) == len(study.TABLES[table])


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
        (folder / "checkpoint-240").mkdir()


@pytest.fixture
def fake(monkeypatch):
    training = FakeTraining()
    monkeypatch.setattr(study_runs.subprocess, "run", training)
    return training


def test_a_run_that_is_done_is_not_done_again_and_one_that_failed_is(fake, tmp_path):
    fake.failures = 1
    with pytest.raises(subprocess.CalledProcessError):
        train(Setting(), STEPS, 0, tmp_path, None)
    first = train(Setting(), STEPS, 0, tmp_path, None)
    assert fake.commands[0] == fake.commands[1]
    assert train(Setting(), STEPS, 0, tmp_path, None) == first
    assert len(fake.commands) == 2
    assert first["ms / row"] == 50
    assert not list(tmp_path.glob("*/checkpoint-*"))
    train(Setting(), STEPS, 1, tmp_path, None)
    assert len(fake.commands) == 3


def test_a_folder_with_other_flags_is_refused(fake, tmp_path, monkeypatch):
    train(Setting(), STEPS, 0, tmp_path, None)
    monkeypatch.setitem(study_runs.METHOD_FLAGS["tbcm"], "teacher_batch_size", 4)
    with pytest.raises(ValueError, match="with other flags"):
        train(Setting(), STEPS, 0, tmp_path, None)


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


def test_table_2_compares_at_equal_rows_and_at_equal_time(fake, tmp_path, monkeypatch):
    row = {"inference steps": 1, "MobileNet-FD": 150.0, "intervals": {"MobileNet-FD": [140.0, 160.0]}}
    monkeypatch.setattr(study, "measure_student", lambda folder, prompts: [row])
    monkeypatch.setattr(study, "measure_teacher", lambda folder, prompts: {"teacher": [row]})
    command = ["table2", "--seeds", "0", "1", "--max_train_steps", "100", "--train_data_dir", str(tmp_path)]
    study.main([*command, "--work_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "results")])
    record = json.loads((tmp_path / "results" / "table2.json").read_text())
    steps = {(run["setting"], run["compared at"]): run["train steps"] for run in record["runs"] if "seed" in run}
    assert {steps[name, "equal rows"] for name in study.METHODS} == {100}
    assert [steps[name, "equal time"] for name in study.METHODS] == [300, 150, 100, 100]
    # 4 methods and 2 of them longer, by 2 seeds, and one to encode the pictures
    assert len(fake.commands) == 2 * 6 + 1
    assert record["flags"]["sCM"]["train_batch_size"] == 30
    text = (tmp_path / "results" / "table2.md").read_text()
    assert "| LCM | equal time | 1 | 2 | 300 |" in text and "| teacher |" in text
    assert (tmp_path / "results" / "table2.png").stat().st_size > 1000


def test_table_3_needs_no_pictures_drawn(fake, tmp_path):
    command = ["table3", "--seeds", "0", "--train_data_dir", str(tmp_path)]
    study.main([*command, "--work_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "table3.json").read_text())["rows"]
    assert [row["ms / row"] for row in rows] == ["16.7", "33.3", "50.0", "50.0"]


def test_methods_on_pictures_ask_for_them(capsys):
    with pytest.raises(SystemExit):
        study.parse_args(["table2"])
    assert "LCM, sCM, Sana-Sprint on pictures, --train_data_dir is None" in capsys.readouterr().err
    assert study.parse_args(["table4"]).seeds == [0, 1, 2]
    with pytest.raises(SystemExit):
        study.parse_args(["table4", "--prompts", "100"])
    assert "--prompts is 100" in capsys.readouterr().err
