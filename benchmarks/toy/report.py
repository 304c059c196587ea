"""The study's tables and figures, of its runs."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import pandas
import torch
from scipy import stats

from diffusers_tbcm.diffusion import diffuse
from diffusers_tbcm.trajectory import record_trajectory
from diffusers_tbcm.trigflow import SIGMA_DATA, TrigFlowTransformer

from .mixture import empty_text, energy_distance, modes, real_samples, text_of


matplotlib.use("Agg")
from matplotlib import pyplot


FIGURES = {"RMSE": 3, "energy distance": 4, "right mode": 3}
CELL = ["guidance", "num_steps", "dim", "teacher"]


def over_seeds(values: pandas.Series, digits: int) -> str:
    """Mean, lowest and highest."""
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def difference(first: pandas.Series, second: pandas.Series, digits: int = 3) -> str:
    """The mean difference of runs with the same seed, with Student's 95% interval."""
    paired = (first - second).dropna()
    if len(paired) < 2:
        return f"{paired.mean():+.{digits}f}" if len(paired) else ""
    half = stats.t.ppf(0.975, len(paired) - 1) * paired.std() / math.sqrt(len(paired))
    return f"{paired.mean():+.{digits}f} ± {half:.{digits}f}"


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
    runs: pandas.DataFrame, methods: Sequence[str], drifts: Mapping[tuple[float, ...], float]
) -> pandas.DataFrame:
    """A row a setting: RMSE of each method, and the first's less the second's by seed.

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
        rmse = {method: of_method.set_index("seed")["RMSE"] for method, of_method in part.groupby("method")}
        line = {
            "teacher": f"{cell['teacher']} updates" if cell["teacher"] else "exact",
            **{name: cell[name] for name in ("guidance", "dim")},
            "steps": cell["num_steps"],
            "seeds": part["seed"].nunique(),
            "drift": f"{drifts[tuple(cell[name] for name in ('guidance', 'dim', 'teacher'))]:.3f}",
        }
        line |= {method: over_seeds(rmse[method], 3) if method in rmse else "" for method in methods}
        first, second = (rmse.get(method) for method in methods[:2])
        line["difference"] = "" if first is None or second is None else difference(first, second)
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


def plot_samples(samples: Mapping[float, Mapping[str, torch.Tensor]], classes: torch.Tensor) -> pyplot.Figure:
    """One-step samples of students, a row a guidance scale, coloured by class; crosses are the modes."""
    columns = len(next(iter(samples.values())))
    figure, axes = pyplot.subplots(len(samples), columns, figsize=(1.55 * columns, 3.5), layout="constrained")
    for row, (guidance, drawn) in zip(axes, samples.items(), strict=True):
        row[0].set_ylabel(f"guidance {guidance:g}")
        for axis, (name, points) in zip(row, drawn.items(), strict=True):
            axis.scatter(*points.T, c=classes, s=1.5, cmap="tab10", vmax=9, linewidths=0)
            axis.scatter(*(SIGMA_DATA * modes()).T, c="black", marker="+", s=20, linewidths=0.7)
            axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=[], yticks=[], aspect="equal")
            axis.set_title(name, fontsize=8)
    return figure


def plot_rows(runs: pandas.DataFrame, methods: Sequence[str]) -> pyplot.Figure:
    """RMSE of each method against guidance, teacher, dimension and route length; dots are seeds."""
    plane, exact = runs["dim"] == 2, runs["teacher"] == 0
    usual = runs["num_steps"] == 16
    at_three = runs["guidance"] == 3
    panels = {
        "guidance scale, exact teacher": (runs[plane & exact & usual], "guidance"),
        "updates of a learned teacher, guidance 3": (runs[plane & ~exact & at_three], "teacher"),
        "dimension, guidance 3": (runs[exact & usual & at_three], "dim"),
        "steps of a trajectory, guidance 3": (runs[plane & exact & at_three], "num_steps"),
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3), layout="constrained")
    for axis, (label, (part, name)) in zip(axes, panels.items(), strict=True):
        for index, method in enumerate(methods):
            if name == "num_steps" and index:
                continue  # noised rows have no route
            of_method = part[part["method"] == method]
            places = {value: place for place, value in enumerate(sorted(part[name].unique()))}
            axis.scatter(of_method[name].map(places), of_method["RMSE"], s=12, color=f"C{index}")
            means = of_method.groupby(name)["RMSE"].mean()
            axis.plot([places[value] for value in means.index], means, color=f"C{index}", label=method)
        axis.set_xticks(range(len(places)), [f"{value:g}" for value in places])
        axis.set(xlabel=label, ylim=(0, None))
    axes[0].set_ylabel("RMSE to the ODE's end")
    axes[0].legend(fontsize=8)
    return figure
