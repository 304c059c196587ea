"""The study's tables, means and standard deviations over seeds, and plots of every run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas
from common import write_results


matplotlib.use("Agg")
from matplotlib import pyplot


RESULTS = Path(__file__).parent / "results"
GROUP = ["setting", "compared at", "inference steps"]
# What a table shows where its runs have it, with so many digits.
DIGITS = {
    "train steps": 0,
    "learning rate": 4,
    "ms / row": 1,
    "peak memory (GiB)": 2,
    "filtered share": 3,
    "MobileNet-FD": 1,
    "top-5 retrieval": 3,
    "text-image head score": 2,
    "diversity": 3,
}
SAME_FOR_ALL_SEEDS = ("train steps", "learning rate")
NOT_PLOTTED = (*SAME_FOR_ALL_SEEDS, "filtered share")


def summarize(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Average over seeds.

    Args:
        runs: a row for each run and number of inference steps; `seed`, and those of `GROUP` and `DIGITS` that it has.

    Returns:
        A row for each group, in their order: the number of seeds, and "mean ± standard deviation" of every figure, the
        latter where there are several seeds; empty where there is no figure.
    """
    groups = runs.groupby([name for name in GROUP if name in runs], sort=False, dropna=False)
    table = groups["seed"].nunique().rename("seeds").to_frame()
    for name, digits in DIGITS.items():
        if name not in runs:
            continue
        cells = []
        for mean, deviation in zip(groups[name].mean(), groups[name].std(), strict=True):
            cell = "" if pandas.isna(mean) else f"{mean:.{digits}f}"
            if name not in SAME_FOR_ALL_SEEDS and not pandas.isna(deviation):
                cell += f" ± {deviation:.{digits}f}"
            cells.append(cell)
        table[name] = cells
    return table.reset_index()


def plot(runs: pandas.DataFrame, path: Path) -> None:
    """A panel for every figure, with a dot for every run; models without seeds, such as the teacher, are lines."""
    by = [name for name in GROUP[:2] if name in runs]
    trained = runs[runs["seed"].notna()]
    labels = trained[by].agg(", ".join, axis=1)
    places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    names = [name for name in DIGITS if name in trained and name not in NOT_PLOTTED and trained[name].notna().any()]
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(3 * len(names), 1.5 + 0.4 * len(places)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    steps = list(dict.fromkeys(trained.get("inference steps", pandas.Series([0] * len(trained)))))
    for axis, name in zip(axes[0], names, strict=True):
        for index, number in enumerate(steps):
            part = trained[trained["inference steps"] == number] if "inference steps" in trained else trained
            offset = 0.2 * (index - (len(steps) - 1) / 2)
            label = f"{number} step{'s' * (number > 1)}" if number else None
            heights = [places[place] + offset for place in labels[part.index]]
            axis.scatter(part[name], heights, s=14, color=f"C{index}", label=label)
        for index, (_, row) in enumerate(runs[runs["seed"].isna() & (runs["setting"] == "teacher")].iterrows()):
            if name in row and pandas.notna(row[name]):
                label = f"teacher, {row['inference steps']} steps" if index == 0 else None
                axis.axvline(row[name], color="grey", linestyle="--", linewidth=1, label=label)
        axis.set(title=name)
    axes[0, 0].set_yticks(range(len(places)), list(places))
    axes[0, 0].invert_yaxis()
    if axes[0, 0].get_legend_handles_labels()[1]:
        axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(
    name: str,
    records: Sequence[dict[str, Any]],
    details: dict[str, Any],
    flags: dict[str, dict[str, Any]],
    folder: Path = RESULTS,
) -> None:
    """Write a table as Markdown, JSON with every run and its flags, and PNG."""
    runs = pandas.DataFrame(records)
    write_results(name, summarize(runs), details, folder, runs=list(records), flags=flags)
    plot(runs, folder / f"{name}.png")
