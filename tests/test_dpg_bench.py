"""DPG-Bench's layout, and its results read back."""

import shlex
from pathlib import Path

import pytest
from PIL import Image

from diffusers_tbcm.evaluation.dpg_bench import DPGBench
from diffusers_tbcm.evaluation.picture_folder import PictureFolder


PROMPTS = {"0": "A field of eight cabbages.", "102": "A cat on a mat.\n", "COCOval2014000000010363": "A red bus."}
RESULTS = """{folder}/102.png, 0.5, 1.0, 0.0, 0.5, 0.5
{folder}/0.png, 1.0, 1.0, 1.0, 1.0, 1.0
{folder}/COCOval2014000000010363.png, 0.25, 0.25, 0.25, 0.25, 0.25
Model: student-1-steps
L1 category scores:
\tentity: 61.5
\tglobal: 80.0
L2 category scores:
\tentity - whole: 61.5
\tglobal - : 80.0
Image path: {folder}
Save results to: {folder}/dpg-bench_20250102-000000_results.txt
DPG-Bench score: 58.333
"""


@pytest.fixture
def bench(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, prompt in PROMPTS.items():
        (folder / f"{name}.txt").write_text(prompt)
    return DPGBench(folder)


def coloured(folder, prompts, each):
    pictures = PictureFolder(folder, prompts, each, {"seed": 0})
    for index in range(len(pictures)):
        Image.new("RGB", (8, 6), (10 * index, 0, 0)).save(pictures.path(index))
    return pictures


def test_prompts_are_known_by_their_files(bench, tmp_path):
    (tmp_path / "prompts" / "._0.txt").write_bytes(b"\0\5\x16\7")  # which macOS writes beside files of other disks
    bench = DPGBench(tmp_path / "prompts")
    assert bench.names == ["0", "102", "COCOval2014000000010363"]
    assert bench.prompts == ["A field of eight cabbages.", "A cat on a mat.", "A red bus."]


def test_a_byte_order_mark_is_no_part_of_a_prompt(bench, tmp_path):
    (tmp_path / "prompts" / "0.txt").write_bytes("\ufeffA field\r\nof eight cabbages.".encode())
    assert DPGBench(tmp_path / "prompts").prompts[0] == "A field\nof eight cabbages."


def test_four_pictures_of_a_prompt_are_a_square(bench, tmp_path):
    pictures, folder = coloured(tmp_path / "pictures", bench.prompts, 5), tmp_path / "out"
    command = bench.export(pictures, folder)
    assert command == f"PIC_NUM=4 bash dpg_bench/dist_eval.sh {folder} 8"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.png" for name in PROMPTS)
    with Image.open(folder / "102.png") as sheet:
        assert sheet.size == (16, 12)
        places = [(0, 0), (8, 0), (0, 6), (8, 6)]  # left to right, then down: as the scorer cuts it
        assert [sheet.getpixel(place)[0] for place in places] == [50, 60, 70, 80]


def test_a_square_is_made_anew_for_new_pictures_only(bench, tmp_path):
    pictures, folder = coloured(tmp_path / "pictures", bench.prompts, 4), tmp_path / "out"
    bench.export(pictures, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    Image.new("RGB", (8, 6), "blue").save(pictures.path(6))
    bench.export(pictures, folder)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"102.png"}
    with Image.open(folder / "102.png") as sheet:
        assert sheet.getpixel((0, 6)) == (0, 0, 255)


@pytest.mark.parametrize(("before", "now"), [(4, 1), (1, 4), (4, 2), (2, 4)])
def test_results_of_another_number_of_pictures_are_left_out(before, now, bench, tmp_path):
    coloured(tmp_path / "pictures", bench.prompts, 4)
    first, then = (PictureFolder(tmp_path / "pictures", bench.prompts, each, {"seed": 0}) for each in (before, now))
    folder, results = tmp_path / "out", RESULTS.format(folder=tmp_path / "out")
    bench.export(first, folder)
    (folder / "dpg-bench_20250102-000000_results.txt").write_text(results)
    assert bench.scores(first, folder, 20) is not None
    assert f"PIC_NUM={now} " in bench.export(then, folder)
    with Image.open(folder / "102.png") as sheet:
        assert sheet.size == ((8, 6) if now == 1 else (16, 12))
        assert now == 1 or (sheet.getpixel((0, 6))[0] > 0) == (now == 4)
    assert bench.scores(then, folder, 20) is None
    (folder / "dpg-bench_20250103-000000_results.txt").write_text(results)
    bench.export(then, folder)
    assert bench.scores(then, folder, 20) is not None


def test_the_command_runs_in_another_folder(bench, tmp_path, monkeypatch):
    pictures = coloured(tmp_path / "pictures", bench.prompts, 1)
    monkeypatch.chdir(tmp_path)
    assert shlex.split(bench.export(pictures, Path("my runs") / "out"))[-2:] == [
        str(tmp_path / "my runs" / "out"),
        "8",
    ]


def test_one_picture_of_a_prompt_is_the_file(bench, tmp_path):
    pictures = coloured(tmp_path / "pictures", bench.prompts, 1)
    assert bench.export(pictures, tmp_path / "out") == f"PIC_NUM=1 bash dpg_bench/dist_eval.sh {tmp_path / 'out'} 8"
    with Image.open(tmp_path / "out" / "102.png") as picture:
        assert picture.size == (8, 6) and picture.getpixel((0, 0)) == (10, 0, 0)


def test_the_last_results_are_read(bench, tmp_path):
    pictures, folder = coloured(tmp_path / "pictures", bench.prompts, 4), tmp_path / "a, b"
    bench.export(pictures, folder)
    assert bench.scores(pictures, folder, 20) is None
    (folder / "dpg-bench_20250101-000000_results.txt").write_text("an earlier one")
    (folder / "dpg-bench_20250102-000000_results.txt").write_text(RESULTS.format(folder=folder))
    (folder / "dpg-bench_20250102-000000_results_detail.txt").write_text("answers")
    scores = bench.scores(pictures, folder, 400)
    assert scores.metrics == pytest.approx({"DPG-Bench": 175 / 3, "DPG-Bench entity": 61.5, "DPG-Bench global": 80.0})
    low, high = scores.intervals["DPG-Bench"]
    assert {*scores.intervals} == {"DPG-Bench"}
    assert (high - low) / 2 == pytest.approx(1.96 * 31.18 / 3**0.5, rel=0.1)  # the deviation of 100, 50 and 25


def test_results_that_lack_a_prompt_are_refused(bench, tmp_path):
    pictures = coloured(tmp_path / "pictures", bench.prompts, 4)
    bench.export(pictures, tmp_path / "out")
    results = RESULTS.format(folder=tmp_path).replace("/102.png", "/103.png")
    (tmp_path / "out" / "dpg-bench_20250102-000000_results.txt").write_text(results)
    with pytest.raises(ValueError, match="lack 1 of 3 prompts, such as '102': score the folder again"):
        bench.scores(pictures, tmp_path / "out", 20)


def test_a_folder_that_is_not_dpg_benchs_is_named(bench, tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.txt file: give its folder `prompts`"):
        DPGBench(tmp_path / "none")
    (tmp_path / "prompts" / "0.txt").write_bytes(b"a caf\xe9")
    with pytest.raises(ValueError, match=r"DPG-Bench prompt .*0\.txt' is not UTF-8: line 1 cannot be read"):
        DPGBench(tmp_path / "prompts")
    (tmp_path / "prompts" / "0.txt").write_bytes(b"a \0 dog")
    with pytest.raises(ValueError, match=r"DPG-Bench prompt .*0\.txt' is not UTF-8 text: line 1 holds a NUL"):
        DPGBench(tmp_path / "prompts")
    (tmp_path / "prompts" / "0.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"DPG-Bench prompt .*0\.txt' is empty"):
        DPGBench(tmp_path / "prompts")
