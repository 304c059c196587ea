"""The shipped student: its learning curve's law, and the whole way once, in little."""

import json
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy
import pytest
import torch
from runs import run_forked
from safetensors import safe_open

from benchmarks import emoji_judge, emoji_student
from benchmarks.emoji_student import power_law
from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.evaluation.judge import TeacherJudge
from examples.tbcm import quickstart


LITTLE = {
    "train_batch_size": 2,
    "route_steps": 3,
    "replay_buffer_size": 4,
    "teacher_batch_size": 4,
    "lr_warmup_steps": 0,
}


def test_a_power_law_is_found():
    rows = numpy.array([1e3, 1e4, 1e5])
    scale, exponent = power_law(rows, 7 * rows**-0.5)
    assert scale == pytest.approx(7) and exponent == pytest.approx(-0.5)


def test_the_whole_way_in_little(monkeypatch, tmp_path):
    """Stages go on from each other; the second time nothing is trained or drawn; the saved student is the run's."""
    monkeypatch.setattr(quickstart, "TeacherJudge", partial(TeacherJudge, num_components=2))
    monkeypatch.setattr(emoji_judge, "TEACHER_STEPS", 2)
    monkeypatch.setattr(emoji_student, "FLAGS", {**emoji_student.FLAGS, **LITTLE})
    monkeypatch.setattr(emoji_student, "GRID_PROMPTS", ("noto owl",))
    monkeypatch.setattr(emoji_student, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(emoji_student, "ROOT", tmp_path)
    monkeypatch.setattr(emoji_student, "subprocess", SimpleNamespace(run=run_forked))
    monkeypatch.setattr(emoji_student, "DMD_FLAGS", {**emoji_student.DMD_FLAGS, **LITTLE})
    monkeypatch.setattr(emoji_student, "SHARES", (0.0, 0.5))
    command = ["--stages", "1", "2", "--final_steps", "1", "--dmd_steps", "3", "--prompts", "6"]
    command += ["--work_dir", f"{tmp_path / 'work'}", "--output_dir", f"{tmp_path}", "--save"]
    emoji_student.main(command)
    result = json.loads((tmp_path / "emoji_student.json").read_text())
    assert [(row["loss"], row["steps"]) for row in result["rows"]] == [
        (loss, steps)
        for loss in ("endpoint", "endpoint", "consistency", "endpoint", "DMD", "DMD, averaged")
        for steps in (1, 2, 4)
    ]
    assert len({row["FD to the teacher"] for row in result["rows"]}) == 18  # each stage has other weights

    assert [(row["share"], row["steps"]) for row in result["shares"]] == list(product((0, 0.5), (1, 2, 4)))

    card = (tmp_path / "shipped" / "README.md").read_text()
    assert 'from_pretrained("shipped")' in card and "FD to the teacher" in card and "noto owl" in card
    with safe_open(tmp_path / "shipped" / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    shipped, finished, start = (
        SanaTBCMPipeline.from_pretrained(tmp_path / folder).transformer.state_dict()
        for folder in ("shipped", "work/dmd", "work/endpoint")
    )
    for name, ours in shipped.items():
        between = finished[name].lerp(start[name], 0.2)
        torch.testing.assert_close(ours, between.half().float(), rtol=0, atol=0, msg=name)

    monkeypatch.setattr(emoji_student.subprocess, "run", lambda *_, **__: pytest.fail("was trained again"))
    emoji_student.main(command[:-1])
    assert json.loads((tmp_path / "emoji_student.json").read_text())["rows"] == result["rows"]
