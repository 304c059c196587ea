"""What a trained row costs: the published order of the step against ours, lever by lever, in one run.

    python -m benchmarks.train_step                                                  # CPU, embedded teacher
    python -m benchmarks.train_step --model 0.6b --dtype bf16 --gradient_checkpointing --prompts 1 2 4    # GPU

The published order: a pass under torch.func.jvp for the tangent, with attention scores of all rows in memory, then a
pass for the gradient; the text side computed for every row and every teacher step; the teacher one batch at a time.
Every variant is one more change than the one before it. They take turns, so that their ratios hold on a noisy machine.
Writes benchmarks/results/train_step_<model>_<device>.json, .md, a plot over batch sizes, and a profile of our step.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import matplotlib
import pandas
import torch
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode

from diffusers_tbcm.backbones.sana import make_student
from diffusers_tbcm.backbones.sana_attention import make_ready
from diffusers_tbcm.dual import checkpoint_dual
from diffusers_tbcm.guidance import guidance_branches, guided_output
from diffusers_tbcm.loss import LogvarHead, StudentWithLogvar, consistency_loss
from diffusers_tbcm.rows import Recording, TrainingRows
from diffusers_tbcm.tangent import consistency_tangent, dual_inputs, normalized_tangent
from diffusers_tbcm.text import Text
from diffusers_tbcm.training.replay import ReplayBuffer
from diffusers_tbcm.trajectory import record_trajectory, rotate, sample_timesteps
from diffusers_tbcm.trigflow import SIGMA_DATA, TrigFlowTransformer

from .common import (
    DTYPES,
    PROMPT_TOKENS,
    RESULTS,
    default_device,
    load_transformer,
    machine,
    synchronize,
    write_results,
)


matplotlib.use("Agg")
from matplotlib import pyplot


GUIDANCE_SCALE = 4.5
REPLAYED_PROMPTS = 64
STAGES = ("teacher", "tangent pass", "forward", "backward", "optimiser")


@dataclass(frozen=True)
class Variant:
    """One way to take a training step.

    Args:
        name: in the table.
        one_pass: the tangent from the gradient's forward.
        shared_text: the text side once per prompt, not per row and teacher step.
        teacher_batches: training batches that the teacher generates at once.
        replay_steps: how many batches are drawn from every recording.
        compiled: torch.compile of the blocks.
    """

    name: str
    one_pass: bool = False
    shared_text: bool = False
    teacher_batches: int = 1
    replay_steps: int = 1
    compiled: bool = False


PUBLISHED = Variant("published order")
ONE_PASS = replace(PUBLISHED, name="+ tangent in the same pass", one_pass=True)
SHARED = replace(ONE_PASS, name="+ text once per prompt", shared_text=True)
BATCHED = replace(SHARED, name="+ teacher 8 batches at once", teacher_batches=8)
TWICE = replace(BATCHED, name="+ every row twice (replay)", replay_steps=2)
FOUR_TIMES = replace(BATCHED, name="+ every row four times (replay)", replay_steps=4)
LADDER = (PUBLISHED, ONE_PASS, SHARED, BATCHED, TWICE, FOUR_TIMES)


class Stopwatch:
    """Seconds by stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[stage] += time.perf_counter() - start


