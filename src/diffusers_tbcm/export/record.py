"""What a checkpoint's folder says of it: how it was made, every flag of its run, and what was measured on it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_tbcm import __version__

from ..errors import in_a_line
from ..files import read_json, write_json
from ..owned import OwnedFolder
from ..pipeline_folder import METRICS, TRAINING_RECORD
from ..redaction import is_secret, redact_values


RECORD_ENTRIES: dict[str, Any] = {  # of a training record, and their kinds
    "model_id": str, "teacher": str, "base_model": str | None, "license": dict, "resolution": int, "prompt": str,
    "training": dict, "image_free": bool, "samples": list, "adapter": dict | None,
    "prepared": bool | None,
}  # fmt: skip
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"  # a flow student is known by what draws with it
SAMPLE_ENTRIES = {"prompt": str, "num_inference_steps": int, "file": str}
RECORDED_PACKAGES = ("accelerate", "diffusers", "peft", "torch", "transformers")


@dataclass(frozen=True)
class Sample:
    """A picture that a student drew, for its card.

    Args:
        prompt: what was asked for.
        num_inference_steps: steps taken.
        image: the picture.
    """

    prompt: str
    num_inference_steps: int
    image: Image.Image


@dataclass(frozen=True)
class StudentDescription:
    """What a saved student's card and records say of it.

    Args:
        prompt: what the card's examples draw.
        training: the card's training table, JSON values by name.
        config: `training_config.json`, as `training_config` makes it; None writes none.
        samples: what the student drew; the first 48 are shown, at 512 pixels a side at most.
        resolution: what the student was distilled at, in pixels a side; by default its own size.
        license: the student's; by default what the teacher's card says, and none where that says nothing.
        model_id: what the card's examples load; the folder's name by default.
        image_free: whether it was distilled by TBCM, from prompts alone; otherwise the training table's `method` is
            named, and the pictures.
    """

    prompt: str
    training: Mapping[str, Any]
    config: Mapping[str, Any] | None = None
    samples: Sequence[Sample] = ()
    resolution: int | None = None
    license: str | None = None
    model_id: str | None = None
    image_free: bool = True


@dataclass(frozen=True)
class Measurement:
    """One row of a card's result table.

    Args:
        model: `"student"` or another, such as `"teacher"`; only the student's rows become metadata of the card.
        num_inference_steps: steps taken.
        metrics: value by metric name, such as `{"MobileNet-FD": 12.3}`.
        intervals: low and high end of its confidence interval, by metric name; a metric may have none.
    """

    model: str
    num_inference_steps: int
    metrics: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """What was measured on a checkpoint, as its `metrics.json` holds it.

    Args:
        measurements: the rows; a row may lack a metric that others have.
        dataset: what they were taken on, in words.
        command: what measures them again.
        details: whatever else belongs to them, JSON values by name: seed, hardware, seconds.
    """

    measurements: Sequence[Measurement]
    dataset: str
    command: str
    details: Mapping[str, Any]


def save_metrics(
    folder: str | PathLike[str],
    measurements: Sequence[Measurement],
    *,
    dataset: str,
    command: str,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write what was measured into a checkpoint's folder, where `render_model_card` finds it; stripped by `redact`.

    Args:
        folder: the checkpoint's.
        measurements: at least one row.
        dataset: what they were taken on, in words.
        command: what measures them again.
        details: whatever else belongs to them, JSON values by name.

    Raises:
        ValueError: where there is no measurement, `dataset` or `command` is empty, or the folder has a `metrics.json`
            that this package did not write.
    """
    for name, value in (("measurements", measurements), ("dataset", dataset), ("command", command)):
        if not value:
            raise ValueError(f"{name} is {value!r}: a result needs its figures, what they were taken on, and how")
    metrics = asdict(Metrics(list(measurements), dataset, command, dict(details or {})))
    with OwnedFolder(folder, "folder").written(METRICS) as partial:
        write_json(partial, redact_values(metrics))


def load_metrics(folder: str | PathLike[str]) -> Metrics | None:
    """Read what `save_metrics` wrote.

    Args:
        folder: the checkpoint's.

    Returns:
        The metrics; None where nothing was measured.

    Raises:
        ValueError: where the file holds something else.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        metrics = Metrics(**{**found, "measurements": [Measurement(**row) for row in found["measurements"]]})
        values = [value for row in metrics.measurements for value in row.metrics.values()]
        values += [end for row in metrics.measurements for ends in row.intervals.values() for end in ends]
        if not all(isinstance(value, int | float) for value in values):
            raise TypeError("a value is no number")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is not the {METRICS} that an evaluation writes: {in_a_line(error)}"
        ) from error
    return metrics


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse a training record that a card cannot be made of.

    Args:
        record: what `training.json` holds.

    Raises:
        ValueError: where an entry is missing or of another kind.
    """
    samples = record.get("samples")
    wrong = [name for name, kind in RECORD_ENTRIES.items() if not isinstance(record.get(name), kind)]
    if wrong or not all(
        isinstance(sample, dict) and all(isinstance(sample.get(name), kind) for name, kind in SAMPLE_ENTRIES.items())
        for sample in samples or ()
    ):
        raise ValueError(
            f"its {TRAINING_RECORD} is not the one that training writes: {wrong[0] if wrong else 'samples'} is missing"
            " or of another kind"
        )


def is_flow_adapter(record: Mapping[str, Any]) -> bool:
    """Say whether the adapters of a folder make a flow student of their teacher, and not a consistency student.

    Args:
        record: what `training.json` holds.

    Returns:
        Whether its `adapter` names the flow scheduler.
    """
    adapter = record.get("adapter")
    return isinstance(adapter, dict) and adapter.get("scheduler") == FLOW_SCHEDULER


def training_config(flags: Mapping[str, Any], script: str | PathLike[str]) -> dict[str, Any]:
    """Describe a run so that it can be repeated, and so that the description can be published.

    Secrets are left out, and of paths remains what `redact` leaves.

    Args:
        flags: every flag's value by name, the seed among them.
        script: the training script.

    Returns:
        `flags`, `versions` and `git_revision`, all JSON values.
    """
    versions = {name: version(name) for name in RECORDED_PACKAGES}
    return {
        "flags": redact_values({name: value for name, value in flags.items() if not is_secret(name)}),
        "versions": {"python": platform.python_version(), "diffusers_tbcm": __version__, **versions},
        "git_revision": git_revision(script),
    }


def git_revision(script: str | PathLike[str]) -> str | None:
    """Find the revision of the checkout that a script belongs to.

    Args:
        script: a file.

    Returns:
        The commit, followed by `-dirty` where tracked files differ from it; None where git does not track the script.
    """
    script = Path(script).resolve()
    git = ("git", "-C", str(script.parent))
    try:  # a script may lie in a checkout that it is no part of, such as an environment in somebody's project
        subprocess.run([*git, "ls-files", "--error-unmatch", script.name], check=True, capture_output=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
