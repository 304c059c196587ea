"""A request to stop is noted, once, and the old behaviour comes back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusers_tbcm.training import interruption
from diffusers_tbcm.training.interruption import RESUMABLE_EXIT_CODE, StopRequest


@pytest.fixture
def recorded():
    """What handlers of the outside world receive."""
    received = []
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    yield received
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_acts(recorded, number):
    with StopRequest() as stop:
        stop.finish_steps()
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received and recorded == []
        os.kill(os.getpid(), number)
        assert recorded == [number]
    with StopRequest() as stop:
        pass
    os.kill(os.getpid(), number)
    assert not stop.received and recorded == [number] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_training_begins_a_signal_ends_the_program_at_once(recorded, number, capsys):
    with pytest.raises(SystemExit) as ended, StopRequest():
        os.kill(os.getpid(), number)
        time.sleep(5)  # such as the embedding of prompts
    assert ended.value.code == RESUMABLE_EXIT_CODE and recorded == []
    assert "the same command goes on" in capsys.readouterr().out
    os.kill(os.getpid(), number)
    assert recorded == [number]


@pytest.mark.parametrize("launched", [True, False])
def test_a_launcher_that_was_gone_before_all_imports_is_noticed_too(recorded, monkeypatch, launched):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(interruption, "find_launcher", lambda: None)
    monkeypatch.setitem(os.environ, "ACCELERATE_DYNAMO_BACKEND", "no")
    if not launched:  # such as under nohup, whose shell is gone
        monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    try:
        with StopRequest() as stop:
            assert not launched and not stop.received
    except SystemExit as ended:
        assert launched and ended.code == RESUMABLE_EXIT_CODE
    assert recorded == []


CHILD = """
import sys, time
from pathlib import Path
from diffusers_tbcm.training import interruption
from diffusers_tbcm.training.interruption import StopRequest
with StopRequest() as stop:
    if sys.argv[2] == "training":
        stop.finish_steps()
    Path(sys.argv[1], "started").touch()
    deadline = time.monotonic() + 20
    while not stop.received and time.monotonic() < deadline:
        time.sleep(0.05)
    if stop.received:
        Path(sys.argv[1], "checkpoint").touch()
"""


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="a launcher is told by /proc")
@pytest.mark.parametrize("launcher", ["accelerate", "quickstart", "shell"])
def test_a_child_whose_launcher_is_killed_alone_stops_and_that_of_a_shell_goes_on(tmp_path, launcher):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    flags = ["--cpu", "--num_processes", "1", str(script), str(tmp_path), "training"]
    starts = tmp_path / "quickstart.py"
    starts.write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])")
    start = {
        "quickstart": [sys.executable, str(starts), str(script), str(tmp_path), "training"],
        "accelerate": [sys.executable, "-m", "accelerate.commands.launch", *flags],
        "shell": ["sh", "-c", f"{sys.executable} {script} {tmp_path} training; true"],
    }[launcher]
    parent = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for((tmp_path / "started").exists)
    (child,) = map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
    parent.terminate()
    parent.wait()
    try:
        assert wait_for((tmp_path / "checkpoint").exists, seconds=10 if launcher != "shell" else 2) == (
            launcher != "shell"
        )
    finally:
        if launcher == "shell":
            os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(interruption.HANGUP is None, reason="a system without SIGHUP")
def test_a_closed_terminal_is_a_request_however_often_it_is_told(monkeypatch):
    received = []
    previous = signal.signal(signal.SIGHUP, lambda number, frame: received.append(number))
    try:
        with StopRequest() as stop:
            stop.finish_steps()
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received and received == []
        os.kill(os.getpid(), signal.SIGHUP)
        assert received == [signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, previous)
