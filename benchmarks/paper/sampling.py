"""Figures 7 and 9: where the sampling schemes put their angles, and what the teacher's x_0 is like under each."""

import argparse
import math
from typing import Any

import matplotlib.pyplot as plt
import torch
from PIL import Image

from diffusers_tbcm.evaluation.grid import image_grid
from diffusers_tbcm.trajectory import SAMPLING_SCHEMES, sample_timesteps
from examples.tbcm.mini_teacher.emoji_metrics import GUIDANCE_SCALE, SEED, Meter, load_evaluation

from .teacher_trajectories import CELL_SIZE, EULER, Generation, Teacher
from .trajectory_statistics import mean_and_error, route_statistics


ROUTE_STEPS = 16
DENSITY_ROUTES = 20_000
DENSITY_BINS = 60
SHOWN_ROUTES = 5

NUM_STEPS = (4, 8, 16, 32)
SOLUTION_STEPS = 128  # of the Euler schedule: as good as the ODE's own solution, from the same noise
SHOWN_PROMPTS = ("banjo, noto", "fluent rabbit face")  # of the first evaluation prompts
SHOWN_PLACES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # along a route, in steps
COLORS = {EULER: "black", "reference": "tab:blue", "logit_normal": "tab:orange", "random": "tab:green"}


def draw_schemes(args: argparse.Namespace) -> dict[str, Any]:
    """Figure 7: density over t and five routes of each scheme."""
    routes = {
        scheme: sample_timesteps(scheme, DENSITY_ROUTES, ROUTE_STEPS, generator=torch.Generator().manual_seed(SEED))
        for scheme in SAMPLING_SCHEMES
    }
    schemes = ("random", "logit_normal", "reference")
    figure, axes = plt.subplots(len(schemes), 1, figsize=(9, 6.5), sharex=True)
    for axis, scheme in zip(axes, schemes, strict=True):
        drawn = routes[scheme][:, 1:].flatten().numpy()
        color = COLORS[scheme]
        axis.hist(drawn, DENSITY_BINS, (0, math.pi / 2), density=True, color=color, alpha=0.25)
        for index, route in enumerate(routes[scheme][:SHOWN_ROUTES]):
            height = axis.get_ylim()[1] / SHOWN_ROUTES
            axis.vlines(route, index * height, (index + 0.8) * height, color=color, linewidth=1)
        axis.set(title=scheme, ylabel="density", xlim=(0, math.pi / 2 + 0.01))
    axes[-1].set_xlabel(f"t (rad); lines: {SHOWN_ROUTES} routes of {ROUTE_STEPS} steps, one above the other")
    figure.tight_layout()
    figure.savefig(args.output_dir / "figure_7_schemes.png", dpi=110)
    densities = {scheme: histogram(rows[:, 1:]) for scheme, rows in routes.items()}
    return {
        "route_steps": ROUTE_STEPS,
        "routes": DENSITY_ROUTES,
        "schemes": {
            scheme: {name: rounded(values) for name, values in route_statistics(rows).items()}
            for scheme, rows in routes.items()
        },
        "total variation distance to reference": {
            scheme: round(0.5 * (densities[scheme] - densities["reference"]).abs().sum().item(), 3)
            for scheme in schemes[:-1]
        },
    }


def histogram(timesteps: torch.Tensor) -> torch.Tensor:
    """The share of angles in each of `DENSITY_BINS` equal parts of (0, pi/2)."""
    return torch.histc(timesteps, DENSITY_BINS, 0, math.pi / 2) / timesteps.numel()


