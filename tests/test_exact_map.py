"""The benchmark of a student that has learned everything."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline

from benchmarks import emoji_judge, exact_map
from benchmarks.common import EMBEDDED_TEACHER
from diffusers_tbcm.evaluation.features import pictures_to_tensor
from diffusers_tbcm.evaluation.judge import TeacherJudge
from examples.tbcm import quickstart
from examples.tbcm.quickstart import PROMPTS_FILE, Task, draw, few


@pytest.mark.parametrize("stochastic_sampling", [True, False])
def test_one_step_draws_what_the_stock_pipeline_draws_and_more_steps_another_picture_of_the_prompt(
    stochastic_sampling,
):
    prompts = few(1).prompts[:2]
    pipeline = SanaPipeline.from_pretrained(EMBEDDED_TEACHER)
    stock = pictures_to_tensor(draw(pipeline, prompts, 20))
    drawn = exact_map.ExactMap(pipeline, 4.5, 4.5, stochastic_sampling).draw(prompts, 0)
    assert list(drawn) == [1, 2, 4]
    errors = {
        steps: (pictures_to_tensor(pictures) - stock).square().mean().sqrt() for steps, pictures in drawn.items()
    }
    assert errors[1] < 0.05 and min(errors[2], errors[4]) > 2 * errors[1]
    (other,) = exact_map.ExactMap(pipeline, 4.5, 4.5, stochastic_sampling).draw(prompts[1:], 1)[4]
    np.testing.assert_allclose(np.asarray(other, dtype=int), np.asarray(drawn[4][1], dtype=int), atol=2)


@pytest.mark.parametrize("t", [torch.pi / 2, 1.0, 0.3])
def test_the_ode_is_solved_from_t_in_descending_times_of_the_teacher(t):
    times = exact_map.times_from(t)
    assert times[0] == pytest.approx(t) and (times.diff() < -exact_map.LEAST_STEP / 2).all() and times[-1] < 0.2


def test_results_are_written_and_what_was_drawn_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "TeacherJudge", partial(TeacherJudge, num_components=2))
    monkeypatch.setattr(exact_map, "TEACHER_STEPS", 4)
    task = Task("few", PROMPTS_FILE, ["dolphin", "noto owl"] * 3, ["dolphin", "owl"] * 3, 2)
    monkeypatch.setitem(emoji_judge.TASKS, "few", lambda: task)
    arguments = ["few", "--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "new")]
    exact_map.main(arguments)
    first = json.loads((tmp_path / "new" / "exact_map_few.json").read_text())["rows"]
    named = ("guidance", "later steps", "noise", "model", "steps")
    assert [tuple(row[name] for name in named) for row in first] == [
        (*way, *each)
        for way in ((4.5, 4.5, "fresh"), (4.5, 4.5, "predicted"), (4.5, 1.0, "fresh"), (1.0, 1.0, "fresh"))
        for each in (("teacher", 4), ("exact map", 1), ("exact map", 2), ("exact map", 4))
    ]
    distances = [row[emoji_judge.DISTANCE] for row in first]
    assert np.isfinite(distances).all() and len({*distances}) == 12  # guided, 1 step and teacher are thrice the same
    monkeypatch.setattr(exact_map, "ExactMap", None)  # all is kept
    exact_map.main(arguments)
    assert json.loads((tmp_path / "new" / "exact_map_few.json").read_text())["rows"] == first
