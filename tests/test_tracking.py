"""Metrics reach the file and the trackers, and neither can end a run."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from diffusers_tbcm.training.tracking import MetricsLog


class Recorder(GeneralTracker):
    name = "tensorboard"  # one that takes pictures
    requires_logging_directory = False
    tracker = None

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.values, self.images = fails, [], []

    def log(self, values, step):
        if self.fails:
            raise ConnectionError("the service is gone")
        self.values.append((step, values))

    def log_images(self, values, step, dataformats):
        self.images.append((step, {name: pixels.shape for name, pixels in values.items()}, dataformats))


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = []
    return accelerator


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_json_whatever_the_value(accelerator, tmp_path):
    log = MetricsLog(accelerator, tmp_path / "metrics.jsonl")
    log({"loss": 0.5, "grad_norm": float("nan")}, step=1)
    log({"loss": float("inf")}, step=2)
    expected = [{"step": 1, "loss": 0.5, "grad_norm": None}, {"step": 2, "loss": None}]
    assert lines(tmp_path / "metrics.jsonl") == expected


def test_vectors_go_to_the_file_alone(accelerator, tmp_path):
    tracker = Recorder()
    accelerator.trackers = [tracker]
    MetricsLog(accelerator, tmp_path / "metrics.jsonl")(
        {"loss": 0.5}, step=1, vectors={"shares": [0.25, float("nan")]}
    )
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "shares": [0.25, None]}]
    assert tracker.values == [(1, {"loss": 0.5})]


def test_a_resumed_run_drops_what_its_checkpoint_does_not_know(accelerator, tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(accelerator, path)
    for step in (1, 2, 3):
        log({"loss": step}, step)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    MetricsLog(accelerator, path, first_step=2)({"loss": 30}, step=3)
    assert lines(path) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 30}]


@pytest.mark.parametrize(
    "torn",
    [
        b'{"step": 2, "lo\n',
        b'{"loss": 1}\n',
        b"[2]\n",
        b"\n",
        b'{"step": null}\n',
        b"\x00\x00\xff\xfe\n",
        b'{"step": "2"',
        b"7\n",
    ],
)
def test_torn_lines_go_wherever_they_are_and_the_run_goes_on(accelerator, tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1}\n' + torn + b'\n{"step": 2, "loss": 2}\n{"step": 3}\n')
    MetricsLog(accelerator, path, first_step=2)({"loss": 30}, step=3)
    assert lines(path) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 30}]


def test_a_file_that_cannot_be_cut_keeps_its_lines(accelerator, tmp_path, monkeypatch, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(self, *args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    MetricsLog(accelerator, path, first_step=1)
    assert "No space left on device" in caplog.text and len(lines(path)) == 2


def test_a_lost_tracker_is_named_and_left_out(accelerator, tmp_path, caplog):
    good, bad = Recorder(), Recorder(fails=True)
    accelerator.trackers = [bad, good]
    log = MetricsLog(accelerator, tmp_path / "metrics.jsonl")
    log({"loss": 1.0}, step=1)
    log({"loss": 2.0}, step=2)
    assert good.values == [(1, {"loss": 1.0}), (2, {"loss": 2.0})] and accelerator.trackers == [good]
    assert sum("the service is gone" in message for message in caplog.messages) == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 2


def test_a_file_that_cannot_be_written_is_a_warning(accelerator, tmp_path, caplog):
    recorder = Recorder()
    accelerator.trackers = [recorder]
    MetricsLog(accelerator, tmp_path / "missing" / "metrics.jsonl")({"loss": 1.0}, step=1)
    assert "could not be written" in caplog.text and recorder.values


def test_pictures_reach_the_trackers_that_show_them(accelerator, tmp_path):
    recorder = Recorder()
    accelerator.trackers = [recorder]
    MetricsLog(accelerator, tmp_path / "metrics.jsonl").image("validation", Image.new("RGB", (4, 2)), step=3)
    assert recorder.images == [(3, {"validation": (1, 2, 4, 3)}, "NHWC")]
