"""The study of the late consistency loss: its differences by hand, and the whole way once, in little."""

import json
from functools import partial
from types import SimpleNamespace

import pandas
import pytest
from runs import run_forked

from benchmarks import emoji_judge, late_consistency
from benchmarks.emoji_judge import METRICS, paired_differences
from benchmarks.late_consistency import CONTROL, START, pairs_of
from diffusers_tbcm.evaluation.judge import TeacherJudge
from examples.tbcm import quickstart
from examples.tbcm.quickstart import PROMPTS_FILE, Task


LITTLE = {
    "train_batch_size": 2,
    "route_steps": 3,
    "replay_buffer_size": 4,
    "teacher_batch_size": 4,
    "lr_warmup_steps": 0,
}


def test_differences_are_those_of_a_seed_and_their_interval_is_students():
    values = {START: (10.0, 30.0), CONTROL: (9.0, 28.0), "way": (8.0, 24.0)}
    rows = [
        {"model": model, "seed": seed, "steps": 1, **dict.fromkeys(METRICS, value)}
        for model, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    found = paired_differences(pandas.DataFrame(rows), pairs_of([CONTROL, "way"]), METRICS)
    assert [(row["way"], row["less"]) for row in found.to_dict("records")] == [
        (CONTROL, START),
        ("way", START),
        ("way", CONTROL),
    ]
    # -1 and -4: mean -2.5, standard error 1.5, and t of one degree of freedom is 12.706
    assert found["FD to the teacher"].iloc[-1] == f"-2.5 ({-2.5 - 12.706 * 1.5:+.3g} to {-2.5 + 12.706 * 1.5:+.3g})"


def test_the_whole_way_in_little(monkeypatch, tmp_path):
    """Ways go on from one endpoint student, each to other weights; the second time nothing is trained or drawn."""
    monkeypatch.setattr(quickstart, "TeacherJudge", partial(TeacherJudge, num_components=2))
    monkeypatch.setattr(emoji_judge, "TEACHER_STEPS", 2)
    task = Task("few", PROMPTS_FILE, ["dolphin", "noto owl"] * 3, ["dolphin", "owl"] * 3, 2)
    monkeypatch.setitem(emoji_judge.TASKS, "few", lambda: task)
    monkeypatch.setattr(late_consistency, "STEPS", {"few": (2, 1)})
    monkeypatch.setattr(late_consistency, "FLAGS", {"few": {**late_consistency.FLAGS["few"], **LITTLE}})
    monkeypatch.setattr(late_consistency, "subprocess", SimpleNamespace(run=run_forked))
    command = ["few", "--seeds", "0", "--ways", "endpoint", "consistency, lower rate"]
    command += ["--work_dir", f"{tmp_path / 'work'}", "--output_dir", f"{tmp_path}"]
    late_consistency.main(command)
    result = json.loads((tmp_path / "late_consistency_few_norm.json").read_text())
    assert [row["way"] for row in result["rows"]] == ["endpoint"] * 3 + ["consistency, lower rate"] * 6
    assert len({row["FD to the teacher"] for row in result["students"]}) == 9
    changes = [
        json.loads((tmp_path / "work" / "few_norm" / name / "checkpoint-3" / "run.json").read_text())["changes"]
        for name in ("seed_0-endpoint", "seed_0-consistency,_lower_rate")
    ]
    assert [{*change[0]} for change in changes] == [
        {"step", "max_train_steps", "lr_scheduler", "endpoint_warmup_steps"},
        {"step", "max_train_steps", "lr_scheduler", "learning_rate"},
    ]
    monkeypatch.setattr(late_consistency.subprocess, "run", lambda *_, **__: pytest.fail("was trained again"))
    late_consistency.main(command)
    assert json.loads((tmp_path / "late_consistency_few_norm.json").read_text())["rows"] == result["rows"]
