"""Peak memory of a training step: full fine-tuning and LoRA, with and without checkpointing, against images.

    python -m benchmarks.memory                        # 16 rows of the 0.6B model at 1024 px, every setting
    python -m benchmarks.memory --setting "LoRA, checkpointing, AdamW"
    python -m benchmarks.memory --check --rows 4 --layers 2        # on a CPU: modelled peaks against real steps

On a GPU every setting takes a real step in a process of its own, and the figures are the allocator's. Elsewhere they
are modelled: the same step on tensors without data, whose storages are counted (memory_meter.py).

The training step (memory_step.py) is that of examples/tbcm/train_tbcm_distill.py: student weights in float32 under
bf16 autocast, teacher in bf16, prompts embedded beforehand, no EMA. Settings with images stand for the training that
TBCM does without: as many pictures as rows go through the autoencoder, the teacher gives the velocity at noised
latents, the rest is the same. Writes benchmarks/results/memory_{measured,modelled}.{json,md,png} or memory_check.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .common import CONFIGS, RESULTS, ROOT, default_device, machine, markdown
from .memory_meter import KINDS
from .memory_step import SETTINGS, run


GB = 1e9
LINES = {"20": 20, "paper, TBCM: 22.6": 22.6, "paper, Sana-Sprint: 72.0": 72.0}
SHAPE = ("model", "resolution", "rows", "route_steps", "rank", "layers")
CHECKED = ("full, no checkpointing, AdamW", "full, checkpointing, AdamW", "LoRA, checkpointing, AdamW")
NOTES = """
GB are 10^9 bytes. *Counted*: the storages of all tensors at the moment of the step with the most of them, by kind;
*temporaries* are what is left: results on the way, a checkpointed block's recomputed activations, gradients of
activations. AdamW is fused. *Two passes* is the published order, with a pass of its own for the tangent. Without the
text encoder (prompts are embedded beforehand; Gemma 2 2B in bf16 would add 5.2 GB) and without an EMA (another copy of
the trained weights in float32). The images' autoencoder encodes all pictures at once; in slices it would take less.
"""
MODELLED = """
**Modelled, not measured**: the step ran on tensors without data. Attention is assumed to take a kernel that keeps no
scores (flash or memory-efficient), and the math kernel under the JVP of the two-pass order. Workspaces of cuBLAS and
cuDNN, the CUDA context and the allocator's fragmentation come on top. The paper's figures are those of an A100 and of
its own code at batch 16.
"""


def run_in_new_process(setting: str, args: argparse.Namespace) -> dict[str, Any]:
    """The real step of a setting, with an allocator that has held nothing yet."""
    flags = [f"--{name}={value}" for name in SHAPE for value in [getattr(args, name)] if value is not None]
    command = [sys.executable, "-m", "benchmarks.memory", "--child", "--setting", setting, *flags]
    # On a CPU: freed memory goes back to the system at once, or what is resident is not what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    return json.loads(child.stdout.splitlines()[-1])


def peak(record: dict[str, Any]) -> tuple[str, dict[str, int]]:
    """The stage with a setting's peak, and the bytes by kind there."""
    return max(record["stages"].items(), key=lambda stage: sum(stage[1].values()))


def by_kind(records: list[dict[str, Any]]) -> pd.DataFrame:
    """A row for every setting, in GB: its peak, where that is, and what is in memory then."""
    rows = {}
    for record in records:
        stage, kinds = peak(record)
        row: dict[str, Any] = {}
        if "measured" in record:
            row = {"allocated": max(record["measured"].values()) / GB, "reserved": record["reserved"] / GB}
        row |= {"counted": sum(kinds.values()) / GB, "in": stage}
        rows[record["setting"]] = row | {kind: kinds[kind] / GB for kind in KINDS}
    return pd.DataFrame.from_dict(rows, orient="index")


