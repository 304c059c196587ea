"""Does a student lose by training on every teacher row several times? The full quickstart's recipe, shortened.

    python -m benchmarks.replay --output_dir runs/replay        # 18 runs, 50 minutes on a CPU core; can be resumed

Every setting trains with every seed for the same number of optimiser steps, so on equally many rows; those with replay
once more for the steps that fit into the time of the run without. Writes benchmarks/results/replay_<device>.json, .md
and .png: MobileNet-FD of 500 pictures at 1 step, and seconds of training.
"""

import argparse
import json
import subprocess
from pathlib import Path

import matplotlib
import pandas

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.pipeline_folder import list_checkpoints
from examples.tbcm.mini_teacher.emoji_metrics import DISTILLATION_PROMPTS_FILE, Meter, draw, load_evaluation
from examples.tbcm.quickstart import full_recipe, training_command

from .common import EMBEDDED_TEACHER, RESULTS, default_device, machine, write_results


matplotlib.use("Agg")
from matplotlib import pyplot


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
    recipe = {**full_recipe(steps), "seed": seed, "teacher_batch_size": 2, **flags}
    command = training_command(folder, steps, EMBEDDED_TEACHER / DISTILLATION_PROMPTS_FILE, **recipe)
    if list_checkpoints(folder):
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


def report(runs: pandas.DataFrame, details: dict[str, object]) -> None:
    """The table of means and standard deviations over the seeds, and a plot of every run."""
    name = f"replay_{default_device().type}"
    groups = runs.groupby(["compared at", "setting"], sort=False)
    table = groups[["steps", "seconds"]].mean().round(0).astype(int)
    for metric, digits in (("MobileNet-FD", 1), ("top-5 retrieval", 3)):
        table[metric] = groups[metric].mean().round(digits)
        table[f"{metric}, s.d."] = groups[metric].std().round(digits)
    write_results(name, table.reset_index(), details | machine(default_device()))
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (compared_at, setting), part in groups:
        axes.scatter(
            part["seconds"], part["MobileNet-FD"], label=f"{setting}, {compared_at}",
            marker="o" if compared_at == "equal rows" else "^", color=f"C{list(SETTINGS).index(setting)}",
        )  # fmt: skip
    axes.set(xlabel="seconds of training", ylabel="MobileNet-FD at 1 step (lower is better)", xlim=(0, None))
    axes.legend(fontsize="small")
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


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
    report(pandas.DataFrame(records), {"max_train_steps": args.max_train_steps, "seeds": args.seeds})


if __name__ == "__main__":
    main()
