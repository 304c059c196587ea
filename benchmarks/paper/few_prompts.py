"""The paper's Tables 2, 4, 6 and 7 on the quickstart's 24 prompts, judged by the teacher's own pictures of them.

    python -m benchmarks.paper.few_prompts table2    # LCM, sCM, Sana-Sprint, TBCM
    python -m benchmarks.paper.few_prompts table4    # sampling schemes
    python -m benchmarks.paper.few_prompts table6    # the tangent's final ratio
    python -m benchmarks.paper.few_prompts table7    # warm-up against warm-up and cooldown
    python -m benchmarks.paper.few_prompts rates     # the methods of Table 2 at a lower learning rate

The settings are those of `study`, but every time counts alike in the consistency loss, and few prompts let a student
of some minutes come near its teacher. The methods that train on pictures are given the teacher's own of the same
prompts, from noises of their own. Runs and pictures are kept in --work_dir and shared by the tables. Writes
benchmarks/paper/results/few_<table>.json and .md: each setting less the paper's TBCM in pairs of one seed, and every
student. Students that are in the file already, trained with the same flags, stay: seeds may be added one by one, on
other machines too.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas
from diffusers import SanaPipeline
from tqdm.auto import tqdm

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.files import read_json
from examples.tbcm.quickstart import TEACHER_STEPS, Task, draw, few

from ..common import EMBEDDED_TEACHER, default_device, machine, made_folder
from ..emoji_judge import EmojiJudge, flat, write_students
from .study import METHODS, TABLES, TBCM
from .study_report import RESULTS
from .study_runs import Setting, Study


SHOWN = {table: TABLES[table] for table in ("table2", "table4", "table6", "table7")}
SHOWN["rates"] = {
    **{f"{name} at 5e-5": replace(METHODS[name], flags={"learning_rate": 5e-5}) for name in METHODS},
    TBCM: METHODS[TBCM],
}
ROWS_PER_STEP = 60
COMMON = {"learning_rate": 2e-4, "loss_weighting": "uniform"}
OF_METHOD = {
    "tbcm": {**COMMON, "train_batch_size": 4},
    "scm": {**COMMON, "train_batch_size": ROWS_PER_STEP},
    "sana_sprint": {**COMMON, "train_batch_size": ROWS_PER_STEP},
    "lcm": {"learning_rate": COMMON["learning_rate"], "train_batch_size": ROWS_PER_STEP},
}
PICTURES, PICTURES_SEED = 40, 9876  # of each prompt, to train on


def settings_of(table: str) -> dict[str, Setting]:
    """A table's settings, as they are trained here."""
    return {name: replace(setting, common=OF_METHOD[setting.method]) for name, setting in SHOWN[table].items()}


def draw_pictures(task: Task, folder: Path, each: int) -> None:
    """Let the teacher draw pictures of the training prompts, and keep them with their prompts as captions."""
    captions = folder / "metadata.jsonl"
    if captions.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    teacher = SanaPipeline.from_pretrained(EMBEDDED_TEACHER).to(default_device())
    prompts = task.training * each
    names = [f"{number:05}.png" for number in range(len(prompts))]
    for name, picture in zip(names, draw(teacher, prompts, TEACHER_STEPS, seed=PICTURES_SEED), strict=True):
        picture.save(folder / name)
    lines = [{"file_name": name, "text": prompt} for name, prompt in zip(names, prompts, strict=True)]
    captions.write_text(pandas.DataFrame(lines).to_json(orient="records", lines=True), encoding="utf-8")


def kept_students(file: Path, flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the students of a result.

    Args:
        file: the result; it may not exist.
        flags: of all settings, by name.

    Returns:
        Those whose setting has the same flags there.
    """
    if not file.exists():
        return []
    result = read_json(file)
    same = {name for name in flags if result["flags"].get(name) == flags[name]}
    return [student for student in result["students"] if student["model"] in same]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=SHOWN)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_train_steps", type=int, default=400, help=f"of {ROWS_PER_STEP} rows")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of each prompt, to train on")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/few_prompts"))
    parser.add_argument("--output_dir", type=made_folder, default=RESULTS)
    args = parser.parse_args(argv)
    task, settings = few(), settings_of(args.table)
    pictures = args.work_dir / "pictures"
    study = Study(EMBEDDED_TEACHER, args.work_dir, len(task.prompts), pictures, task.prompts_file)
    judge = EmojiJudge(task, args.work_dir / "drawn")
    if any(setting.needs_pictures for setting in settings.values()):
        draw_pictures(task, pictures, args.pictures)

    file = args.output_dir / f"few_{args.table}.json"
    flags = {name: setting.all_flags(args.max_train_steps, seed=0) for name, setting in settings.items()}
    for each in flags.values():
        del each["seed"]
    students = kept_students(file, flags)
    done = {(student["seed"], student["model"]) for student in students}
    seeds = sorted({*args.seeds, *(seed for seed, _ in done)})
    for seed in seeds:
        for name, setting in tqdm(settings.items(), desc=f"seed {seed}"):
            if (seed, name) in done:
                continue
            study.train(setting, args.max_train_steps, seed)
            folder = study.run_folder(setting, args.max_train_steps, seed)
            drawn = judge.draw(folder.name, partial(SanaTBCMPipeline.from_pretrained, folder))
            students += [{"seed": seed, **flat(judge.describe(name, *of_steps))} for of_steps in drawn.items()]

    (reference,) = (name for name, setting in SHOWN[args.table].items() if setting == Setting())
    pairs = [(name, reference) for name in settings if name != reference]
    details = {
        "pictures": len(task.prompts),
        "seeds": seeds,
        "max_train_steps": args.max_train_steps,
        "rows a step": ROWS_PER_STEP,
        **machine(default_device()),
    }
    write_students(file.stem, students, pairs, judge, details, args.output_dir, flags=flags)


if __name__ == "__main__":
    main()
