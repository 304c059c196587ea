"""GenEval (Ghosh et al., 2023): its prompts, pictures as its own scorer reads them, and what that scorer says.

The scorer finds objects with an mmdet of its own environment: https://github.com/djghosh13/geneval.
"""

from __future__ import annotations

import json
import shlex
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ..data.prompts import prompt_text
from ..files import written_beside
from .elsewhere import Scores, is_current, read_lines
from .metrics import bootstrap
from .picture_folder import PictureFolder


RESULTS = "results.jsonl"
METADATA = "metadata.jsonl"
FILE_NAMES = f"{'[0-9]' * 5}/samples/{'[0-9]' * 4}.png"


class GenEval:
    """GenEval's prompts, each with the objects that it asks for.

    Args:
        path: of its `evaluation_metadata.jsonl`, or of one that `create_prompts.py` wrote.
        max_prompts: the first so many; None for all.

    Attributes:
        prompts: P texts.
        tasks: what kind of prompt each is, such as `"counting"`.

    Raises:
        ValueError: where a line of the file has no prompt, or one that is no text, or no task.
    """

    name = "GenEval"
    folder = "geneval"

    def __init__(self, path: str | PathLike[str], max_prompts: int | None = None) -> None:
        self._lines = read_lines("GenEval file", Path(path), {"prompt": str, "tag": str})[:max_prompts]
        self.prompts = [prompt_text(line["prompt"], str(path)) for line in self._lines]
        if empty := [number for number, prompt in enumerate(self.prompts, start=1) if not prompt.strip()]:
            raise ValueError(f"GenEval file {str(path)!r}: prompt {empty[0]} is empty")
        self.tasks = [line["tag"] for line in self._lines]

    def export(self, pictures: PictureFolder, folder: Path) -> str:
        """Lay pictures out for the scorer: `00000/metadata.jsonl`, `00000/samples/0000.png` and so on.

        Pictures of such names that a run with more of them has left are deleted.

        Args:
            pictures: of the prompts.
            folder: for them; made where there is none.

        Returns:
            The command that scores them, in the scorer's environment and checkout.
        """
        for prompt, line in enumerate(self._lines):
            (folder / f"{prompt:05}" / "samples").mkdir(parents=True, exist_ok=True)
            with written_beside(folder / f"{prompt:05}" / METADATA) as partial:
                partial.write_text(json.dumps(line) + "\n", encoding="utf-8")
        wanted = set()
        for index in range(len(pictures)):
            prompt, picture = divmod(index, pictures.pictures_per_prompt)
            wanted.add(target := folder / f"{prompt:05}" / "samples" / f"{picture:04}.png")
            pictures.place(index, target)
        for exported in [*folder.glob(FILE_NAMES)]:
            if exported not in wanted:  # of a run with more pictures: the scorer would score it, too
                exported.unlink()
        shown, results = (shlex.quote(str(path.resolve())) for path in (folder, folder / RESULTS))
        return f"python evaluation/evaluate_images.py {shown} --outfile {results} --model-path DETECTOR"

    def scores(self, pictures: PictureFolder, folder: Path, resamples: int) -> Scores | None:
        """Read what the scorer wrote: the share of correct pictures, by task, and the mean over tasks.

        Args:
            pictures: of the prompts.
            folder: of `export`, with the scorer's `results.jsonl`.
            resamples: of the bootstrap over prompts.

        Returns:
            `"GenEval"` and `"GenEval counting"` and so on, 0 to 1; None where the pictures were not
            scored yet.

        Raises:
            ValueError: where the file holds something else, or not every picture.
        """
        file = folder / RESULTS
        if not file.is_file() or not is_current(file, pictures):
            return None
        found: dict[tuple[int, int], bool] = {}
        for line in read_lines("GenEval results", file, {"filename": str, "correct": bool}):
            path = Path(line["filename"])
            found[_number(path.parent.parent.name), _number(path.stem)] = line["correct"]
        wanted = {divmod(index, pictures.pictures_per_prompt) for index in range(len(pictures))}
        if found.keys() != wanted:
            raise ValueError(
                f"GenEval results {str(file)!r} hold {len(wanted & found.keys())} of {len(wanted)} pictures, and"
                f" {len(found.keys() - wanted)} others: score the folder again"
            )
        correct = torch.tensor([found[place] for place in sorted(wanted)]).double()
        return self._by_task(correct.view(len(self.prompts), -1).mean(dim=1), resamples)

    def _by_task(self, correct: Tensor, resamples: int) -> Scores:
        """Shares by task of those by prompt (P,)."""
        tasks = list(dict.fromkeys(self.tasks))
        task = torch.tensor([tasks.index(name) for name in self.tasks])

        def overall(index: Tensor) -> float:
            shares = [correct[index][task[index] == number] for number in range(len(tasks))]
            return float(torch.stack([share.mean() for share in shares if len(share)]).mean())

        scores = Scores({}, {})
        scores.add(self.name, bootstrap(overall, len(correct), resamples=resamples))
        for number, name in enumerate(tasks):
            scores.add_mean(f"{self.name} {name}", correct[task == number], resamples)
        return scores


def _number(name: str) -> int:
    return int(name) if name.isdecimal() else -1
