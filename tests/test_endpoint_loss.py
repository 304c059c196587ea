"""The comparison of endpoint losses: the whole way once, in little."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
from runs import run_forked

from benchmarks import emoji_judge, endpoint_loss, late_consistency
from diffusers_tbcm.evaluation.judge import TeacherJudge
from examples.tbcm import quickstart
from examples.tbcm.quickstart import PROMPTS_FILE, Task


def test_the_whole_way_in_little(monkeypatch, tmp_path):
    """A seed's students differ in the loss alone; the second time nothing is trained or drawn."""
    monkeypatch.setattr(quickstart, "TeacherJudge", partial(TeacherJudge, num_components=2))
    monkeypatch.setattr(emoji_judge, "TEACHER_STEPS", 2)
    task = Task("few", PROMPTS_FILE, ["dolphin", "noto owl"] * 3, ["dolphin", "owl"] * 3, 2)
    monkeypatch.setitem(emoji_judge.TASKS, "few", lambda: task)
    little = {"train_batch_size": 2, "route_steps": 3, "replay_buffer_size": 4, "teacher_batch_size": 4}
    little |= {"max_train_steps": 2, "endpoint_warmup_steps": 1, "lr_warmup_steps": 0}
    flags = {**endpoint_loss.TRAININGS["few"], **little}
    monkeypatch.setattr(endpoint_loss, "TRAININGS", {"few": flags})
    monkeypatch.setattr(late_consistency, "subprocess", SimpleNamespace(run=run_forked))
    work_dir, file = tmp_path / "work", tmp_path / "endpoint_loss_few.json"
    command = ["few", "--seeds", "0", "--work_dir", f"{work_dir}", "--output_dir", f"{tmp_path}"]
    endpoint_loss.main(command)
    result = json.loads(file.read_text())
    assert [(row["way"], row["less"], row["steps"]) for row in result["rows"]] == [
        ("norm", "l2", steps) for steps in (1, 2, 4)
    ]
    assert len({row["FD to the teacher"] for row in result["students"]}) == 6
    told = {
        name: json.loads((work_dir / "few" / f"{name}-seed_0" / "checkpoint-2" / "run.json").read_text())["told"]
        for name in ("norm", "l2")
    }
    assert {name for name in told["norm"] if told["norm"][name] != told["l2"][name]} == {
        "endpoint_loss_type",
        "output_dir",
    }
    monkeypatch.setattr(late_consistency.subprocess, "run", lambda *_, **__: pytest.fail("was trained again"))
    endpoint_loss.main(command)
    assert json.loads(file.read_text())["rows"] == result["rows"]
