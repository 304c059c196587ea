#!/usr/bin/env python
"""Does a change of the code leave every trained weight as it was? Short runs of all five scripts, bit for bit.

    python -m benchmarks.same_weights --before ../before          # a checkout of the commit to compare with

Every run takes 6 steps of the embedded teacher in both checkouts, each by its own code, on one thread of the CPU. What
is compared: the exported student, and the weights and the optimisers' state of the last checkpoint. The results of
--before stay in --work and are used again while its commit, the flags, the libraries and the kind of CPU are the same.
Ends with 1 on any difference.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file


TEACHER = Path("examples/tbcm/sana_emoji_mini")  # in a checkout
RESOLUTION = 64  # the teacher's
STEPS = 6
LEARNING_RATE = 1e-3
COMPARED = (
    "transformer/*.safetensors",
    "lora/*.safetensors",
    "checkpoint-6/model*.safetensors",
    "checkpoint-6/optim*.bin",
)

SHARED = (
    "--seed 0 --mixed_precision no --report_to none --logging_steps 1 --max_sequence_length 48"
    f" --no-complex_human_instruction --learning_rate {LEARNING_RATE}"
)
TBCM = (
    "train_tbcm_distill.py --prompts_file {teacher}/prompts.txt --route_steps 4 --tangent_warmup_steps 3"
    " --tangent_cooldown_start_step 4 --tangent_cooldown_steps 2"
)
UNFILTERED = f"{TBCM} --brightness_threshold 0"
EMA = "--use_ema --ema_decay 0.5"
PICTURES = "--train_data_dir {pictures} --train_batch_size 2"
CDM = (
    "train_cdm.py --prompts_file {teacher}/prompts.txt --train_batch_size 2 --max_rollout_steps 4"
    f" --lr_scheduler constant --lr_warmup_steps 0 --critic_learning_rate {LEARNING_RATE}"
)
SPRINT = f"train_sana_sprint.py {PICTURES} --tangent_warmup_steps 3"
WHOLE = f"--max_train_steps {STEPS} --checkpointing_steps {STEPS}"
FILTERED = f"{TBCM} --brightness_threshold 10 --train_batch_size 2"  # drops 5 of the 12 prompts, at steps 1 and 4 both
WARM = "--lr_scheduler constant_with_warmup --lr_warmup_steps 4"  # unlike others it does not depend on the last step
RUNS: dict[str, tuple[str, ...]] = {  # the commands of each, one after the other
    "tbcm": (f"{UNFILTERED} {WHOLE}",),
    "tbcm-ema": (f"{UNFILTERED} {WHOLE} {EMA} --validation_steps 3 --validation_prompts 'a dolphin' 'an owl'",),
    "tbcm-lora": (f"{UNFILTERED} {WHOLE} --rank 4 --merge_lora",),
    "tbcm-accumulation": (f"{UNFILTERED} {WHOLE} --gradient_accumulation_steps 2",),
    "tbcm-buffer": (f"{UNFILTERED} {WHOLE} --train_batch_size 2 --replay_buffer_size 8 --replay_steps 2",),
    "tbcm-endpoint": (f"{UNFILTERED} {WHOLE} --endpoint_warmup_steps 3",),
    "tbcm-resume": (
        f"{UNFILTERED} {EMA} {WARM} --max_train_steps 3 --checkpointing_steps 3",
        f"{UNFILTERED} {EMA} {WARM} {WHOLE} --resume_from_checkpoint latest",
    ),
    "tbcm-filter": (f"{FILTERED} {WHOLE}",),
    "scm": (f"train_scm.py {PICTURES} {WHOLE} --tangent_warmup_steps 3",),
    "sprint": (f"{SPRINT} {WHOLE}",),
    "sprint-largest": (f"{SPRINT} {WHOLE} --train_largest_timestep --misaligned_pairs_D",),
    "lcm": (f"train_lcm.py {PICTURES} {WHOLE}",),
    "cdm": (f"{CDM} {WHOLE} {EMA}",),
    "cdm-lora": (f"{CDM} {WHOLE} --rank 4 --merge_lora",),
}


def write_pictures(folder: Path) -> None:
    """A few drawn pictures, each with its caption."""
    folder.mkdir(parents=True)
    for index, caption in enumerate(("a dog", "an owl", "a violin", "the sun", "a bus")):
        picture = Image.new("RGB", (RESOLUTION, RESOLUTION), (255 - 50 * index, 128, 50 * index))
        ImageDraw.Draw(picture).ellipse((8 * index, 8, 60, 24 + 8 * index), fill=(50 * index, 200, 90))
        picture.save(folder / f"{index}.png")
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")


def environment(checkout: Path, work: Path) -> dict[str, str]:
    """The variables of a run: the checkout's own package, nothing written there, one thread of the CPU, no network."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "datasets_cache")}
    place = {"PYTHONPATH": str(checkout / "src"), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    return {**os.environ, **threads, **offline, **place}


def state_of(checkout: Path, work: Path) -> str:
    """The commit, the libraries and the CPU's instructions, and a check whose package the scripts import."""
    find = "import importlib.util as u; print(u.find_spec('diffusers_tbcm').origin)"
    origin = subprocess.check_output([sys.executable, "-c", find], env=environment(checkout, work), text=True).strip()
    if not Path(origin).resolve().is_relative_to(checkout):
        raise SystemExit(f"diffusers_tbcm would come from {origin}, not from {checkout}")
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    libraries = [version(name) for name in ("torch", "diffusers", "transformers", "accelerate")]
    return " ".join([head.stdout.strip(), *libraries, torch.backends.cpu.get_cpu_capability()])


def train(name: str, checkout: Path, folder: Path, work: Path) -> None:
    """Do one of RUNS into a new folder, its output into <folder>.log; a command that fails ends everything."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    places = {"teacher": checkout / TEACHER, "pictures": work / "pictures"}
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        for line in RUNS[name]:
            script, *flags = [part.format(**places) for part in shlex.split(f"{line} {SHARED}")]
            command = [sys.executable, f"examples/tbcm/{script}", *flags, "--output_dir", str(folder)]
            command += ["--pretrained_model_name_or_path", str(checkout / TEACHER)]
            done = subprocess.run(
                command, cwd=checkout, env=environment(checkout, work), stdout=output, stderr=subprocess.STDOUT
            )
            if done.returncode:
                raise SystemExit(f"{name} in {checkout} ended with {done.returncode}: see {log}")


def tensors_in(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of nested dictionaries and lists, by its path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(entry, f"{name} {key}")


def results_of(run: Path) -> dict[str, torch.Tensor]:
    """What a run is compared by: every tensor of the files that COMPARED names."""
    found: dict[str, torch.Tensor] = {}
    for pattern in COMPARED:
        for file in sorted(run.glob(pattern)):
            content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
            found |= tensors_in(content, str(file.relative_to(run)))
    return found


def difference(one: torch.Tensor | None, other: torch.Tensor | None) -> float | None:
    """None for the same bits, else the largest difference: infinite where a tensor is missing or of another kind."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return float("inf")
    if torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other))):
        return None
    return (one.double() - other.double()).abs().max().item()


