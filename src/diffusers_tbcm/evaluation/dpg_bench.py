"""DPG-Bench (Hu et al., 2024): its prompts, pictures as its own scorer reads them, and what that scorer says.

The scorer asks a vision-language model of its own environment: https://github.com/TencentQQGYLab/ELLA.
"""

from __future__ import annotations

import re
import shlex
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..data.prompts import prompt_text, text_lines
from ..files import written_beside
from .elsewhere import Scores, is_current
from .picture_folder import PictureFolder


RESULTS = "dpg-bench_*_results.txt"
TILES = 4  # pictures of a prompt that the scorer looks at, in a square
NOTE = "pictures"  # in a file for the scorer: how many it shows
LINE = re.compile(r"(?P<path>.+?\.png), (?P<scores>[-+.\de, ]+)")
CATEGORY = re.compile(r"\t(?P<name>[\w ]+): (?P<score>[-+.\de]+)")


class DPGBench:
    """DPG-Bench's prompts.

    Args:
        path: of its folder `prompts`, a text file each.
        max_prompts: the first so many by name; None for all.

    Attributes:
        prompts: P texts.
        names: P names of files, which the scorer knows prompts by.

    Raises:
        ValueError: where there is no such folder, or a file without a prompt, or that is no text.
    """

    name = "DPG-Bench"
    folder = "dpg_bench"

    def __init__(self, path: str | PathLike[str], max_prompts: int | None = None) -> None:
        files = sorted(Path(path).glob("[!.]*.txt"))[:max_prompts]
        if not files:
            raise ValueError(f"DPG-Bench folder {str(path)!r} holds no .txt file: give its folder `prompts`")
        self.names = [file.stem for file in files]
        texts = ["\n".join(text_lines(file, "DPG-Bench prompt")).strip() for file in files]
        self.prompts = [prompt_text(text, str(file)) for text, file in zip(texts, files, strict=True)]
        if not all(self.prompts):
            raise ValueError(f"DPG-Bench prompt {str(files[self.prompts.index('')])!r} is empty")

    def export(self, pictures: PictureFolder, folder: Path) -> str:
        """Lay pictures out for the scorer: a file a prompt, its first four pictures in a square, or its only one.

        A file that is newer than its pictures, and of as many, stays as it is.

        Args:
            pictures: of the prompts, of one size.
            folder: for them; made where there is none.

        Returns:
            The command that scores them, in the scorer's environment and checkout.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tiles = min(TILES, pictures.pictures_per_prompt)
        for prompt, name in enumerate(self.names):
            first, target = prompt * pictures.pictures_per_prompt, folder / f"{name}.png"
            sources = range(first, first + tiles)
            drawn_at = max(pictures.drawn_at(index) for index in sources)
            if _tiles(target) == tiles and target.stat().st_mtime_ns > drawn_at:
                continue
            (width, height), side = pictures[first].size, 1 if tiles == 1 else 2
            sheet, note = Image.new("RGB", (side * width, side * height)), PngInfo()
            for tile, index in enumerate(sources):
                sheet.paste(pictures[index], (tile % 2 * width, tile // 2 * height))
            note.add_text(NOTE, str(tiles))
            with written_beside(target) as partial:
                sheet.save(partial, format="PNG", pnginfo=note)
        width, _ = pictures[0].size
        return f"PIC_NUM={tiles} bash dpg_bench/dist_eval.sh {shlex.quote(str(folder.resolve()))} {width}"

    def scores(self, pictures: PictureFolder, folder: Path, resamples: int) -> Scores | None:
        """Read what the scorer wrote: the mean score of pictures, with an interval, and those of categories.

        Args:
            pictures: of the prompts.
            folder: of `export`, in which the scorer leaves `dpg-bench_TIME_results.txt`; the last one counts.
            resamples: of the bootstrap over prompts.

        Returns:
            `"DPG-Bench"` and `"DPG-Bench entity"` and so on, 0 to 100; None where the pictures were not
            scored yet.

        Raises:
            ValueError: where the file lacks a prompt.
        """
        files = sorted(folder.glob(RESULTS))
        sheets = [folder / f"{name}.png" for name in self.names]
        if not files or not is_current(files[-1], pictures, sheets):
            return None
        lines = [*text_lines(files[-1], "DPG-Bench results")]
        found: dict[str, float] = {}
        for line in lines:
            if match := LINE.fullmatch(line):
                found[Path(match["path"]).stem] = float(match["scores"].rpartition(",")[2])
        missing = [name for name in self.names if name not in found]
        if missing:
            raise ValueError(
                f"DPG-Bench results {str(files[-1])!r} lack {len(missing)} of {len(self.names)} prompts, such as"
                f" {missing[0]!r}: score the folder again"
            )
        of_prompt = 100 * torch.tensor([found[name] for name in self.names]).double()
        scores = Scores({}, {})
        scores.add_mean(self.name, of_prompt, resamples)
        categories = "\n".join(lines).partition("L1 category scores:")[2].partition("L2 category scores:")[0]
        for match in CATEGORY.finditer(categories):
            scores.metrics[f"{self.name} {match['name'].strip()}"] = float(match["score"])
        return scores


def _tiles(file: Path) -> int:
    """How many pictures a file for the scorer shows; 0 where there is none, or another one's."""
    try:
        with Image.open(file, formats=["PNG"]) as sheet:
            return int(sheet.info.get(NOTE, 0))
    except (OSError, ValueError):
        return 0
