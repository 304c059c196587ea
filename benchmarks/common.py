"""What the benchmarks share: the machine in words, medians, tables."""

import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import pandas
import psutil
import torch
import transformers


RESULTS = Path(__file__).with_name("results")


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions, to stand beside every figure."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "cores": psutil.cpu_count(),
        "load_average": round(psutil.getloadavg()[0], 1),  # what else runs on this machine
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def medians(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every entry, rounded to a hundredth of a millisecond where it is in seconds."""
    return {name: round(median(record[name] for record in records), 5) for name in records[0]}


def markdown(frame: pandas.DataFrame) -> str:
    """A table in Markdown, its index first; pandas would need another package for it."""
    lines = [[frame.index.name or "", *frame.columns], ["---"] * (1 + len(frame.columns))]
    for name, row in frame.iterrows():
        lines.append([name, *("" if pandas.isna(value) else value for value in row)])
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
