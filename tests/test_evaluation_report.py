import csv
import math

import pytest
import torch
from PIL import Image

from diffusers_tbcm.evaluation.report import measurement_table, plot_measurements, save_prompt_values
from diffusers_tbcm.export.record import Measurement


@pytest.fixture
def measurements():
    return [
        Measurement("teacher", 20, {"FD": 12.3456, "s / image": 1.5}, {"FD": (11.87654, 12.8)}),
        Measurement("student", 1, {"FD": 99.0}, {"FD": (90.0, 110.0)}),
    ]


def test_the_table_has_intervals_where_there_are_some(measurements):
    rows = measurement_table(measurements).to_dict("records")
    assert rows[0] == {"model": "teacher", "steps": "20", "FD": "12.35 (11.88 to 12.8)", "s / image": "1.5"}
    assert rows[1]["FD"] == "99 (90 to 110)" and math.isnan(rows[1]["s / image"])


def test_the_plot_has_a_panel_a_metric(measurements, tmp_path):
    widths = []
    for rows in (measurements, measurements[1:]):
        plot_measurements(rows, tmp_path / "metrics.png")
        with Image.open(tmp_path / "metrics.png") as picture:
            widths.append(picture.width)
    assert widths[0] == 2 * widths[1] > 0


def test_dollars_of_a_label_are_no_formula(tmp_path):
    plot_measurements([Measurement("student", 1, {"FD ($_{$)": 1.0}, {})], tmp_path / "metrics.png")
    with Image.open(tmp_path / "metrics.png") as picture:
        assert picture.width > 0


def test_values_of_prompts_are_a_row_each(tmp_path):
    prompts = ["a dog", 'a "cat",\non a mat']
    runs = [
        ("teacher", 20, {"score": torch.tensor([1.0, 2.5])}),
        ("student", 1, {"diversity": torch.tensor([0, 0.1])}),
    ]
    save_prompt_values(tmp_path / "prompts.csv", prompts, runs)
    with (tmp_path / "prompts.csv").open(newline="") as file:
        rows = [*csv.reader(file)]
    assert rows == [
        ["model", "steps", "prompt", "score", "diversity"],
        ["teacher", "20", prompts[0], "1", ""],
        ["teacher", "20", prompts[1], "2.5", ""],
        ["student", "1", prompts[0], "", "0"],
        ["student", "1", prompts[1], "", "0.1"],
    ]
