"""The study's tables and figures, of its runs."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import pandas
import torch

from diffusers_tbcm.diffusion import diffuse
from diffusers_tbcm.trajectory import record_trajectory
from diffusers_tbcm.trigflow import SIGMA_DATA, TrigFlowTransformer

from ..seeds import seed_interval
from .mixture import empty_text, energy_distance, modes, real_samples, text_of


matplotlib.use("Agg")
from matplotlib import pyplot


FIGURES = {"RMSE": 3, "energy distance": 4, "right mode": 3}
DIVERGED = 10  # the modes lie at 0.75
CELL = ["guidance", "num_steps", "dim", "teacher"]


def over_seeds(values: pandas.Series, digits: int) -> str:
    """Mean, lowest and highest of seeds; lengths beyond all samples are no figures."""
    if values.max() > DIVERGED:
        return "diverges"
    if len(values) == 1:
        return f"{values.iloc[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def difference(first: pandas.Series, second: pandas.Series, digits: int) -> str:
    """The mean difference of runs with the same seed, with Student's 95% interval."""
    paired = (first - second).dropna()
    if not len(paired):
        return ""
    mean, half = seed_interval(paired)
    return f"{mean:+.{digits}f}" if len(paired) < 2 else f"{mean:+.{digits}f} ± {half:.{digits}f}"


def methods_table(runs: pandas.DataFrame) -> pandas.DataFrame:
    """A row a method, its figures at each guidance scale."""
    lines = []
    for method, of_method in runs.groupby("method", sort=False):
        line = {"student": method, "seeds": of_method["seed"].nunique()}
        for guidance, part in of_method.groupby("guidance"):
            for name, digits in FIGURES.items():
                line[f"{name}, guidance {guidance:g}"] = over_seeds(part[name], digits)
        lines.append(line | {"CPU seconds": round(of_method["CPU seconds"].mean(), 1)})
    return pandas.DataFrame(lines)


def rows_table(
    runs: pandas.DataFrame, methods: tuple[str, str], drifts: Mapping[tuple[float, ...], float]
) -> pandas.DataFrame:
    """A row a setting: two methods, and the first less the second by seed.

    Args:
        runs: of the study.
        methods: to compare.
        drifts: `drift` of a setting's guidance, dim and teacher.

    Returns:
        The table.
    """
    lines = []
    for values, part in runs.groupby(CELL, sort=False):
        cell = dict(zip(CELL, values, strict=True))
        line = {
            "teacher": f"{cell['teacher']} updates" if cell["teacher"] else "exact",
            **{name: cell[name] for name in ("guidance", "dim")},
            "steps": cell["num_steps"],
            "seeds": part["seed"].nunique(),
            "drift": f"{drifts[tuple(cell[name] for name in ('guidance', 'dim', 'teacher'))]:.3f}",
        }
        for name in ("RMSE", "energy distance"):
            digits = FIGURES[name]
            of_seed = {method: of_method.set_index("seed")[name] for method, of_method in part.groupby("method")}
            line |= {
                f"{name}, {method}": over_seeds(of_seed[method], digits) if method in of_seed else ""
                for method in methods
            }
            if len(of_seed) == len(methods):
                line[f"{name}, difference"] = difference(of_seed[methods[0]], of_seed[methods[1]], digits)
        lines.append(line)
    return pandas.DataFrame(lines)


@torch.no_grad()
def drift(teacher: TrigFlowTransformer, guidance: float, dim: int, points: int = 1024) -> float:
    """How far trajectories are from noised data: the largest energy distance of a class, over the route's times."""
    generator = torch.Generator().manual_seed(7)
    classes = torch.zeros(points, dtype=torch.long)
    route = torch.linspace(math.pi / 2, 0, 41)[:-1].expand(points, -1)
    noise, scale = torch.randn(points, dim, generator=generator), torch.full((points,), guidance)
    passed = record_trajectory(teacher, noise, route, text_of(classes), empty_text(), scale)
    found = []
    for place in range(3, route.shape[1] - 1, 4):
        data, noise = real_samples(classes, generator, dim), torch.randn(points, dim, generator=generator)
        noised = diffuse(SIGMA_DATA * data, noise, passed.timesteps[:, place])
        found.append(energy_distance(passed.latents[:, place], noised))
    return max(found)


def plot_samples(
    samples: Mapping[float, Mapping[str, torch.Tensor]], names: Sequence[str], classes: torch.Tensor
) -> pyplot.Figure:
    """One-step samples of students, a row a guidance scale, coloured by class; crosses are the modes."""
    figure, axes = pyplot.subplots(len(samples), len(names), figsize=(1.55 * len(names), 3.5), layout="constrained")
    for row, (guidance, drawn) in zip(axes, samples.items(), strict=True):
        row[0].set_ylabel(f"guidance {guidance:g}")
        for axis, name in zip(row, names, strict=True):
            axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=[], yticks=[], aspect="equal")
            axis.set_title(name if name in drawn else f"{name}: not run", fontsize=8)
            if name in drawn:
                axis.scatter(*drawn[name].T, c=classes, s=1.5, cmap="tab10", vmax=9, linewidths=0)
                axis.scatter(*(SIGMA_DATA * modes()).T, c="black", marker="+", s=20, linewidths=0.7)
    return figure


def plot_rows(runs: pandas.DataFrame, methods: Sequence[str]) -> pyplot.Figure:
    """Both figures of each method against guidance, teacher, dimension and route length; dots are seeds."""
    at_three = runs["guidance"] == 3
    plane, exact, usual = runs["dim"] == 2, runs["teacher"] == 0, runs["num_steps"] == 16
    panels = {
        "guidance scale, exact teacher": (runs[plane & exact & usual], "guidance"),
        "updates of the teacher, guidance 3": (runs[plane & usual & at_three], "teacher"),
        "dimension, guidance 3": (runs[exact & usual & at_three], "dim"),
        "steps of a trajectory, guidance 3": (runs[plane & exact & at_three], "num_steps"),
    }
    panels = {label: (part, name) for label, (part, name) in panels.items() if part[name].nunique() > 1}
    figure, axes = pyplot.subplots(
        2, len(panels), figsize=(1 + 2.8 * len(panels), 5), sharex="col", squeeze=False, layout="constrained"
    )
    for column, (label, (part, name)) in enumerate(panels.items()):
        values = sorted(part[name].unique(), key=lambda value: (value != 0, -value if name == "teacher" else value))
        places = {value: place for place, value in enumerate(values)}
        for axis, measure in zip(axes[:, column], ("RMSE", "energy distance"), strict=True):
            for index, method in enumerate(methods):
                of_method = part[part["method"] == method]
                if of_method[name].nunique() < 2:
                    continue  # noised rows have no route
                axis.scatter(of_method[name].map(places), of_method[measure], s=12, color=f"C{index}")
                means = of_method.groupby(name)[measure].mean()[
                    [value for value in values if value in {*of_method[name]}]
                ]
                axis.plot([places[value] for value in means.index], means, color=f"C{index}", label=method)
            axis.set(ylim=(min(0, 1.1 * part[measure].min()), None))
        axis.set_xticks(range(len(places)), [f"{value:g}" if value else "exact" for value in values])
        axis.set_xlabel(label)
    axes[0, 0].set_ylabel("RMSE to the ODE's end")
    axes[1, 0].set_ylabel("energy distance")
    axes[0, 0].legend(fontsize=8)
    return figure
