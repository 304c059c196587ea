import pytest
from PIL import Image, ImageColor

from diffusers_tbcm.evaluation.grid import image_grid


def test_image_grid_puts_every_picture_in_its_cell():
    colours = [["red", "lime"], ["blue", "black"], ["yellow", "cyan"]]
    rows = [[Image.new("RGB", (64, 64), colour) for colour in row] for row in colours]
    grid = image_grid(rows, ["teacher, 1 step", "student, 1 step"], ["a dog", "a cat", "an owl with a long name"], 128)
    gap, cell = 8, 128
    left, top = grid.width - 2 * (cell + gap), grid.height - 3 * (cell + gap)
    assert left > 100 and top == 32  # room for the longest label, and for a line above
    for row in range(3):
        for column in range(2):
            box = (left + column * (cell + gap), top + row * (cell + gap))
            cell_picture = grid.crop((*box, box[0] + cell, box[1] + cell))
            assert cell_picture.getcolors() == [(cell * cell, ImageColor.getrgb(colours[row][column]))]
    labels = grid.crop((0, top, left - gap // 2, grid.height)).convert("L")
    assert labels.getextrema()[0] < 128 and grid.crop((left, 0, grid.width, top)).convert("L").getextrema()[0] < 128


def test_image_grid_keeps_a_picture_s_proportions():
    grid = image_grid([[Image.new("RGB", (64, 32), "red")]], ["wide"], ["a"], 128)
    cell = grid.crop((grid.width - 136, grid.height - 136, grid.width - 8, grid.height - 8))
    assert cell.crop((0, 32, 128, 96)).getcolors() == [(128 * 64, (255, 0, 0))]
    for above_or_below in (0, 96):
        assert cell.crop((0, above_or_below, 128, above_or_below + 32)).getcolors() == [(128 * 32, (255, 255, 255))]


def test_image_grid_cuts_a_long_label_and_takes_one_of_several_lines():
    picture = Image.new("RGB", (8, 8))
    long, lines = "an endless story " * 300, "a dog\nand a cat\n"
    for label in (long, "W" * 5000):
        grid = image_grid([[picture]], ["a"], [label], 128)
        assert grid.width <= (3 + 1) * 128 + 3 * 8
        assert grid.width > 3 * 128  # and no shorter than it has to be
    assert list(image_grid([[picture]], ["a"], [lines]).getdata()) == list(
        image_grid([[picture]], ["a"], ["a dog and a cat"]).getdata()
    )


def test_image_grid_refuses_rows_that_do_not_fit():
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="row_labels has 2 labels for 1 rows"):
        image_grid([[picture]], ["a"], ["x", "y"])
    with pytest.raises(ValueError, match=r"rows\[1\] has 2 pictures for 1 column_labels"):
        image_grid([[picture], [picture, picture]], ["a"], ["x", "y"])
