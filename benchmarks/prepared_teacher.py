#!/usr/bin/env python
"""What preparation is worth: plain twins of the embedded emoji teacher, prepared and distilled.

    python -m benchmarks.prepared_teacher        # some 12 minutes on 2 CPU cores

The embedded teacher is in dense time. Three twins of it see 1000 s and are made here, not shipped: of the *plain* one
only the embedding of time is another, fitted through the sinusoids of 1000 s; of the *rough* one all weights were then
trained on 1000 s; the *unnormalised* one was so trained without the norms of queries and keys, as Sana 1.0 was.
examples/tbcm/prepare_teacher.py makes dense teachers of them, by its fit alone, with alignment, with --qk_norm.
Measured are the stock pipeline's pictures from the same noise, how strongly a network answers to time, and short TBCM
runs on the native teacher, on the plain twin (forced) and on prepared ones. What is done is kept in --work_dir: the
same command goes on where it was interrupted. Writes benchmarks/results/prepared_teacher.json, .md and .png.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import pandas
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from torch import nn

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.backbones import sana
from diffusers_tbcm.components import MODEL_INDEX
from diffusers_tbcm.dense_time import (
    FIT_POINTS,
    alignment_loss,
    branch_inputs,
    branch_velocities,
    compare_embeddings,
    record_branches,
    relative_error,
    ridge_regression,
    time_response,
)
from diffusers_tbcm.draws import draw_generator, draw_noise
from diffusers_tbcm.evaluation.features import MobileNetFeatures, pictures_to_tensor
from diffusers_tbcm.flow import FlowTransformer
from diffusers_tbcm.pipeline_folder import METRICS_LOG, list_checkpoints
from diffusers_tbcm.rows import Recording, TrainingRows
from diffusers_tbcm.text import Text
from diffusers_tbcm.trajectory import sample_timesteps
from diffusers_tbcm.trigflow import trig_to_flow_timestep
from examples.tbcm.quickstart import (
    GUIDANCE_SCALE,
    MAX_SEQUENCE_LENGTH,
    REFERENCE_SEED,
    TEACHER_STEPS,
    Task,
    draw,
    few,
    recipe,
)

from .common import EMBEDDED_TEACHER, EXAMPLES, RESULTS, arguments, machine, made_folder, write_results


matplotlib.use("Agg")
from matplotlib import pyplot


PLAIN_TIME = 1000.0
ROUTE_STEPS = 16
ROUGH = {"steps": 200, "rows": 24, "learning_rate": 3e-4}  # all weights trained on 1000 s
TWINS: dict[str, Mapping[str, float] | None] = {"plain": None, "rough": ROUGH, "unnormalised": {**ROUGH, "steps": 300}}
ALIGNED = {"max_train_steps": 60, "learning_rate": 3e-5, "route_steps": 8}  # as prepare_teacher.py takes it
NORMALISED = {"qk_norm": True, "max_train_steps": 100, "train_batch_size": 4, "learning_rate": 1e-4, "route_steps": 8}
NATIVE, FORCED, PREPARED = "native", "plain, forced", "prepared"
WITHOUT_NORMS, WITH_NORMS = "unnormalised, prepared", "normalised, prepared"
STUDENT_STEPS = (1, 2)
PICTURES = 12  # that PSNR is taken over


def twin_network(native: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The native network with another embedding of time, which sees 1000 s: a random layer, and a fitted one."""
    twin = SanaTransformer2DModel.from_config(native.config)
    twin.load_state_dict(native.state_dict())
    twin.register_to_config(timestep_scale=1.0)
    torch.manual_seed(0)
    embedder = twin.get_submodule(sana.TIME_EMBEDDER)
    embedder.linear_1.reset_parameters()
    s = torch.linspace(0, 1, FIT_POINTS)
    with torch.no_grad():
        hidden = embedder.act(embedder.linear_1(sana.time_features(twin, PLAIN_TIME * s)))
        weight, offset = ridge_regression(hidden.double(), sana.embed_time(native, s, None).double())
        embedder.linear_2.weight.copy_(weight.T)
        embedder.linear_2.bias.copy_(offset)
    return twin


def trajectories(native: FlowTransformer, text: Text, negative_text: Text, seed: int) -> Recording:
    """One of the native teacher's for every prompt, its times drawn as in training."""
    generators = [draw_generator(number, seed) for number in range(len(text))]
    angles = sample_timesteps("reference", len(text), ROUTE_STEPS, generator=generators)
    size = native.transformer.config.sample_size
    noise = draw_noise((native.transformer.config.in_channels, size, size), generators)
    scale = torch.full((len(text),), GUIDANCE_SCALE)
    return record_branches(native, noise, trig_to_flow_timestep(angles).clamp(max=1), text, negative_text, scale)


