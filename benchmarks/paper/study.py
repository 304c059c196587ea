"""The tables of arXiv 2511.20410 that need training, on the embedded emoji teacher, and our own choices.

    python -m benchmarks.paper.study table2 --train_data_dir PICTURES    # LCM, sCM, Sana-Sprint, TBCM at 1, 2, 4 steps
    python -m benchmarks.paper.study table2_equal_time --train_data_dir PICTURES    # the same, trained equally long
    python -m benchmarks.paper.study table3 --train_data_dir PICTURES    # their time a row and memory
    python -m benchmarks.paper.study table4      # sampling schemes
    python -m benchmarks.paper.study table5      # steps of a route
    python -m benchmarks.paper.study table6      # the tangent's final ratio
    python -m benchmarks.paper.study table7      # warm-up against warm-up and cooldown
    python -m benchmarks.paper.study extras      # shuffled rows, norm of the tangent, EMA, tbcm_variants.py
    python -m benchmarks.paper.study guidance --max_train_steps 1000    # the quickstart's flags, less guided
    python -m benchmarks.paper.study progress --max_train_steps 2400 --train_data_dir PICTURES    # over the training

PICTURES is what examples/tbcm/mini_teacher/emoji_data.py writes. Every method trains on 30 rows a step, with one
optimiser and schedule. Runs and their measurements are kept in --work_dir and shared by the tables: the same command
continues what was interrupted, and does nothing twice. Writes benchmarks/paper/results/<table>.json, .md and .png; for
another --teacher, such as make_fashion_teacher.py's, <table>_<its folder's name>.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from diffusers_tbcm.evaluation.features import NUM_COMPONENTS
from diffusers_tbcm.evaluation.metrics import bootstrap, frechet_distance
from examples.tbcm.mini_teacher.emoji_metrics import REFERENCE_FILE

from ..common import EMBEDDED_TEACHER, default_device, machine, made_folder
from .study_report import RESULTS, report
from .study_runs import ROWS_PER_STEP, Setting, Study


TBCM = "TBCM"
METHODS = {
    "LCM": Setting("lcm"),
    "sCM": Setting("scm"),
    "Sana-Sprint": Setting("sana_sprint"),
    TBCM: Setting(),
}
QUICKSTART = {  # its flags where they differ from the tables'
    "replay_buffer_size": 64,
    "learning_rate": 3e-4,
    "lr_warmup_steps": 50,
    "endpoint_warmup_steps": 0.7,
    "tangent_warmup_steps": 0,
    "tangent_cooldown_start_step": 0.8,
}
AS_MEASURED = {"endpoint_loss_type": "l2"}  # which was the only one then; no run's name tells
ALL_CHECKPOINTS = {"checkpointing_steps": 0.0833, "checkpoints_total_limit": False, "logging_steps": 50}
TABLES = {
    "table2": METHODS,  # at equal rows
    "table2_equal_time": METHODS,
    "table3": METHODS,
    "table4": {
        "random": Setting(flags={"sampling_scheme": "random"}),
        "logit_normal": Setting(flags={"sampling_scheme": "logit_normal"}),
        "reference": Setting(),
    },
    "table5": {  # 30, 28, 30 and 31 rows a step
        "4 route steps": Setting(flags={"route_steps": 4, "train_batch_size": 10, "teacher_batch_size": 20}),
        "8 route steps": Setting(flags={"route_steps": 8, "train_batch_size": 4}),
        "16 route steps": Setting(),
        "32 route steps": Setting(flags={"route_steps": 32, "train_batch_size": 1}),
    },
    "table6": {
        "final ratio 0.25": Setting(flags={"tangent_final_ratio": 0.25}),
        "final ratio 0.5": Setting(flags={"tangent_final_ratio": 0.5}),
        "final ratio 0.75": Setting(),
        "final ratio 1": Setting(flags={"tangent_final_ratio": 1}),
    },
    "table7": {
        "warm-up to 0.75": Setting(flags={"tangent_cooldown_start_step": -1}),
        "warm-up to 1": Setting(flags={"tangent_cooldown_start_step": -1, "tangent_final_ratio": 1}),
        "warm-up to 1, cooldown to 0.75": Setting(),
    },
    "extras": {
        "the tables' setting": Setting(),
        "rows shuffled": Setting(flags={"replay_buffer_size": 64}),
        "one route a batch": Setting(variant="one_route"),
        "empty prompt masked as the prompt": Setting(variant="prompt_mask"),
        "resolution-invariant norm": Setting(flags={"tangent_resolution_invariant": True}),
        "no EMA": Setting(flags={"use_ema": False}),
    },
    "guidance": {
        "guidance 4 to 5": Setting(flags=QUICKSTART, common=AS_MEASURED),
        "guidance 1.5 to 2.5": Setting(flags={**QUICKSTART, "guidance_scales": [1.5, 2.0, 2.5]}, common=AS_MEASURED),
    },
    "progress": {
        "TBCM, the quickstart's flags": Setting(flags={**QUICKSTART, **ALL_CHECKPOINTS}, common=AS_MEASURED),
        TBCM: Setting(flags=ALL_CHECKPOINTS),
        "sCM": Setting("scm", ALL_CHECKPOINTS),
    },
}
UNPAIRED = ("table3", "guidance", "progress")  # the others are shown with differences at one step
COST_STEPS = 60  # of the short runs that tell what a row costs, and so what is equal time


def steps_in_equal_time(steps: int, ms_per_row: float, reference_ms_per_row: float) -> int:
    """How many steps fit into the time of `steps` of the reference."""
    return max(1, round(steps * reference_ms_per_row / ms_per_row))


def measure_costs(settings: Mapping[str, Setting], seeds: Sequence[int], study: Study) -> list[dict[str, Any]]:
    """Short runs, one after another, for time a row and peak memory; seeds outside, so that all meet the same load."""
    # Encodes the pictures, whose time and memory are then no method's.
    study.train(Setting("scm"), 1, 0)
    return [
        {"setting": name, "seed": seed, "train steps": COST_STEPS, **study.train(setting, COST_STEPS, seed)}
        for seed in seeds
        for name, setting in settings.items()
    ]


def run(table: str, name: str, setting: Setting, steps: int, seed: int, study: Study) -> list[dict[str, Any]]:
    """Train and measure a student: a record for each number of inference steps or checkpoint."""
    costs = study.train(setting, steps, seed)
    rate = setting.all_flags(steps, seed)["learning_rate"]
    record = {"setting": name, "seed": seed, "train steps": steps, "learning rate": rate, **costs}
    measure = study.measure_checkpoints if table == "progress" else study.measure_student
    records = [{**record, **row} for row in measure(setting, steps, seed)]
    print(f"{table}: {name}, seed {seed}, is trained and measured", flush=True)
    return records


def steps_of(
    table: str, settings: Mapping[str, Setting], steps: int, seeds: Sequence[int], study: Study
) -> dict[str, int]:
    """How long each setting trains: equally many steps, or equally long as TBCM does."""
    if table != "table2_equal_time":
        return dict.fromkeys(settings, steps)
    costs = measure_costs({TBCM: METHODS[TBCM], **settings}, seeds, study)
    per_row = {name: mean(cost["ms / row"] for cost in costs if cost["setting"] == name) for name in (TBCM, *settings)}
    return {name: steps_in_equal_time(steps, per_row[name], per_row[TBCM]) for name in settings}


def collect(
    table: str, settings: Mapping[str, Setting], all_steps: Mapping[str, int], seeds: Sequence[int], study: Study
) -> list[dict[str, Any]]:
    """Everything that a table needs; seeds outside, so that a table that is not finished has all settings."""
    if table == "table3":
        return measure_costs(settings, seeds, study)
    records = []
    for seed in seeds:
        for name, setting in settings.items():
            records += run(table, name, setting, all_steps[name], seed, study)
    scales = sorted({setting.guidance_scale for setting in settings.values()})
    for name, rows in study.measure_teacher(scales).items():
        records += [{"setting": name, **row} for row in rows]
    return records


def differences(
    settings: Mapping[str, Setting], all_steps: Mapping[str, int], seeds: Sequence[int], study: Study
) -> list[dict[str, Any]]:
    """How much lower each setting's FD is at one step than without training, and than TBCM's as the paper has it.

    FD is measured to the teacher's training pictures and to the pictures that the teacher draws itself. All draw the
    same prompts from the same noise, so that differences are known better than the distances: means over seeds, with
    the 95% interval of a paired bootstrap over prompts.
    """
    features = {
        name: [study.student_features(setting, all_steps[name], seed) for seed in seeds]
        for name, setting in settings.items()
    }
    against = {"untrained student": [study.untrained_features()] * len(seeds)}
    against |= {name: features[name] for name, setting in settings.items() if setting == Setting()}

    def difference(
        reference: tuple[torch.Tensor, torch.Tensor],
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        index: torch.Tensor,
    ) -> float:
        distance = partial(frechet_distance, *reference)
        return mean(distance(one[index]) - distance(other[index]) for one, other in pairs)

    rows = []
    for name in features:
        row: dict[str, Any] = {"setting": name}
        for measured, reference in study.references.items():
            for other, baseline in against.items():
                if name != other:
                    pairs = list(zip(features[name], baseline, strict=True))
                    estimate = bootstrap(partial(difference, reference, pairs), study.prompts)
                    row[f"{measured} less that of: {other}"] = list(estimate)
        rows.append(row)
    return rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--teacher", type=Path, default=EMBEDDED_TEACHER, help="folder such as the embedded teacher's")
    parser.add_argument("--train_data_dir", type=Path, help="pictures for the methods that train on them")
    parser.add_argument("--settings", nargs="+", help="part of the table, by name; default: all of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_train_steps", type=int, default=240)
    parser.add_argument("--prompts", type=int, default=500, help="that the students are measured on")
    parser.add_argument("--work_dir", type=Path, help="of the runs, some 100 MB each; default: runs/study/<teacher>")
    parser.add_argument("--output_dir", type=made_folder, default=RESULTS)
    args = parser.parse_args(argv)
    if args.max_train_steps < 1:
        parser.error(f"--max_train_steps is {args.max_train_steps}: it has to be positive")
    if args.prompts <= NUM_COMPONENTS:
        parser.error(f"--prompts is {args.prompts}: the Frechet distance takes more than {NUM_COMPONENTS} pictures")
    args.settings = args.settings or list(TABLES[args.table])
    for name in args.settings:
        if name not in TABLES[args.table]:
            parser.error(f"--settings names {name!r}, {args.table} has {', '.join(map(repr, TABLES[args.table]))}")
    on_pictures = [name for name in args.settings if TABLES[args.table][name].needs_pictures]
    if on_pictures and (args.train_data_dir is None or not args.train_data_dir.is_dir()):
        parser.error(
            f"{args.table} trains {', '.join(on_pictures)} on pictures, --train_data_dir is {args.train_data_dir}:"
            " give the folder that examples/tbcm/mini_teacher/emoji_data.py writes"
        )
    if not (args.teacher / REFERENCE_FILE).is_file():
        parser.error(f"--teacher is {args.teacher}: it takes a folder with a {REFERENCE_FILE}")
    args.work_dir = args.work_dir or Path("runs/study") / args.teacher.name
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    study = Study(args.teacher, args.work_dir, args.prompts, args.train_data_dir)
    settings = {name: TABLES[args.table][name] for name in args.settings}
    all_steps = steps_of(args.table, settings, args.max_train_steps, args.seeds, study)
    records = collect(args.table, settings, all_steps, args.seeds, study)
    details = {
        "teacher": args.teacher.name,
        "seeds": args.seeds,
        "max_train_steps": args.max_train_steps,
        "rows a step": ROWS_PER_STEP,
        "prompts": args.prompts,
        **machine(default_device()),
    }
    flags = {name: setting.all_flags(all_steps[name], args.seeds[0]) for name, setting in settings.items()}
    compared = [] if args.table in UNPAIRED else differences(settings, all_steps, args.seeds, study)
    name = args.table if args.teacher == EMBEDDED_TEACHER else f"{args.table}_{args.teacher.name}"
    report(name, records, compared, details, flags, args.output_dir)


if __name__ == "__main__":
    main()