def by_stage(records: list[dict[str, Any]]) -> pd.DataFrame:
    """A row for every setting, in GB: the peak of every stage, as measured or else as counted."""
    rows = {}
    for record in records:
        peaks = record.get("measured") or {stage: sum(kinds.values()) for stage, kinds in record["stages"].items()}
        rows[record["setting"]] = {stage: value / GB for stage, value in peaks.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def written(frame: pd.DataFrame) -> str:
    """A table of GB in Markdown."""
    cells = frame.map(lambda value: f"{value:.2f}" if isinstance(value, float) else value, na_action="ignore")
    return markdown(cells.rename_axis("setting"))


def plot(frame: pd.DataFrame, title: str, path: Path) -> None:
    """Stacked bars of the kinds at every setting's peak."""
    import matplotlib

    matplotlib.use("agg")
    axes = frame[list(KINDS)].plot.barh(stacked=True, figsize=(11, 0.42 * len(frame) + 2), width=0.75)
    for place, total in enumerate(frame["counted"]):
        axes.text(total + 0.5, place, f"{total:.1f}", va="center", fontsize=9)
    for name, value in LINES.items():
        axes.axvline(value, color="black", linewidth=0.8, linestyle=":")
        side = "right" if name == "20" else "left"
        axes.text(value, len(frame) - 0.15, f" {name} ", fontsize=8, ha=side, va="bottom")
    axes.set_ylim(-0.6, len(frame))
    axes.invert_yaxis()
    axes.set(xlabel="GB at the peak", ylabel="", title=title, xlim=(0, 1.1 * max(72, frame["counted"].max())))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.35, -0.1), ncols=len(KINDS))
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(path, dpi=130, bbox_inches="tight")


def check(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Settings at their modelled peak and at that of real tensors: counted, and the growth of the process."""
    rows = []
    for setting in CHECKED:
        real, fake = run_in_new_process(setting, args), run(SETTINGS[setting], args, device, fake=True)
        row = {"modelled": peak(fake)[1], "counted": peak(real)[1]}
        rows.append({"setting": setting} | {name: sum(kinds.values()) for name, kinds in row.items()})
        rows[-1]["resident"] = real["resident"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="0.6b")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16, help="points of one prompt's trajectory")
    parser.add_argument("--route_steps", type=int, help="the teacher's; 17, or modelled 2, as all its calls are alike")
    parser.add_argument("--rank", type=int, default=32, help="of LoRA")
    parser.add_argument("--layers", type=int, default=None, help="fewer than the model's")
    parser.add_argument("--setting", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument(
        "--check", action="store_true", help="compare model and reality, at a size that the CPU can run"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = default_device()
    if args.route_steps is None:
        args.route_steps = 17 if device.type == "cuda" else 2
    torch.manual_seed(0)
    if args.child:
        print(json.dumps(run(SETTINGS[args.setting[0]], args, device, fake=False)))
        return

    record: dict[str, Any] = {
        "config": {name: getattr(args, name) for name in SHAPE},
        **machine(device),
    }
    if args.check:
        record["settings"] = check(args, device)
        print(pd.DataFrame(record["settings"]).set_index("setting").div(GB).round(3).to_string())
        (RESULTS / "memory_check.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return

    name = "measured" if device.type == "cuda" else "modelled"
    record["settings"] = []
    for setting in args.setting:
        real = device.type == "cuda"
        step = run_in_new_process(setting, args) if real else run(SETTINGS[setting], args, device, fake=True)
        record["settings"].append(step)
        print(f"{setting}: {sum(peak(step)[1].values()) / GB:.2f} GB counted", flush=True)
    kinds, stages = by_kind(record["settings"]), by_stage(record["settings"])
    title = f"Peak memory of a training step, {name}: {args.model}, {args.rows} rows, {args.resolution} px"
    versions = ", ".join(f"{key} {record[key]}" for key in ("device", "torch", "diffusers", "python"))
    text = f"# {title}\n\n{versions}; LoRA of rank {args.rank}\n{MODELLED if name == 'modelled' else ''}{NOTES}\n"
    text += f"## By kind, GB\n\n{written(kinds)}\n## By stage, GB\n\n{written(stages)}"
    print(f"\n{kinds.round(2).to_string()}\n\n{stages.round(2).to_string()}")
    path = RESULTS / f"memory_{name}"
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(kinds, title, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