def without_norms(native: SanaTransformer2DModel, recording: Recording, negative_text: Text) -> SanaTransformer2DModel:
    """The native network without norms of queries and keys: their projections have the weights, over a mean length."""
    lengths: dict[str, list[torch.Tensor]] = {}

    def look(name: str, module: nn.Module, args: tuple[torch.Tensor]) -> None:
        lengths.setdefault(name, []).append(args[0].square().mean(-1).sqrt().flatten())

    norms = [(name, part) for name, part in native.named_modules() if name.endswith((".norm_q", ".norm_k"))]
    hooks = [part.register_forward_pre_hook(partial(look, name)) for name, part in norms]
    sample, s, text = branch_inputs(recording.rows(torch.arange(0, len(recording), 7)), negative_text)
    with torch.no_grad():
        FlowTransformer(native)(sample, s, **text.arguments())
    for hook in hooks:
        hook.remove()
    weights = dict(native.state_dict())
    for name, found in lengths.items():
        factor = weights.pop(f"{name}.weight") / torch.cat(found).mean()
        projection = name.replace("norm_", "to_")
        weights[f"{projection}.weight"] = factor[:, None] * weights[f"{projection}.weight"]
        if f"{projection}.bias" in weights:
            weights[f"{projection}.bias"] = factor * weights[f"{projection}.bias"]
    network = SanaTransformer2DModel.from_config({**native.config, "qk_norm": None})
    network.load_state_dict(weights)
    return network


