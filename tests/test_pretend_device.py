"""Device mistakes, looked for on a device that is not the CPU; see `pretend_device.py` and `on_pretend_device.py`.

What it has found, each a crash, wrong numbers or a wait on a real device, and mended since:

- `train_cdm.py` ended at its start: `DriftWatch` multiplied what the teacher gives by a guidance scale on the CPU.
- The weight of a student's LoRA on a teacher with a guidance embedder could not be set once the pipeline had moved:
  the students' embedders lie on the CPU, the teacher's does not.
- `HostCopy` waited on CUDA alone: on other devices a run read norms and counts before they had arrived.
- CDM's loop waited for the device once in every rollout and for every draw of tau.

By reading: `DriftWatch` asked for float64 on the device, which MPS lacks; copies that are not waited for give wrong
values on MPS, so that none are made there; `sample_diffusion_timesteps` and `neighbouring_timesteps` waited where they
were given a `device`; `evaluate_student.py` named a GPU of the machine as its hardware, also where it had drawn on the
CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version


TESTS = Path(__file__).parent
ROOT = TESTS.parent
# Tests of `on_pretend_device.py` by name, so that several workers share them; the last part has what the others leave.
PARTS = ["other_families and tbcm", "other_families and cdm", "training_there"]
PARTS.append(" and ".join(f"not ({part})" for part in PARTS))


@pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="backends in Python came with torch 2.9")
@pytest.mark.parametrize("part", PARTS)
def test_everything_runs_on_the_pretend_device(part):
    paths = [str(path) for path in (ROOT, ROOT / "src", TESTS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "examples.tbcm.conftest", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, str(TESTS / "on_pretend_device.py"), "-k", part],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=3600,
    )
    assert ended.returncode == 0, ended.stdout[-20000:]
