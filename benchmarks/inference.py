"""Seconds a picture and where they go, against diffusers' own Sana-Sprint pipeline and the teacher's 20 steps.

    python -m benchmarks.inference                     # the embedded teacher and its untrained student
    python -m benchmarks.inference --size 0.6b         # GPU: published sizes, random weights, 1024 px, bfloat16
    python -m benchmarks.inference --size 0.6b --compile

The pipelines take turns in every round, in random order, so that what else the machine does meets them alike. Every
call is made twice: as a whole, and with the device synchronised around each network for the parts. Prints a table and
writes results/inference_<size>_<device>.json, .md and .png.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas
import torch
from diffusers import DiffusionPipeline, SanaPipeline, SanaSprintPipeline

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.backbones.sana import make_student

from .common import CONFIGS, EMBEDDED_TEACHER, RESULTS, default_device, machine, markdown, medians
from .random_teacher import random_pipeline


EMBEDDED = "embedded"
PROMPT = "a fluent 3d emoji of a dolphin"
STEPS = (1, 2, 4)
TEACHER_STEPS = 20
GUIDANCE_SCALE = 4.5
GEMMA_2_2B = {"num_hidden_layers": 26, "intermediate_size": 9216}
OURS, COMPILED, STOCK, TEACHER = (
    "SanaTBCMPipeline",
    "SanaTBCMPipeline, compiled blocks",
    "SanaSprintPipeline",
    "SanaPipeline, CFG",
)
PARTS = ("text encoder", "transformer", "VAE decode", "everything else")

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

Draw = Callable[..., Any]
Clock = Callable[[], float]


def build(
    size: str, resolution: int, text_layers: int, device: torch.device, compiled: bool
) -> dict[str, DiffusionPipeline]:
    """The pipelines, which share text encoder and VAE; the student is the teacher's copy, untrained."""
    if size == EMBEDDED:
        teacher = SanaPipeline.from_pretrained(EMBEDDED_TEACHER)
    else:
        teacher = random_pipeline(size, resolution, **{**GEMMA_2_2B, "num_hidden_layers": text_layers})
    if device.type == "cuda":
        teacher.to(device, torch.bfloat16)
    student = make_student(teacher.transformer).to(teacher.transformer.dtype)
    ours = SanaTBCMPipeline(teacher.tokenizer, teacher.text_encoder, teacher.vae, student, TBCMScheduler())
    stock = SanaSprintPipeline(**{**ours.components, "scheduler": ours.scheduler.to_stock()})
    pipelines = {OURS: ours, STOCK: stock, TEACHER: teacher}
    if compiled:
        pipelines[COMPILED] = SanaTBCMPipeline(**{**ours.components, "transformer": copy.deepcopy(student)})
        for block in pipelines[COMPILED].transformer.transformer_blocks:
            block.compile(fullgraph=True)
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def calls(pipelines: dict[str, DiffusionPipeline], arguments: dict[str, Any]) -> dict[tuple[str, int], Draw]:
    """Every pipeline at every number of steps."""
    first, middle = pipelines[OURS].scheduler.config.timesteps_by_steps["2"][:2]
    found: dict[tuple[str, int], Draw] = {}
    for steps in STEPS:
        times = {"max_timesteps": first, "intermediate_timesteps": middle if steps == 2 else None}
        for name in (OURS, COMPILED):
            if name in pipelines:
                found[name, steps] = partial(pipelines[name], num_inference_steps=steps, **arguments)
        found[STOCK, steps] = partial(pipelines[STOCK], num_inference_steps=steps, **times, **arguments)
    found[TEACHER, TEACHER_STEPS] = partial(pipelines[TEACHER], num_inference_steps=TEACHER_STEPS, **arguments)
    return found


