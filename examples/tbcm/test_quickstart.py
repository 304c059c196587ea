"""The quickstart's command: it starts anew where there is nothing to go on from."""

import subprocess

import pytest

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
    with pytest.raises(SystemExit, match="75"):
        quickstart.main(["--output_dir", str(output_dir)])
    assert ("--resume_from_checkpoint" in started) == (left == "checkpoint-5")
