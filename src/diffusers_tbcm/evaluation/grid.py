"""Pictures side by side: a table with labels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps


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
        row_labels: one a row.
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
