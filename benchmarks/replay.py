#!/usr/bin/env python
"""Does a student lose by training on every teacher row several times? The quickstart's recipe, with and without replay.

    python benchmarks/replay.py --output_dir runs/replay        # about 80 minutes on one CPU core; resumes where it was

Every setting trains with every seed for the same number of optimiser steps, so on equally many rows; those with replay
once more for the steps that fit into the time of the run without. Writes benchmarks/results/replay_<device>.json, .md
and .png: MobileNet-FD of 500 pictures at 1 step, and seconds of training.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import matplotlib
import pandas
import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tbcm"))
from emoji_metrics import Meter, draw, load_evaluation  # noqa: E402
from quickstart import likeness, training_command  # noqa: E402

from diffusers_tbcm import SanaTBCMPipeline  # noqa: E402


RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "no replay": {"replay_buffer_size": 0, "replay_steps": 1},
    "shuffled, every row once": {"replay_buffer_size": 64, "replay_steps": 1},
    "every row twice": {"replay_buffer_size": 64, "replay_steps": 2},
    "every row four times": {"replay_buffer_size": 64, "replay_steps": 4},
}
WITHOUT = "no replay"


def distil(folder: Path, seed: int, steps: int, flags: dict[str, int]) -> dict[str, float]:
    """Train one student, unless that has been done, and measure its pictures at 1 step."""
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    command = training_command(folder, steps, seed=seed, **flags)
    if folder.exists():
        command += ["--resume_from_checkpoint", "latest"]
    subprocess.run(command, check=True)
    # Training alone, from the first logged step to the last; a pause between two runs does not count.
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = 2 * 15
    seconds = sum(10 * rows / line["rows_per_second"] for line in lines if "rows_per_second" in line)
    items = [item for item in load_evaluation() if not item.held_out][:500]
    pipeline = SanaTBCMPipeline.from_pretrained(folder)
    pictures = draw(pipeline, [item.prompt for item in items], 1)
    figures = Meter()(pictures, [item.concept for item in items])
    record = {"steps": steps, "seconds": round(seconds, 1), **figures}
    result.write_text(json.dumps(record))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="of the runs, some 300 MB")
    parser.add_argument("--max_train_steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    records = []

    def run(name: str, compared_at: str, seed: int, steps: int) -> None:
        folder = args.output_dir / f"{name.replace(' ', '_').replace(',', '')}-{compared_at.replace(' ', '_')}-{seed}"
        figures = distil(folder, seed, steps, SETTINGS[name])
        records.append({"setting": name, "compared at": compared_at, "seed": seed, **figures})
        print(records[-1], flush=True)

    for seed in args.seeds:
        for name in SETTINGS:
            run(name, "equal rows", seed, args.max_train_steps)
    table = pandas.DataFrame(records)
    seconds = table.groupby("setting")["seconds"].mean()
    for seed in args.seeds:
        for name in list(SETTINGS)[2:]:
            steps = round(args.max_train_steps * seconds[WITHOUT] / seconds[name] / 10) * 10
            run(name, "equal time", seed, steps)
    report(pandas.DataFrame(records), args)


if __name__ == "__main__":
    main()
