"""The quickstart's command: it starts anew where there is nothing to go on from, and measures by the teacher."""

import subprocess
from functools import partial

import pytest
import torch
from diffusers import SanaPipeline

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.draws import draw_generator, draw_guidance_scale, draw_noise
from diffusers_tbcm.evaluation.judge import TeacherJudge
from examples.tbcm import quickstart


@pytest.mark.parametrize("left", [None, "", "checkpoint-5"])
def test_the_same_command_starts_or_goes_on(left, tmp_path, monkeypatch):
    """A run that was stopped before its first checkpoint leaves a folder without any."""
    output_dir = tmp_path / "quickstart"
    if left is not None:
        (output_dir / left).mkdir(parents=True)
    started = []

    def run(command):
        started.extend(command)
        return subprocess.CompletedProcess(command, 75)

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    for full in ([], ["--full"]):
        started.clear()
        with pytest.raises(SystemExit, match="75"):
            quickstart.main(["--output_dir", str(output_dir), *full])
        assert ("--resume_from_checkpoint" in started) == (left == "checkpoint-5")
        prompts_file = started[started.index("--prompts_file") + 1]
        assert len(open(prompts_file).readlines()) == (5179 if full else 24)


@pytest.fixture
def models():
    teacher = SanaPipeline.from_pretrained(quickstart.TEACHER_DIR)
    student = SanaTBCMPipeline(
        teacher.tokenizer, teacher.text_encoder, teacher.vae, make_student(teacher.transformer), TBCMScheduler()
    )
    return {"teacher": teacher, "untrained student": student, "student": student}


def test_the_teacher_is_the_measure(models, monkeypatch):
    monkeypatch.setattr(quickstart, "TEACHER_STEPS", 2)
    monkeypatch.setattr(quickstart, "MEASURED_STEPS", {"teacher": (1, 2), "student": (1,)})
    monkeypatch.setattr(quickstart, "TeacherJudge", partial(TeacherJudge, num_components=4))
    one, teacher, student = quickstart.measure(models, quickstart.few(2), "cpu")
    assert (teacher.model, teacher.num_inference_steps, student.model) == ("teacher", 2, "student")
    assert teacher.metrics["decisiveness"] == 1 != one.metrics["decisiveness"]
    assert all(teacher.metrics[name] < student.metrics[name] for name in ("FD to the teacher", "KD to the teacher"))
    low, high = student.intervals["FD to the teacher"]
    assert low < student.metrics["FD to the teacher"] < high


def test_seen_noises_are_those_of_the_training(models, monkeypatch):
    drawn = {}

    def draw(pipeline, prompts, steps, *, latents, **options):
        drawn[type(pipeline)] = prompts, latents
        return []

    monkeypatch.setattr(quickstart, "draw", draw)
    monkeypatch.setattr(quickstart, "SEEN_PICTURES", 5)
    monkeypatch.setattr(quickstart, "pictures_to_tensor", lambda made: torch.ones(5, 3, 2, 2).cumsum(3))
    assert quickstart.seen_decisiveness(models, quickstart.few(1), [4.0, 5.0]) == 1
    generators = [draw_generator(number, 0) for number in range(5)]  # as the training script draws
    draw_guidance_scale([4.0, 5.0], generators)
    noise = draw_noise((16, 8, 8), generators)
    for prompts, latents in drawn.values():
        assert len(prompts) == len(set(prompts)) == 5 and {*prompts} <= {*quickstart.few(1).training}
        assert torch.equal(latents, noise)
    assert len(drawn) == 2
