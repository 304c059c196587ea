import json
import subprocess

import pytest

from diffusers_tbcm import __version__
from diffusers_tbcm.export.record import (
    Measurement,
    Metrics,
    git_revision,
    load_metrics,
    save_metrics,
    training_config,
)


def git(folder, *arguments):
    author = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    finished = subprocess.run(["git", "-C", folder, *author, *arguments], check=True, capture_output=True, text=True)
    return finished.stdout.strip()


def test_config_holds_flags_and_versions_and_neither_tokens_nor_paths(tmp_path):
    script = tmp_path / "train.py"
    flags = {"seed": 3, "hub_token": "hf_secret", "output_dir": str(tmp_path / "run"), "prompts_file": "data/p.txt"}
    config = training_config({**flags, "scales": [4.0, 4.5], "rank": None}, script)
    assert config["flags"] == {
        "seed": 3, "output_dir": "run", "prompts_file": "data/p.txt", "scales": [4.0, 4.5], "rank": None,
    }  # fmt: skip
    assert config["versions"]["diffusers_tbcm"] == __version__
    assert {"python", "diffusers", "torch", "transformers"} <= config["versions"].keys()
    assert config["git_revision"] is None
    more = {
        "api_key": "k", "train_data_dir": "~/pictures/of mine", "resume_from_checkpoint": "../run/checkpoint-7",
        "validation_prompts": ["a dog / a cat", "/a/b/c.txt"], "pretrained_model_name_or_path": "owner/teacher",
        "latents_cache": r"D:\caches\latents", "dataset_name": "file:///data/x/prompts.csv",
    }  # fmt: skip
    assert training_config(more, script)["flags"] == {
        "train_data_dir": "of mine", "resume_from_checkpoint": "checkpoint-7",
        "validation_prompts": ["a dog / a cat", "c.txt"], "pretrained_model_name_or_path": "owner/teacher",
        "latents_cache": "latents", "dataset_name": "prompts.csv",
    }  # fmt: skip
    written = json.dumps(config)
    assert "hf_secret" not in written and str(tmp_path) not in written


def test_git_revision_is_that_of_the_checkout_which_tracks_the_script(tmp_path):
    script, other = tmp_path / "train.py", tmp_path / "other.py"
    for file in (script, other):
        file.touch()
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    git(tmp_path, "tag", "v1")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert git_revision(script) == revision
    assert git_revision(other) is None
    script.write_text("changed")
    assert git_revision(script) == f"{revision}-dirty"


def test_metrics_come_back_and_none_are_none(tmp_path):
    assert load_metrics(tmp_path) is None
    rows = [Measurement("teacher", 20, {"FD": 1.5}), Measurement("student", 1, {"FD": 2.25, "PSNR": 20.0})]
    save_metrics(tmp_path, rows, dataset="12 prompts", command="python measure.py", details={"seed": 0})
    assert load_metrics(tmp_path) == Metrics(rows, "12 prompts", "python measure.py", {"seed": 0})


def test_metrics_hold_no_paths_and_no_tokens(tmp_path):
    rows = [Measurement("student", 1, {"FD": 2.0})]
    command = "python measure.py --prompts_file=/data/x/p.txt --reference_dir '/data of mine/y' --hub_token=t"
    details = {"reference": "/data/x/real.safetensors", "seed": 0}
    save_metrics(tmp_path, rows, dataset="12 prompts of /data/x/p.txt", command=command, details=details)
    assert load_metrics(tmp_path) == Metrics(
        rows, "12 prompts of p.txt", "python measure.py --prompts_file=p.txt --reference_dir 'y' --hub_token=***",
        {"reference": "real.safetensors", "seed": 0},
    )  # fmt: skip


@pytest.mark.parametrize("missing", ["measurements", "dataset", "command"])
def test_metrics_without_their_circumstances_are_refused(missing, tmp_path):
    given = {
        "measurements": [Measurement("student", 1, {"FD": 2.0})],
        "dataset": "12 prompts",
        "command": "python m.py",
    }
    empty = {**given, missing: type(given[missing])()}
    with pytest.raises(ValueError, match=f"{missing} is "):
        save_metrics(tmp_path, **empty)
    assert load_metrics(tmp_path) is None