def compare(before: Path, after: Path, teacher: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A run's row of the table; says which tensors differ, the first few."""
    old, new = results_of(before), results_of(after)
    names = sorted(old.keys() | new.keys())
    found = {name: difference(old.get(name), new.get(name)) for name in names}
    different = {name: size for name, size in found.items() if size is not None}
    for name in list(different)[:5]:
        print(f"  differs by {different[name]:.3g}: {name}")
    student = {name.split()[1]: tensor for name, tensor in old.items() if name.startswith("transformer/")}
    shared = [(student[name], tensor) for name, tensor in teacher.items() if name in student]
    moved = [(tensor - start.float()).abs().max().item() for tensor, start in shared]
    return {
        "tensors": len(names),
        "equal": len(names) - len(different),
        "largest difference": max(different.values(), default=0.0),
        "moved": f"{sum(size >= LEARNING_RATE / 2 for size in moved)} of {len(moved)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the code to compare with")
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[1], help="default: this checkout")
    parser.add_argument("--work", type=Path, default=Path("runs/same_weights"), help="folder of the runs")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    args = parser.parse_args()
    before, after, work = args.before.resolve(), args.after.resolve(), args.work.resolve()
    if not (work / "pictures").exists():
        write_pictures(work / "pictures")
    state, _ = state_of(before, work), state_of(after, work)
    rows = []
    for name in args.runs:
        start = time.perf_counter()
        old, new = work / "before" / name, work / "after" / name
        record, content = old.with_suffix(".json"), json.dumps([state, SHARED, RUNS[name]])
        if not record.exists() or record.read_text() != content:
            record.unlink(missing_ok=True)
            train(name, before, old, work)
            record.write_text(content)
        train(name, after, new, work)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        teacher = load_file(before / TEACHER / "transformer" / "diffusion_pytorch_model.safetensors")
        rows.append({"run": name, **compare(old, new, teacher)})
    table = pandas.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.2g}".format))
    print(f"moved: of the teacher's tensors, those that the student has and training changed by {LEARNING_RATE / 2:g}")
    if table["moved"].str.startswith("0 ").any():
        raise SystemExit("a run did not move the student from the teacher: it shows nothing")
    if table["equal"].ne(table["tensors"]).any():
        raise SystemExit("some weights are different")


if __name__ == "__main__":
    main()
