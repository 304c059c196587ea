"""Measurements as people read them: a table, and a plot over the number of steps."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..export.record import Measurement
from ..files import written_beside


if TYPE_CHECKING:
    from pandas import DataFrame


def measurement_table(measurements: Sequence[Measurement]) -> DataFrame:
    """Write measurements as text, four digits each.

    Args:
        measurements: the rows.

    Returns:
        `model`, `steps` and every metric, with its interval where it has one: "12.34 (11.9 to 12.8)". What a row lacks
        is NaN.
    """
    from pandas import DataFrame

    rows = []
    for row in measurements:
        cells = {"model": row.model, "steps": str(row.num_inference_steps)}
        for name, value in row.metrics.items():
            cells[name] = f"{value:.4g}"
            if name in row.intervals:
                low, high = row.intervals[name]
                cells[name] += f" ({low:.4g} to {high:.4g})"
        rows.append(cells)
    return DataFrame(rows)


def save_prompt_values(
    path: str | PathLike[str], prompts: Sequence[str], runs: Sequence[tuple[str, int, Mapping[str, Tensor]]]
) -> None:
    """Write what every prompt has a value of as a csv file, a row for each prompt of each run.

    Args:
        path: of the file.
        prompts: P texts.
        runs: name and steps of a model, and values (P,) by name.
    """
    names = list(dict.fromkeys(name for _, _, values in runs for name in values))
    with written_beside(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["model", "steps", "prompt", *names])
        for model, steps, values in runs:
            columns = [values[name].tolist() if name in values else [""] * len(prompts) for name in names]
            for prompt, *row in zip(prompts, *columns, strict=True):
                table.writerow([model, steps, prompt, *(f"{value:.6g}" if value != "" else "" for value in row)])


def plot_measurements(
    measurements: Sequence[Measurement], path: str | PathLike[str], *, format: str | None = None
) -> None:
    """Draw every metric over the number of steps, a line a model, with its intervals.

    Args:
        measurements: the rows.
        path: of the picture.
        format: of the picture, such as `"png"`; by default what the path ends in.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in measurements for name in row.metrics))
    models = list(dict.fromkeys(row.model for row in measurements))
    all_steps = sorted({row.num_inference_steps for row in measurements})
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.5 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        for model in models:
            shown = sorted(
                (row.num_inference_steps, row.metrics[name], row.intervals.get(name, (row.metrics[name],) * 2))
                for row in measurements
                if row.model == model and name in row.metrics
            )
            if shown:
                steps, values, ends = zip(*shown, strict=True)
                errors = [[v - low for v, (low, _) in zip(values, ends, strict=True)]]
                errors += [[high - v for v, (_, high) in zip(values, ends, strict=True)]]
                axis.errorbar(steps, values, yerr=errors, marker="o", capsize=3, label=model)
        axis.set_xscale("log", base=2)
        axis.set_xticks(all_steps, [str(steps) for steps in all_steps])
        axis.set_title(name, parse_math=False)  # a label may have dollars
        axis.set_xlabel("steps")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes[0].legend()
    with written_beside(path) as partial:
        figure.savefig(partial, dpi=120, format=format or Path(path).suffix[1:] or None)
