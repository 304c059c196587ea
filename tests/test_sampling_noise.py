"""The comparison of noises between steps: the whole way once, in little."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runs import run_forked

from benchmarks import emoji_judge, late_consistency, sampling_noise
from diffusers_tbcm.evaluation.judge import TeacherJudge
from examples.tbcm import quickstart
from examples.tbcm.quickstart import PROMPTS_FILE, Task


@pytest.mark.parametrize("prompts", ["few", "many"])
def test_the_whole_way_in_little(prompts, monkeypatch, tmp_path):
    """One student, drawn in every way from the same first noises; the second time nothing is trained or drawn."""
    monkeypatch.setattr(quickstart, "TeacherJudge", partial(TeacherJudge, num_components=2))
    monkeypatch.setattr(emoji_judge, "TEACHER_STEPS", 2)
    task = Task(prompts, PROMPTS_FILE, ["dolphin", "noto owl"] * 3, ["dolphin", "owl"] * 3, 2)
    monkeypatch.setitem(emoji_judge.TASKS, prompts, lambda: task)
    little = {"train_batch_size": 2, "route_steps": 3, "replay_buffer_size": 4, "teacher_batch_size": 4}
    little |= {"max_train_steps": 2, "endpoint_warmup_steps": 1, "lr_warmup_steps": 0}
    monkeypatch.setattr(sampling_noise, "TRAININGS", {"few": {**sampling_noise.TRAININGS["few"], **little}})
    monkeypatch.setattr(sampling_noise, "SEEDS", {prompts: (0,)})
    monkeypatch.setattr(late_consistency, "subprocess", SimpleNamespace(run=run_forked))
    file = tmp_path / f"sampling_noise_{prompts}.json"
    command = [prompts, "--work_dir", f"{tmp_path / 'work'}", "--output_dir", f"{tmp_path}"]
    sampling_noise.main(command)
    result = json.loads(file.read_text())
    assert [(row["model"], row["steps"]) for row in result["students"]] == [
        (way, steps) for way in sampling_noise.WAYS for steps in (2, 4)
    ]
    assert len({row["FD to the teacher"] for row in result["students"]}) == 8
    assert result["asymmetry"].keys() == sampling_noise.WAYS.keys()
    two, four = (row["FD to the teacher"] for row in result["students"][:2])
    assert float(result["less_two_steps"]["fresh noise"]) == pytest.approx(four - two, abs=0.02)
    monkeypatch.setattr(late_consistency.subprocess, "run", lambda *_, **__: pytest.fail("was trained again"))
    monkeypatch.setattr(emoji_judge, "draw", lambda *_, **__: pytest.fail("was drawn again"))
    sampling_noise.main(command)
    assert json.loads(file.read_text())["students"] == result["students"]


def test_a_picture_and_its_mirror_image_in_one_are_not_asymmetric():
    picture = torch.tensor([[[[0, 0, 255]]]], dtype=torch.uint8)
    both = torch.tensor([[[[128, 0, 128]]]], dtype=torch.uint8)
    assert sampling_noise.asymmetry({"pixels": picture}) == pytest.approx(2 / 3 * 255**2)
    assert sampling_noise.asymmetry({"pixels": both}) == 0


def test_four_steps_are_compared_with_two_of_the_same_student():
    students = [
        {"model": way, "seed": seed, "steps": steps, "FD to the teacher": distance}
        for way, distances in (("a", (10, 12, 11, 12)), ("b", (5, 4, 5, 4)))
        for (seed, steps), distance in zip(((0, 2), (0, 4), (1, 2), (1, 4)), distances, strict=True)
    ]
    # differences 2 and 1: mean 1.5, half an interval of 12.71 standard errors 0.5
    assert sampling_noise.less_two_steps(students) == {"a": "+1.50 (-4.85 to +7.85)", "b": "-1.00 (-1.00 to -1.00)"}
