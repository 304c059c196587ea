import math

import pytest
from PIL import Image

from diffusers_tbcm.evaluation.report import measurement_table, plot_measurements
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
