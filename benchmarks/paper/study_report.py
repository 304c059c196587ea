"""The study's tables, means and standard deviations over seeds, and plots of every run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas

from ..common import markdown, write_results


matplotlib.use("Agg")
from matplotlib import pyplot


RESULTS = Path(__file__).parent / "results"
GROUP = ["setting", "after steps", "inference steps"]
# What a table shows where its runs have it, with so many digits.
RECIPE = {"train steps": 0, "learning rate": 4}  # the same for all seeds
COSTS = {"ms / row": 1, "peak memory (GiB)": 2, "filtered share": 3}
QUALITY = {"MobileNet-FD": 1, "top-5 retrieval": 3, "text-image head score": 2, "diversity": 3}


def summarize(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Average over seeds.

    Args:
        runs: a row for each run and number of inference steps; `seed`, and those of `GROUP`, `RECIPE`, `QUALITY` and
            `COSTS` that it has.

    Returns:
        A row for each group, in their order: the number of seeds, and "mean ± standard deviation" of every figure of
        quality, or of cost where none was drawn, the latter where there are several seeds; empty where there is none.
    """
    groups = runs.groupby([name for name in GROUP if name in runs], sort=False, dropna=False)
    table = groups["seed"].nunique().rename("seeds").to_frame()
    figures = QUALITY if set(QUALITY) & set(runs) else COSTS
    for name, digits in (RECIPE | figures).items():
        if name not in runs:
            continue
        cells = []
        for mean, deviation in zip(groups[name].mean(), groups[name].std(), strict=True):
            cell = "" if pandas.isna(mean) else f"{mean:.{digits}f}"
            if name not in RECIPE and not pandas.isna(deviation):
                cell += f" ± {deviation:.{digits}f}"
            cells.append(cell)
        table[name] = cells
    table = table.reset_index()
    return table.astype({name: "Int64" for name in ("after steps",) if name in table})


def plot(runs: pandas.DataFrame, path: Path) -> None:
    """A panel for every figure of quality, or for the costs; a dot for every run, a line for the teacher."""
    trained, teacher = runs[runs["seed"].notna()], runs[runs["setting"].str.startswith("teacher")]
    places = {setting: place for place, setting in enumerate(trained["setting"].unique())}
    names = [name for name in QUALITY if name in runs] or list(COSTS)[:2]
    parts = {"": trained}
    if "inference steps" in runs:
        parts = {f"steps: {steps}": part for steps, part in trained.groupby("inference steps")}
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(1.5 + 3 * len(names), 1.5 + 0.4 * len(places)), sharey=True, layout="constrained"
    )
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for index, (label, part) in enumerate(parts.items()):
            heights = part["setting"].map(places) + 0.2 * (index - (len(parts) - 1) / 2)
            axis.scatter(part[name], heights, s=14, color=f"C{index}", label=label)
        for style, (_, row) in zip(("--", ":"), teacher.iterrows(), strict=False):
            axis.axvline(
                row[name], color="grey", linestyle=style, label=f"{row['setting']}, steps: {row['inference steps']}"
            )
        axis.set(title=name)
    axis.set_yticks(range(len(places)), list(places))
    axis.invert_yaxis()
    if len(parts) > 1:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_progress(runs: pandas.DataFrame, path: Path) -> None:
    """A panel for every figure of quality over training steps, a line for every run, the teacher and the untrained."""
    trained = runs[runs["after steps"].notna()]
    names = [name for name in QUALITY if name in runs]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 4), layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for index, (setting, of_setting) in enumerate(trained.groupby("setting", sort=False)):
            for seed, part in of_setting.groupby("seed"):
                label = setting if seed == of_setting["seed"].min() else None
                axis.plot(part["after steps"], part[name], marker=".", color=f"C{index}", label=label)
        for (setting, steps), row in runs[runs["seed"].isna()].groupby(["setting", "inference steps"]):
            of_teacher = setting.startswith("teacher")
            if of_teacher or steps == 1:
                style = "--" if of_teacher else ":"
                axis.axhline(row[name].item(), color="grey", linestyle=style, label=f"{setting}, steps: {steps}")
        axis.set(title=name, xlabel="training steps")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(
    name: str,
    records: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
    details: dict[str, Any],
    flags: dict[str, dict[str, Any]],
    folder: Path = RESULTS,
) -> None:
    """Write a table as Markdown, JSON with every run and its flags, and PNG.

    Args:
        name: of the files.
        records: every run at every number of steps.
        differences: for each setting, its name and [value, low, high] of its differences by name.
        details: what stands above the table.
        flags: of each setting.
        folder: for the files.
    """
    runs = pandas.DataFrame(records)
    more = {"runs": list(records), "differences": list(differences), "flags": flags}
    write_results(name, summarize(runs), details, folder, **more)
    if differences:
        cells = [
            {
                key: cell if isinstance(cell, str) else "{:+.1f} ({:+.1f} to {:+.1f})".format(*cell)
                for key, cell in row.items()
            }
            for row in differences
        ]
        table = markdown(pandas.DataFrame(cells).set_index("setting"))
        with (folder / f"{name}.md").open("a", encoding="utf-8") as file:
            file.write(f"\nAt one step, the same prompts and noise, 95% intervals:\n\n{table}")
    (plot_progress if "after steps" in runs else plot)(runs, folder / f"{name}.png")
