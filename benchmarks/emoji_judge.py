"""Students of the embedded teacher, judged by its own pictures: what the benchmarks on it draw, keep and say."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_tbcm.evaluation.features import MobileNetFeatures, pictures_to_tensor
from diffusers_tbcm.evaluation.metrics import decisiveness, mirror_products
from diffusers_tbcm.export.record import Measurement
from examples.tbcm.quickstart import (
    REFERENCE_SEED,
    SEED,
    STUDENT_STEPS,
    TEACHER_STEPS,
    Task,
    draw,
    few,
    load_controls,
    many,
)

from .common import RESULTS, default_device, made_folder, markdown, write_results
from .seeds import seeds_in_words


Tensors = dict[str, torch.Tensor]

TASKS: dict[str, Callable[[], Task]] = {"few": few, "many": many}
DISTANCE = "FD to the teacher"
METRICS = (DISTANCE, "decisiveness", "top-5 retrieval")


def study_parser(name: str, description: str | None, prompts: Iterable[str] = TASKS) -> argparse.ArgumentParser:
    """Make the command line of a study: its prompts, `--work_dir` and `--output_dir`.

    Args:
        name: of the study, and of its work folder in `runs`.
        description: of its program.
        prompts: names of `TASKS` that it takes.

    Returns:
        The parser, for more arguments.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", choices=prompts)
    parser.add_argument("--work_dir", type=Path, default=Path("runs") / name)
    parser.add_argument("--output_dir", type=made_folder, default=RESULTS)
    return parser


class EmojiJudge:
    """Draws a task's pictures, keeps them, and compares them with the teacher's.

    Args:
        task: what is drawn.
        kept: folder of what has been drawn.

    Attributes:
        teachers: the teacher's pictures from the noises that students are drawn from, as `draw` gives them.
        controls: rows of the teacher and of the untrained student.
        floor: the distance that another noise alone makes.
    """

    def __init__(self, task: Task, kept: Path) -> None:
        self._task, self._kept = task, kept
        kept.mkdir(parents=True, exist_ok=True)
        models = load_controls(str(default_device()))
        reference = self.draw("teacher", lambda: models["teacher"], [TEACHER_STEPS], REFERENCE_SEED)
        self.judge = task.judge(reference[TEACHER_STEPS]["features"])
        self.teachers = self.draw("teacher", lambda: models["teacher"], [TEACHER_STEPS])[TEACHER_STEPS]
        untrained = self.draw("untrained", lambda: models["untrained student"])
        teacher = self.describe("teacher", TEACHER_STEPS, self.teachers)
        self.controls = [teacher, *(self.describe("untrained student", *drawn) for drawn in untrained.items())]
        self.floor = teacher.metrics[DISTANCE]

    def draw(
        self,
        name: str,
        load: Callable[[], DiffusionPipeline],
        all_steps: Sequence[int] = STUDENT_STEPS,
        seed: int = SEED,
    ) -> dict[int, Tensors]:
        """Draw every prompt once in each number of steps, unless that has been done.

        Args:
            name: of what draws.
            load: gives its pipeline.
            all_steps: the numbers.
            seed: of the noises.

        Returns:
            Features, and pixels in 0..255, (pictures, ...), by number of steps.
        """
        files = {steps: self._kept / f"{name}_{steps}_steps_seed_{seed}.safetensors" for steps in all_steps}
        if not all(file.exists() for file in files.values()):
            pipeline, extractor = load(), MobileNetFeatures().to(default_device())
            for steps, file in files.items():
                pictures = draw(pipeline, self._task.prompts, steps, seed=seed)
                pixels = (pictures_to_tensor(pictures) * 255).round().to(torch.uint8).contiguous().cpu()
                save_file({"features": extractor.extract(pictures).cpu(), "pixels": pixels}, file)
        return {steps: load_file(file) for steps, file in files.items()}

    def describe(self, model: str, steps: int, drawn: Tensors) -> Measurement:
        """Say how near a model's pictures are to the teacher's.

        Args:
            model: its name.
            steps: that it took.
            drawn: its features and pixels.

        Returns:
            A row.
        """
        distance = self.judge.distance(drawn["features"])
        products = mirror_products(drawn["pixels"] / 255, self.teachers["pixels"] / 255)
        metrics = {
            DISTANCE: round(distance.value, 2),
            "decisiveness": round(decisiveness(products), 3),
            "top-5 retrieval": round(self.judge.retrieval(drawn["features"]), 3),
        }
        return Measurement(model, steps, metrics, {DISTANCE: (round(distance.low, 2), round(distance.high, 2))})


def flat(row: Measurement) -> dict[str, Any]:
    """A row as a table has it."""
    interval = "{:.1f} to {:.1f}".format(*row.intervals[DISTANCE])
    return {"model": row.model, "steps": row.num_inference_steps, **row.metrics, "interval": interval}


def paired_differences(
    table: pandas.DataFrame, pairs: Sequence[tuple[str, str]], metrics: Sequence[str]
) -> pandas.DataFrame:
    """Compare models that were trained with the same seeds.

    Args:
        table: `model`, `seed`, `steps` and metrics of every student.
        pairs: a model, and the one that it is compared with.
        metrics: by name.

    Returns:
        A row for each pair and number of steps: the mean over seeds of each metric's difference, with Student's 95%
        interval where there are several.
    """
    rows = []
    by_model = table.set_index(["model", "steps", "seed"]).sort_index()
    for model, other in pairs:
        for steps in sorted(set(table["steps"])):
            row = {"way": model, "less": other, "steps": steps}
            for metric in metrics:
                differences = by_model.loc[model, steps][metric] - by_model.loc[other, steps][metric]
                row[metric] = seeds_in_words(differences, "+.3g")
            rows.append(row)
    return pandas.DataFrame(rows)


def write_students(
    name: str,
    students: Sequence[dict[str, Any]],
    pairs: Sequence[tuple[str, str]],
    judge: EmojiJudge,
    details: dict[str, Any],
    folder: Path,
    **more: Any,
) -> None:
    """Keep every student, the controls, differences in pairs of one seed and means over seeds as <name>.json and .md.

    Args:
        name: of the result.
        students: `flat` rows, each with its `seed`.
        pairs: a model, and the one that it is compared with.
        judge: whose controls they are.
        details: what it was measured on.
        folder: that it goes into.
        more: of the JSON file.
    """
    table, controls = pandas.DataFrame(students), [flat(each) for each in judge.controls]
    differences = paired_differences(table, pairs, METRICS)
    write_results(name, differences, details, folder, students=students, controls=controls, **more)
    means = table.groupby(["model", "steps"], sort=False)[list(METRICS)].mean().round(3).reset_index()
    everyone = pandas.concat([pandas.DataFrame(controls)[["model", "steps", *METRICS]], means])
    with (folder / f"{name}.md").open("a", encoding="utf-8") as page:
        page.write(f"\nMeans over seeds:\n\n{markdown(everyone.set_index('model'))}")