def draw_predictions(args: argparse.Namespace) -> dict[str, Any]:
    """Figure 9: f(x_t, t) along the route by scheme (a) and number of steps (b), and how far x_0 is off (c)."""
    evaluation = [item for item in load_evaluation() if not item.held_out][: args.prompts]
    teacher = Teacher([item.prompt for item in evaluation], args.work_dir)
    concepts = [item.concept for item in evaluation]
    meter = Meter()
    solution = teacher.generate(EULER, SOLUTION_STEPS, GUIDANCE_SCALE).original
    results = [measure("ODE", SOLUTION_STEPS, teacher, meter, concepts, solution, solution)]
    generations, distances = {}, {}
    for scheme in COLORS:
        for num_steps in NUM_STEPS:
            generation = teacher.generate(scheme, num_steps, GUIDANCE_SCALE)
            if num_steps == ROUTE_STEPS or scheme == "reference":
                generations[scheme, num_steps] = generation
            distances[scheme, num_steps] = relative_distance(generation.original, solution)
            results.append(measure(scheme, num_steps, teacher, meter, concepts, generation.original, solution))

    by_scheme = {scheme: generations[scheme, ROUTE_STEPS] for scheme in COLORS}
    by_steps = {f"{num_steps} steps": generations["reference", num_steps] for num_steps in NUM_STEPS}
    prediction_grid(teacher, by_scheme, solution).save(args.output_dir / "figure_9a_schemes.png")
    prediction_grid(teacher, by_steps, solution).save(args.output_dir / "figure_9b_steps.png")

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, name in zip(axes, ("distance to the ODE's x_0", "top-5 retrieval"), strict=True):
        for scheme, color in COLORS.items():
            rows = [row for row in results if row["scheme"] == scheme]
            mean, error = zip(*(row[name] for row in rows), strict=True)
            axis.errorbar(NUM_STEPS, mean, error, color=color, label=scheme, capsize=3, marker="o")
        axis.set(xlabel="steps", ylabel=name, xscale="log", xticks=NUM_STEPS, xticklabels=NUM_STEPS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].axhline(results[0]["top-5 retrieval"][0], color="gray", linestyle="--", label=f"{SOLUTION_STEPS} steps")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(args.output_dir / "figure_9c_distance.png", dpi=110)
    return {
        "prompts": len(concepts),
        "guidance_scale": GUIDANCE_SCALE,
        "solution": f"{SOLUTION_STEPS} steps of the Euler schedule",
        "results (mean, standard error)": results,
        "difference in distance on the same prompts (mean, standard error)": {
            f"{scheme} - {other}, {num_steps} steps": rounded(
                distances[scheme, num_steps] - distances[other, num_steps]
            )
            for scheme, other in (("logit_normal", "reference"), ("random", "reference"), ("logit_normal", "random"))
            for num_steps in NUM_STEPS
        },
    }


def rounded(values: torch.Tensor) -> list[float]:
    """Mean and standard error over prompts, or routes, for a record."""
    return [round(number, 4) for number in mean_and_error(values)]


def relative_distance(original: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """How far each x_0 is from the ODE's, relative to its norm, (prompts,)."""
    return (original - solution).flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)


def measure(
    scheme: str,
    num_steps: int,
    teacher: Teacher,
    meter: Meter,
    concepts: list[str],
    original: torch.Tensor,
    solution: torch.Tensor,
) -> dict[str, Any]:
    """How far the x_0 of a scheme are from the ODE's, and how many show what was asked for."""
    features = meter.features.extract(teacher.decode(original))
    hits = [
        meter.reference.retrieval_at_k(row[None], [concept]) for row, concept in zip(features, concepts, strict=True)
    ]
    return {
        "scheme": scheme,
        "steps": num_steps,
        "distance to the ODE's x_0": rounded(relative_distance(original, solution)),
        "top-5 retrieval": rounded(torch.tensor(hits)),
    }


def prediction_grid(teacher: Teacher, generations: dict[str, Generation], solution: torch.Tensor) -> Image.Image:
    """The shown prompts' f(x_t, t) at `SHOWN_PLACES` of each route, its x_0, and the ODE's x_0."""
    rows, labels = [], []
    for name in SHOWN_PROMPTS:
        prompt = teacher.prompts.index(name)
        for label, generation in generations.items():
            places = [round(place * (generation.timesteps.shape[1] - 1)) for place in SHOWN_PLACES]
            latents = [*generation.predictions[prompt, places], generation.original[prompt], solution[prompt]]
            rows.append(teacher.decode(torch.stack(latents)))
            labels.append(f"{name}: {label}")
    columns = [f"{place:.0%}" for place in SHOWN_PLACES]
    return image_grid(rows, [*columns, "x_0", f"{SOLUTION_STEPS} steps"], labels, CELL_SIZE)