def roughen(
    twin: SanaTransformer2DModel, recording: Recording, negative_text: Text, recipe: Mapping[str, float]
) -> None:
    """Train all weights of a twin on 1000 s, towards the native velocity, in place."""
    network = FlowTransformer(twin.requires_grad_(True), PLAIN_TIME)
    optimizer = torch.optim.Adam(twin.parameters(), lr=recipe["learning_rate"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(int(recipe["steps"])):
        rows = recording.rows(torch.randint(len(recording), (int(recipe["rows"]),), generator=generator))
        sample, s, text = branch_inputs(rows, negative_text)
        optimizer.zero_grad()
        alignment_loss(network(sample, s, **text.arguments()), rows).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    twin.requires_grad_(False)


def save_twin(transformer: SanaTransformer2DModel, folder: Path) -> None:
    """Save a twin as the embedded teacher's folder with another transformer."""
    shutil.copytree(EMBEDDED_TEACHER, folder.with_suffix(".partial"), dirs_exist_ok=True)
    transformer.save_pretrained(folder.with_suffix(".partial") / "transformer")
    folder.with_suffix(".partial").rename(folder)


def run_script(script: str, folder: Path, flags: Mapping[str, Any]) -> Path:
    """Run a training script, unless that has been done; one that was interrupted goes on. Gives its folder."""
    if (folder / MODEL_INDEX).exists():
        return folder
    shared = {
        "prompts_file": few().prompts_file,
        "output_dir": folder,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "no-complex_human_instruction": True,
        "max_grad_norm": 1.0,
        "report_to": "none",
        "logging_steps": 1,
        "checkpointing_steps": 1000,
        "resume_from_checkpoint": "latest" if list_checkpoints(folder) else False,
    }
    subprocess.run([sys.executable, str(EXAMPLES / script), *arguments({**shared, **flags})], check=True)
    return folder


def prepare(teacher: Path, folder: Path, **flags: Any) -> Path:
    return run_script("prepare_teacher.py", folder, {"pretrained_model_name_or_path": teacher, **flags})


def distil(teacher: Path, folder: Path, steps: int, *, plain: bool) -> Path:
    """TBCM as the quickstart does it, with fewer prompts at a time and the consistency loss in half of the steps."""
    flags = {
        **recipe(steps),
        "train_batch_size": 2,
        "teacher_batch_size": 12,
        "endpoint_warmup_steps": steps // 2,
        "endpoint_loss_type": "l2",
        "use_ema": True,
        "ema_decay": 0.95,
        "max_train_steps": steps,
        "pretrained_model_name_or_path": teacher,
        "allow_plain_teacher": plain,
    }
    return run_script("train_tbcm_distill.py", folder, flags)


def load_student(folder: Path) -> SanaTBCMPipeline:
    """A student as it is drawn with; one of a plain teacher is fed 1000 s, which no pipeline does by itself."""
    pipeline = SanaTBCMPipeline.from_pretrained(folder)
    scale = pipeline.transformer.config.timestep_scale
    if scale > 1:

        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "timestep": scale * kwargs["timestep"]}

        pipeline.transformer.register_forward_pre_hook(feed, with_kwargs=True)
        pipeline.transformer.register_to_config(timestep_scale=1.0)  # which the pipeline checks
    return pipeline


def psnr(pictures: torch.Tensor, others: torch.Tensor) -> float:
    """Mean over pictures in [0, 1], dB."""
    return -10 * (pictures - others).square().mean((1, 2, 3)).clamp(min=1e-10).log10().mean().item()


def make_teachers(work_dir: Path, recording: Recording, negative_text: Text) -> dict[str, Path]:
    """The twins and what the script makes of them, by name."""
    native = SanaTransformer2DModel.from_pretrained(EMBEDDED_TEACHER, subfolder="transformer")
    folders = {NATIVE: EMBEDDED_TEACHER, **{name: work_dir / name for name in TWINS}}
    for name, training in TWINS.items():
        if not folders[name].exists():
            origin = without_norms(native, recording, negative_text) if name == "unnormalised" else native
            twin = twin_network(origin)
            if training is not None:
                roughen(twin, recording, negative_text, training)
            save_twin(twin, folders[name])
    fit_alone: dict[str, Any] = {"max_train_steps": 0}
    for name, made, flags in (
        ("plain", "fitted", fit_alone),
        ("rough", "fitted", fit_alone),
        ("rough", "aligned", ALIGNED),
        ("unnormalised", "fitted", fit_alone),
        ("unnormalised", "normalised", {**fit_alone, "qk_norm": True}),
        ("unnormalised", "normalised and aligned", NORMALISED),
    ):
        folder = work_dir / f"{name}_{made.replace(' ', '_')}"
        folders[f"{name}, {made}"] = prepare(folders[name], folder, **flags)
    return folders


def measure_teachers(
    folders: Mapping[str, Path], rows: TrainingRows, negative_text: Text
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What a table says of every teacher, and ||dv/ds|| / ||v|| at the rows."""
    prompts = few(1).prompts[:PICTURES]
    networks, drawn, table, responses = {}, {}, [], {}
    for name, folder in folders.items():
        pipeline = SanaPipeline.from_pretrained(folder)
        networks[name] = FlowTransformer(pipeline.transformer, PLAIN_TIME if name in TWINS else 1.0)
        drawn[name] = pictures_to_tensor(draw(pipeline, prompts, TEACHER_STEPS))
        responses[name] = time_response(networks[name], rows, negative_text)
    sample, s, text = branch_inputs(rows, negative_text)
    with torch.no_grad():
        velocities = {name: network(sample, s, **text.arguments()) for name, network in networks.items()}
    for name, network in networks.items():
        twin = name.partition(",")[0]
        row = {
            "teacher": name,
            "median ||dv/ds|| / ||v||": round(responses[name].median().item(), 3),
            "/ native": round((responses[name].median() / responses[NATIVE].median()).item(), 2),
            "relative |de/ds|": round(compare_embeddings(networks[NATIVE], network).slope_after, 2),
        }
        if twin != name:
            row["v' to its twin's v"] = round(relative_error(velocities[name], velocities[twin]), 5)
            row["PSNR to its twin, dB"] = round(psnr(drawn[name], drawn[twin]), 1)
        row["v to the native v"] = round(relative_error(velocities[name], branch_velocities(rows)), 5)
        table.append(row)
    return table, responses


def measure_students(students: Mapping[str, Path], task: Task) -> list[dict[str, Any]]:
    """Distances of students to what the native teacher draws of the same prompts from other noises."""
    extractor = MobileNetFeatures()
    teacher = SanaPipeline.from_pretrained(EMBEDDED_TEACHER)
    judge = task.judge(extractor.extract(draw(teacher, task.prompts, TEACHER_STEPS, seed=REFERENCE_SEED)))
    features = {
        (name, steps): extractor.extract(draw(load_student(folder), task.prompts, steps))
        for name, folder in students.items()
        for steps in STUDENT_STEPS
    }
    table = []
    for (name, steps), found in features.items():
        distance, native = judge.distance(found), judge.distance(features[NATIVE, steps])
        difference = judge.distance(found, features[NATIVE, steps])
        log = [line for line in read_log(students[name]) if "tangent_norm" in line]
        table.append({
            "student of": name,
            "steps": steps,
            "FD to the teacher": round(distance.value, 1),
            "interval": f"{distance.low:.1f} to {distance.high:.1f}",
            "/ native": round(distance.value / native.value, 3),
            "less native": "{:+.1f} ({:+.1f} to {:+.1f})".format(*difference),
            "top-5 retrieval": round(judge.retrieval(found), 3),
            "tangent norm": round(statistics.median(line["tangent_norm"] for line in log), 2),
            "gradient norm": round(statistics.median(line["grad_norm"] for line in log), 3),
        })  # fmt: skip
    return table


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_LOG).read_text(encoding="utf-8").splitlines()]


def plot(
    s: torch.Tensor,
    responses: Mapping[str, torch.Tensor],
    students: Mapping[str, Path],
    table: Sequence[dict[str, Any]],
) -> pyplot.Figure:
    """How teachers answer to time, the tangent's norm in training, and the students' distances."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 5.2))
    edges = torch.linspace(0, 1, 13)
    for name, response in responses.items():
        bins = torch.bucketize(s, edges[1:-1])
        medians = [response[bins == number].median() if (bins == number).any() else torch.nan for number in range(12)]
        style = "--" if "," in name else "-"
        left.plot((edges[1:] + edges[:-1]) / 2, medians, style, marker=".", label=name)
    left.set(xlabel="s", ylabel="median ||dv/ds|| / ||v||", yscale="log", title="answer to time")
    left.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for name, folder in students.items():
        lines = [line for line in read_log(folder) if "tangent_norm" in line]
        middle.plot([line["step"] for line in lines], [line["tangent_norm"] for line in lines], label=name)
    middle.set(xlabel="step of TBCM", ylabel="tangent norm", yscale="log", title="tangent in training")
    middle.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for place, name in enumerate(students):
        of = [row for row in table if row["student of"] == name]
        places = [place + 0.4 * number for number in range(len(of))]
        right.bar(places, [row["FD to the teacher"] for row in of], width=0.38, color=["C0", "C1"][: len(of)])
    labels = [name.replace(", ", "\n") for name in students]
    right.set_xticks([place + 0.2 for place in range(len(students))], labels, fontsize=7, rotation=30)
    right.set(ylabel="FD to the teacher", title=f"students at {' and '.join(map(str, STUDENT_STEPS))} steps")
    figure.tight_layout()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=60, help="of each TBCM run")
    parser.add_argument("--noises", type=int, default=4, help="pictures of each of the 24 prompts")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/prepared_teacher"))
    parser.add_argument("--output_dir", type=made_folder, default=RESULTS)
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    start, task = time.perf_counter(), few(args.noises)

    pipeline = sana.load_text_pipeline(EMBEDDED_TEACHER, torch.float32)
    texts = [
        sana.encode_prompt(pipeline, prompt, max_sequence_length=MAX_SEQUENCE_LENGTH)
        for prompt in ("", *task.training)
    ]
    negative_text, text = texts[0], Text.cat(texts[1:])
    native = FlowTransformer(sana.load_transformer(EMBEDDED_TEACHER).requires_grad_(False))
    folders = make_teachers(args.work_dir, trajectories(native, text, negative_text, 1), negative_text)
    origins = {
        NATIVE: NATIVE,
        FORCED: "plain",
        PREPARED: "plain, fitted",
        WITHOUT_NORMS: "unnormalised, fitted",
        WITH_NORMS: "unnormalised, normalised and aligned",
    }
    students = {
        name: distil(
            folders[origin],
            args.work_dir / f"student_{name.split(',')[0]}",
            args.max_train_steps,
            plain=name == FORCED,
        )
        for name, origin in origins.items()
    }
    rows = trajectories(native, text[:8], negative_text, 2).rows()
    teachers, responses = measure_teachers(folders, rows, negative_text)
    print(pandas.DataFrame(teachers).to_string(index=False))
    table = measure_students(students, task)
    details = {
        "max_train_steps": args.max_train_steps,
        "pictures": len(task.prompts),
        "seconds": round(time.perf_counter() - start),
        "rough": ROUGH,
        "unnormalised": TWINS["unnormalised"],
        "aligned": ALIGNED,
        "normalised": NORMALISED,
        **machine(torch.device("cpu")),
    }
    write_results("prepared_teacher", pandas.DataFrame(table), details, args.output_dir, teachers=teachers)
    plot(rows.timesteps.repeat(2), responses, students, table).savefig(
        args.output_dir / "prepared_teacher.png", dpi=90
    )


if __name__ == "__main__":
    main()