@contextmanager
def stopwatch(pipeline: DiffusionPipeline, wait: Callable[[], None], clock: Clock) -> Iterator[dict[str, float]]:
    """Seconds inside each network's calls."""
    seconds = dict.fromkeys(PARTS[:3], 0.0)

    def timed(part: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wait()
        start = clock()
        result = call(*args, **kwargs)
        wait()
        seconds[part] += clock() - start
        return result

    networks = ((pipeline.text_encoder, "forward"), (pipeline.transformer, "forward"), (pipeline.vae, "decode"))
    with ExitStack() as stack:
        for part, (network, method) in zip(PARTS, networks, strict=False):
            stack.enter_context(patch.object(network, method, partial(timed, part, getattr(network, method))))
        yield seconds


def measure(
    draw: Draw, pipeline: DiffusionPipeline, device: torch.device, clock: Clock
) -> tuple[dict[str, float], np.ndarray]:
    """One picture's seconds, as a whole and by parts, and the picture."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def seconds(picture: Draw) -> tuple[float, np.ndarray]:
        generator = torch.Generator(device).manual_seed(0)
        wait()
        start = clock()
        image = picture(generator=generator).images[0]  # a PIL image: the device has done its work
        return clock() - start, np.asarray(image)

    whole, image = seconds(draw)
    with stopwatch(pipeline, wait, clock) as parts:
        total, _ = seconds(draw)
    return {"whole": whole, **parts, PARTS[3]: total - sum(parts.values())}, image


def table(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Milliseconds a picture; the ratio is to diffusers' pipeline at the same steps."""
    whole = {(row["pipeline"], row["steps"]): row["median"]["whole"] for row in rows}
    lines = []
    for row in rows:
        found = row["median"]
        networks = sum(found[part] for part in PARTS[:3])
        stock = whole.get((STOCK, row["steps"])) if row["pipeline"] in (OURS, COMPILED) else None
        lines.append(
            {
                "pipeline": row["pipeline"],
                "steps": row["steps"],
                "whole, ms": round(found["whole"] * 1e3, 1),
                **{f"{part}, ms": round(found[part] * 1e3, 2) for part in PARTS},
                "of the networks' time": f"{found[PARTS[3]] / networks:.2%}",
                "to stock": None if stock is None else f"{found['whole'] / stock:.3f}",
            }
        )
    return pandas.DataFrame(lines).set_index("pipeline")


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    labels = [f"{row['pipeline']}, {row['steps']} step{'s' * (row['steps'] > 1)}" for row in rows]
    frame = pandas.DataFrame([{part: row["median"][part] for part in PARTS} for row in rows], index=labels)
    axes = frame.plot.barh(stacked=True, figsize=(10, 0.45 * len(rows) + 1.5), width=0.75)
    for place, total in enumerate(frame.sum(axis=1)):
        axes.text(total, place, f" {total:.3g} s", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="seconds a picture", title=title, xlim=(0, 1.1 * frame.sum(axis=1).max()))
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(EMBEDDED, *CONFIGS), default=EMBEDDED)
    parser.add_argument("--resolution", type=int, default=1024, help="of the full sizes")
    parser.add_argument("--text_layers", type=int, default=26, help="of the full sizes: fewer take less memory")
    parser.add_argument("--steps", type=int, nargs="+", default=[*STEPS, TEACHER_STEPS], help="only these")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2, help="rounds before")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: one thread, on a busy machine")
    parser.add_argument("--compile", action="store_true", help="our student's blocks too, beside the others")
    parser.add_argument("--no_instruction", action="store_true", help="leave out the instruction before the prompt")
    args = parser.parse_args()
    device = default_device()
    torch.manual_seed(0)

    pipelines = build(args.size, args.resolution, args.text_layers, device, args.compile)
    pixels = pipelines[OURS].transformer.config.sample_size * pipelines[OURS].vae_scale_factor
    arguments = {"prompt": PROMPT, "guidance_scale": GUIDANCE_SCALE, "height": pixels, "width": pixels}
    arguments |= {"use_resolution_binning": False}
    if args.no_instruction:
        arguments["complex_human_instruction"] = None
    drawn = {key: draw for key, draw in calls(pipelines, arguments).items() if key[1] in args.steps}
    found: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in drawn}
    pictures: dict[tuple[str, int], np.ndarray] = {}
    order = random.Random(0)
    for turn in range(args.warmup + args.rounds):
        for key in order.sample(sorted(drawn), len(drawn)):
            seconds, pictures[key] = measure(drawn[key], pipelines[key[0]], device, CLOCKS[args.clock])
            if turn >= args.warmup:
                found[key].append(seconds)
    for name, steps in pictures:
        if name == OURS and not np.array_equal(pictures[OURS, steps], pictures[STOCK, steps]):
            raise SystemExit(f"at {steps} steps the picture is not that of diffusers' pipeline")

    rows = [{"pipeline": name, "steps": steps, "median": medians(seconds)} for (name, steps), seconds in found.items()]
    config = {**vars(args), "pixels": pixels, "dtype": str(pipelines[OURS].transformer.dtype)}
    record = {"config": config, **machine(device), "seconds": rows}
    kind = torch.cuda.get_device_name().split()[-1].lower() if device.type == "cuda" else "cpu"
    options = "_compiled" * args.compile + "_no_instruction" * args.no_instruction
    path = RESULTS / f"inference_{args.size}{options}_{kind}"
    title = f"Seconds a picture: {args.size}{options.replace('_', ' ')}, {pixels} px, {record['device']}"
    facts = ", ".join(f"{name} {record[name]}" for name in ("torch", "diffusers", "transformers", "python"))
    how = f"Median of {args.rounds} rounds, {args.clock} time; {facts}; load average {record['load_average']}."
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(f"# {title}\n\n{how}\n\n{markdown(table(rows))}", encoding="utf-8")
    plot(rows, title, path.with_suffix(".png"))
    print(f"{title}\n{how}\n\n{table(rows).to_string(na_rep='')}")


if __name__ == "__main__":
    main()
