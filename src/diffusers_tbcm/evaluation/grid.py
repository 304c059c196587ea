"""Pictures side by side: a table with labels."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps


MAX_LABEL_CELLS = 3
ELLIPSIS = " ..."


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    cell_size: int = 128,
) -> Image.Image:
    """Lay pictures out as a table with labels above its columns and to the left of its rows.

    Args:
        rows: the pictures, row by row; each is scaled to fit a cell, in its own proportions.
        column_labels: one a column.
        row_labels: one a row; one that is wider than three cells is cut.
        cell_size: pixels a side of a cell.

    Returns:
        The table, on white.

    Raises:
        ValueError: where a row or its labels do not fit the table.
    """
    if len(row_labels) != len(rows):
        raise ValueError(f"row_labels has {len(row_labels)} labels for {len(rows)} rows")
    for index, row in enumerate(rows):
        if len(row) != len(column_labels):
            raise ValueError(f"rows[{index}] has {len(row)} pictures for {len(column_labels)} column_labels")

    font = ImageFont.load_default(cell_size // 8)
    gap = cell_size // 16
    row_labels = [_fitted(label, font, MAX_LABEL_CELLS * cell_size) for label in row_labels]
    left = gap + int(max(font.getlength(label) for label in row_labels)) + gap
    top = gap + cell_size // 8 + gap
    size = (left + len(column_labels) * (cell_size + gap), top + len(rows) * (cell_size + gap))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (cell_size + gap) + cell_size // 2, top // 2), label, "black", font, anchor="mm")
    for index, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + index * (cell_size + gap)
        draw.text((left - gap, y + cell_size // 2), label, "black", font, anchor="rm")
        for column, picture in enumerate(row):
            cell = ImageOps.pad(
                picture.convert("RGB"), (cell_size, cell_size), Image.Resampling.LANCZOS, color="white"
            )
            grid.paste(cell, (left + column * (cell_size + gap), y))
    return grid


def _fitted(label: str, font: Any, width: int) -> str:
    """A label in one line, cut to a width in pixels."""
    label = " ".join(label.split())
    if font.getlength(label) <= width:
        return label
    kept = bisect_right(range(len(label)), width, key=lambda length: font.getlength(label[:length] + ELLIPSIS)) - 1
    return label[: max(0, kept)] + ELLIPSIS
