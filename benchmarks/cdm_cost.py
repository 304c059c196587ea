"""What an update of the student costs in CDM and in TBCM: seconds and peak memory, same teacher, same rows.

    python -m benchmarks.cdm_cost                                                 # embedded teacher
    python -m benchmarks.cdm_cost --teacher runs/random-0.6b --mixed_precision bf16 --gradient_checkpointing   # GPU

The training scripts themselves run, in turns, and their logs are read. A row is a recorded point of a trajectory: TBCM
has route_steps - 1 of every prompt's, CDM one. An update of CDM's student comes with two rollouts and two steps of the
critic; how long a rollout is, is random. Writes benchmarks/results/cdm_cost_<name>_<device>.json and .md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import pandas

from .common import EMBEDDED_TEACHER, ROOT, default_device, machine, write_results


WARM_UP = 2  # steps
EVERY = 2  # steps of CDM to one update of its student
SCRIPTS = ROOT / "examples" / "tbcm"


def variants(rows: int, rank: int, rollout_steps: int) -> dict[str, tuple[str, list[str]]]:
    """The script and the flags of every method, by name."""
    tbcm = ["--train_batch_size=1", f"--route_steps={rows + 1}", "--brightness_threshold=0"]
    cdm = [f"--train_batch_size={rows}", f"--max_rollout_steps={rollout_steps}", "--drift_steps=0"]
    return {
        "TBCM": ("train_tbcm_distill.py", tbcm),
        f"TBCM, LoRA of rank {rank}": ("train_tbcm_distill.py", [*tbcm, f"--rank={rank}"]),
        "CDM": ("train_cdm.py", cdm),
        f"CDM, LoRA of rank {rank}": ("train_cdm.py", [*cdm, f"--rank={rank}"]),
    }


def measure(script: str, flags: list[str], rows: int) -> tuple[float, float]:
    """Seconds of an update of the student, and the peak memory of the process in GiB, as the run logs them."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPTS / script), f"--output_dir={folder}/run", "--report_to=none", *flags]
        subprocess.run([*command, "--logging_steps=1"], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    every = EVERY if script == "train_cdm.py" else 1
    return every * mean(rows / line["rows_per_second"] for line in lines[WARM_UP:]), lines[-1]["peak_memory_gib"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(EMBEDDED_TEACHER))
    parser.add_argument("--rows", type=int, default=16, help="of an update")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--max_rollout_steps", type=int, default=28, help="CDM's; the paper's")
    parser.add_argument("--updates", type=int, default=20, help="of CDM's student; TBCM's takes twice as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_sequence_length", type=int, default=40)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    device = default_device()
    with TemporaryDirectory() as folder:
        shared = [
            f"--pretrained_model_name_or_path={args.teacher}", f"--precompute_embeddings={folder}/embeddings",
            f"--prompts_file={EMBEDDED_TEACHER / 'prompts.txt'}", "--max_prompts=64",
            f"--max_sequence_length={args.max_sequence_length}", f"--mixed_precision={args.mixed_precision}",
            f"--max_train_steps={WARM_UP + 2 * args.updates}", "--checkpointing_steps=1000000",
            *["--gradient_checkpointing"] * args.gradient_checkpointing,
        ]  # fmt: skip
        methods = variants(args.rows, args.rank, args.max_rollout_steps)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
        for _ in range(args.rounds):
            for name, (script, flags) in methods.items():
                found[name].append(measure(script, [*shared, *flags], args.rows))
                print(name, *found[name][-1], flush=True)
    reference = median(seconds for seconds, _ in found["TBCM"])
    table = pandas.DataFrame(
        {
            "method": name,
            "seconds an update": round(median(seconds for seconds, _ in runs), 3),
            "of TBCM": round(median(seconds for seconds, _ in runs) / reference, 2),
            "from": round(min(seconds for seconds, _ in runs), 3),
            "to": round(max(seconds for seconds, _ in runs), 3),
            "peak memory, GiB": round(max(peak for _, peak in runs), 3),
        }
        for name, runs in found.items()
    )
    details = {"teacher": Path(args.teacher).name} | {
        name: value for name, value in vars(args).items() if name != "teacher"
    }
    write_results(f"cdm_cost_{Path(args.teacher).name}_{device.type}", table, details | machine(device))


if __name__ == "__main__":
    main()