class Trainer:
    """A student, its teacher and its optimiser, and the training step in every variant."""

    def __init__(self, args: argparse.Namespace, resolution: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.args, self.device, self.dtype = args, device, DTYPES[args.dtype]
        transformer = load_transformer(args.model, resolution)
        config = transformer.config
        self.latent_shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        self.text_shape = (args.prompt_tokens, config["caption_channels"])
        width = config["num_attention_heads"] * config["attention_head_dim"]
        student = TrigFlowTransformer(make_student(transformer))
        self.model = StudentWithLogvar(student, LogvarHead(width)).to(device)
        if args.gradient_checkpointing:
            student.transformer.enable_gradient_checkpointing(checkpoint_dual)
        self.teacher = TrigFlowTransformer(transformer.requires_grad_(False)).to(device, self.dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.recordings: dict[tuple[Variant, int], list[Recording]] = {}
        self.buffers: dict[tuple[Variant, int], ReplayBuffer] = {}
        self.generator = torch.Generator().manual_seed(0)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def record(self, variant: Variant, prompts: int) -> Recording:
        """The teacher's trajectories of some prompts, in the stock order or with the text side kept."""
        noise = torch.randn(prompts, *self.latent_shape, device=self.device)
        timesteps = sample_timesteps("reference", prompts, self.args.route_steps, device=self.device)
        embeds = torch.randn(prompts, *self.text_shape, device=self.device).to(self.dtype)
        mask = torch.ones(prompts, self.text_shape[0], device=self.device)
        guidance = torch.full((prompts,), GUIDANCE_SCALE, device=self.device)
        record = record_trajectory if variant.shared_text else record_step_by_step
        text, negative_text = Text(embeds, mask), Text(embeds[:1, :1], mask[:1, :1])
        return record(self.teacher, noise, timesteps, text, negative_text, guidance, sigma_data=SIGMA_DATA)

    def rows(self, variant: Variant, prompts: int) -> TrainingRows:
        """The next batch; the teacher generates when what it generated before is used up."""
        waiting = self.recordings.setdefault((variant, prompts), [])
        if not waiting:
            together = self.record(variant, prompts * variant.teacher_batches)
            parts = torch.arange(prompts * variant.teacher_batches, device=self.device).split(prompts)
            waiting += [together.select(part) for part in parts for _ in range(variant.replay_steps)]
        recording = waiting.pop()
        if variant.replay_steps > 1:
            size = max(1, REPLAYED_PROMPTS // prompts)
            buffer = self.buffers.setdefault((variant, prompts), ReplayBuffer(size))
            while len(buffer.recordings) < size:  # as later in a run
                buffer.add(recording)
            return buffer.sample(len(recording), self.generator)
        rows = recording.rows()
        if variant.shared_text:
            return rows
        each = self.args.route_steps - 1
        return replace(rows, text=rows.text.repeat(each))

    def step(self, variant: Variant, prompts: int, watch: Stopwatch) -> None:
        with watch("teacher"):
            rows = self.rows(variant, prompts)
        text = {**rows.text.arguments(), "guidance": rows.guidance_scale}
        if variant.one_pass:
            with watch("forward"), self.autocast():
                trig_output, logvar = self.model(
                    *dual_inputs(rows.latents, rows.velocity, rows.timesteps, SIGMA_DATA), **text
                )
                tangent = normalized_tangent(
                    trig_output, rows.latents, rows.velocity, rows.timesteps, ratio=1.0, sigma_data=SIGMA_DATA
                )
                trig_output = trig_output.primal
        else:
            with watch("tangent pass"), self.autocast():
                tangent = consistency_tangent(
                    self.model.student, rows.latents, rows.velocity, rows.timesteps, rows.text,
                    rows.guidance_scale, ratio=1.0, sigma_data=SIGMA_DATA,
                )  # fmt: skip
            with watch("forward"), self.autocast():
                trig_output, logvar = self.model(rows.latents / SIGMA_DATA, rows.timesteps, **text)
        with watch("backward"):
            consistency_loss(
                trig_output, tangent.trig_output, tangent.tangent, logvar, rows.timesteps, SIGMA_DATA
            ).backward()
        with watch("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def forward_flops(self) -> float:
        """FLOPs of one student forward on one row, F."""
        rows = self.record(replace(PUBLISHED, shared_text=True), 1).rows(torch.tensor([0]))
        with FlopCounterMode(display=False) as counter, torch.no_grad(), self.autocast():
            self.model.student(rows.latents, rows.timesteps, **rows.text.arguments(), guidance=rows.guidance_scale)
        return counter.get_total_flops()


@torch.no_grad()
def record_step_by_step(
    teacher: TrigFlowTransformer,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    text: Text,
    negative_text: Text,
    guidance_scale: torch.Tensor,
    *,
    sigma_data: float,
) -> Recording:
    """The trajectory as a sampling loop has it: every step computes its text again."""
    branches = guidance_branches(teacher, text, negative_text)
    sample, latents, velocities = sigma_data * noise, [], []
    ends = torch.cat([timesteps[:, 1:], torch.zeros_like(timesteps[:, :1])], dim=1)
    for t, end in zip(timesteps.unbind(1), ends.unbind(1), strict=True):
        velocity = sigma_data * guided_output(teacher, sample / sigma_data, t, branches, guidance_scale)
        latents.append(sample)
        velocities.append(velocity)
        sample = rotate(sample, velocity, t - end)
    return Recording(
        torch.stack(latents[1:], 1), torch.stack(velocities[1:], 1), timesteps[:, 1:], sample, text, guidance_scale
    )


def prepare(trainer: Trainer, variant: Variant) -> None:
    """Give both networks diffusers' own cross-attention where nothing is shared; compile their blocks, or not."""
    transformers = (trainer.model.student.transformer, trainer.teacher.transformer)
    for transformer in transformers:
        for block in transformer.transformer_blocks:
            if not variant.shared_text:
                block.attn2.set_processor(SanaAttnProcessor2_0())
            block._compiled_call_impl = None
            if variant.compiled:
                block.compile()
    if variant.shared_text:
        for transformer in transformers:
            make_ready(transformer)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product: what the device can do."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / median(seconds)


def measure(
    trainer: Trainer, variants: tuple[Variant, ...], prompts: int, repeats: int
) -> dict[Variant, tuple[float, dict[str, float], float]]:
    """Median seconds of a step, its seconds by stage, and its peak memory; the variants take turns."""
    seconds: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in variants}
    peaks = dict.fromkeys(variants, float("nan"))
    for repeat in range(repeats + 1):
        for variant in variants:
            if trainer.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            watch = Stopwatch(trainer.device)
            cycle = variant.teacher_batches * variant.replay_steps  # one recording's worth of steps
            prepare(trainer, variant)
            for _ in range(cycle):
                trainer.step(variant, prompts, watch)
            if trainer.device.type == "cuda":
                peaks[variant] = torch.cuda.max_memory_allocated() / 2**30
            if repeat > 0:  # the first warms up
                seconds[variant].append({stage: watch.seconds[stage] / cycle for stage in STAGES})
    result = {}
    for variant, runs in seconds.items():
        typical = {stage: median(run[stage] for run in runs) for stage in STAGES}
        result[variant] = (median(sum(run.values()) for run in runs), typical, peaks[variant])
    return result


def profile(trainer: Trainer, variant: Variant, prompts: int, name: str) -> None:
    """Keep the ten operations that take the most time in our step, with their share."""
    watch = Stopwatch(trainer.device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    prepare(trainer, variant)
    trainer.step(variant, prompts, watch)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(variant.teacher_batches):
            trainer.step(variant, prompts, watch)
    time_of: Callable[[torch.autograd.profiler_util.FunctionEventAvg], float] = (
        (lambda event: event.self_device_time_total)
        if trainer.device.type == "cuda"
        else (lambda event: event.self_cpu_time_total)
    )
    events = sorted(profiler.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events))
    lines = [f"| {event.key} | {event.count} | {time_of(event) / total:.1%} |\n" for event in events[:10]]
    text = f"{variant.name}, {prompts} prompts a step\n\n| operation | calls | share of time |\n|---|---|---|\n"
    (RESULTS / f"{name}_profile.md").write_text(text + "".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("embedded", "0.6b", "1.6b"), default="embedded")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[1024], help="of the published sizes")
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[1, 2, 4], help="batch sizes; the first is the table's"
    )
    parser.add_argument("--route_steps", type=int, default=16)
    parser.add_argument("--prompt_tokens", type=int, help="default: 300, or 15 of the embedded teacher's prompts")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the teacher and of autocast")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--levers", type=int, default=len(LADDER) - 1, help="how many, in the order of the table")
    parser.add_argument("--compile", action="store_true", help="add a row with compiled blocks")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.prompt_tokens is None:
        args.prompt_tokens = 15 if args.model == "embedded" else PROMPT_TOKENS
    device = default_device()
    ladder = LADDER[: args.levers + 1]
    if args.compile:
        ladder += (replace(BATCHED, name="teacher 8 batches at once, compiled", compiled=True),)
    if args.model == "embedded":
        args.resolutions = [64]
    name = f"train_step_{args.model}_{device.type}"
    rate = matmul_rate(device, DTYPES[args.dtype])
    records = []
    for resolution in args.resolutions:
        trainer = Trainer(args, resolution, device)
        flops = trainer.forward_flops()
        # What a row needs whatever the order: both teacher branches of its share of the route, and in the student a
        # forward, its tangent and a backward.
        needed = 2 * args.route_steps / (args.route_steps - 1) + 4
        for place, prompts in enumerate(args.prompts):
            rows = prompts * (args.route_steps - 1)
            measured = measure(trainer, ladder if place == 0 else (PUBLISHED, BATCHED), prompts, args.repeats)
            baseline = measured[PUBLISHED][0]
            for variant, (seconds, stages, peak) in measured.items():
                teacher = (needed - 4) / variant.replay_steps
                records.append({
                    "resolution": resolution, "rows": rows, "variant": variant.name,
                    "ms / row": round(1000 * seconds / rows, 2), "rows / s": round(rows / seconds, 1),
                    "of published": round(seconds / baseline, 3),
                    **{f"{stage} %": round(100 * value / sum(stages.values()), 1) for stage, value in stages.items()},
                    "FLOP utilisation %": round(100 * rows * (teacher + 4) * flops / seconds / rate, 1),
                    "peak GiB": round(peak, 2),
                })  # fmt: skip
                print(records[-1], flush=True)
        profile(trainer, BATCHED if BATCHED in ladder else ladder[-1], args.prompts[0], name)
    details = {
        **vars(args),
        "FLOP of a student forward on a row": f"{flops:.3g}",
        "measured matmul FLOP/s": f"{rate:.3g}",
        **machine(device),
    }
    table = pandas.DataFrame(records).dropna(axis="columns", how="all")
    write_results(name, table, details)
    if len(args.prompts) == 1:
        return
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (resolution, variant), part in table.groupby(["resolution", "variant"], sort=False):
        if len(part) > 1:
            axes.plot(
                part["rows"], part["ms / row"], marker="o", label=f"{variant.removeprefix('+ ')}, {resolution} px"
            )
    axes.set(
        xlabel="rows of a training step", ylabel="milliseconds a row", ylim=(0, None), title=f"Sana, {args.model}"
    )
    axes.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
