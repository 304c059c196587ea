"""Push to a Hub on loopback and load from it, with the real client over HTTP in processes of their own."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from tiny import tiny_transformer, write_tiny_pipeline

from diffusers_tbcm import hub as hub_module
from diffusers_tbcm.export import save_student_pipeline


LICENSE = "apache-2.0"

# Pushes to each repository that is named, and prints what came of it.
PUSH = """
import json, sys, time
time.sleep = lambda seconds: None  # waits between retries
from diffusers_tbcm.hub import push_pipeline_to_hub

folder, pushes = json.loads(sys.argv[1])
for arguments in pushes:
    try:
        print(json.dumps(["url", push_pipeline_to_hub(folder, **arguments)]))
    except (ValueError, RuntimeError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def run(script: str, *arguments: str, **environment: str) -> str:
    source = str(Path(hub_module.__file__).parents[1])
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        | {"PYTHONPATH": source}
        | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    assert LoopbackHub.TOKEN not in process.stdout + process.stderr
    return process.stdout


def push(folder: Path, pushes: list[dict], **environment: str) -> list[list[str]]:
    return [json.loads(line) for line in run(PUSH, json.dumps([str(folder), pushes]), **environment).splitlines()]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A run's folder: a pipeline, and what is nobody else's business."""
    teacher = write_tiny_pipeline(tmp_path_factory.mktemp("teachers") / "tiny_teacher")
    folder = tmp_path_factory.mktemp("runs") / "student"
    weights = tiny_transformer(guidance_embeds=True)
    save_student_pipeline(weights, teacher, folder, prompt="a dolphin", training={"steps": 7})
    for name in (
        "checkpoint-7/optimizer.bin", "checkpoint-7.partial/model.safetensors", "logs/events.out", "metrics.jsonl",
        "validation/step-7.png", "black_latent_64.safetensors", "vae/diffusion_pytorch_model.bin",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for others")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


def expected_files(folder: Path) -> dict[str, bytes]:
    names = [
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")
    ]
    private = ("checkpoint", "black_latent")
    return {name: (folder / name).read_bytes() for name in names if not name.startswith(private)}


def test_push(hub, student):
    hub.cut_uploads["me/cut-once"] = 1
    hub.cut_uploads["me/cut-always"] = math.inf
    hub.rivals["me/raced"] = 1
    hub.lost_replies["me/unanswered"] = 1
    write = {"token": hub.TOKEN + "\n", "license": LICENSE}
    results = push(
        student,
        [
            {"repo_id": "plain", **write},
            {"repo_id": "me/cut-once", **write},
            {"repo_id": "me/cut-always", **write},
            {"repo_id": "me/raced", **write},
            {"repo_id": "me/unanswered", **write},
        ],
        **hub.environment(),
    )
    for r in results:
        print(r)
    for repo in hub.repos:
        print(repo, hub.titles(repo), list(hub.files(repo)), hub.repos[repo].tags)
