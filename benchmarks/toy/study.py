"""All methods on the mixture, and when trajectory rows beat noised rows.

    python -m benchmarks.toy.study          # both tables; some 40 minutes of a quiet core
    python -m benchmarks.toy.study methods  # the first alone

Every finished run is kept in outputs/toy, and a second call goes on where the first was ended. Writes
benchmarks/results/toy_methods.* and toy_rows.*, tables and figures.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pandas
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .. import cdm_mixture
from ..common import RESULTS, ROOT, machine, write_results
from . import report
from .methods import LCM, Consistency, Endpoint, record
from .network import Exact, Network, learn, pretrain, trig
from .training import BATCH_SIZE, Judge, Phase, distil


SEEDS, ROWS, WIDTH, RATE = 3, 2**17, 128, 2e-3
CDM_UPDATES = 1500
RUNS = ROOT / "outputs" / "toy"


@dataclass(frozen=True)
class Method:
    """Where rows lie, and the phases of training on them."""

    places: str
    phases: Callable[[], list[Phase]]


def consistency(**options: Any) -> Callable[[], list[Phase]]:
    return lambda: [Phase(Consistency(**options), 2000, RATE)]


METHODS = {
    "TBCM, endpoint first": Method(
        "trajectory", lambda: [Phase(Endpoint(), 2000, 3e-3), Phase(Consistency(), 1000, 1e-4)]
    ),
    "endpoint alone": Method("trajectory", lambda: [Phase(Endpoint(), 2000, 3e-3), Phase(Endpoint(), 1000, 1e-4)]),
    "TBCM, uniform": Method("trajectory", consistency()),
    "TBCM, prior": Method("trajectory", consistency(weighting="prior")),
    "TBCM, learned": Method("trajectory", consistency(weighting="learned")),
    "sCM, uniform": Method("noised", consistency()),
    "sCM, learned": Method("noised", consistency(weighting="learned")),
    "sCM at TBCM's times": Method("noised, route's times", consistency()),
    "LCM": Method("noised, grid", lambda: [Phase(LCM(), 2000, RATE)]),
    "control: flipped tangent": Method("trajectory", consistency(sign=-1)),
}
FIRST = ("untrained", *METHODS, "CDM")
COMPARED = ("TBCM, uniform", "sCM at TBCM's times")  # they differ in where rows lie, and in nothing else
PICTURED = (
    "untrained",
    "TBCM, endpoint first",
    "TBCM, uniform",
    "sCM, uniform",
    "LCM",
    "CDM",
    "control: flipped tangent",
)
GUIDANCE, SHOWN, ENDS = (1.0, 3.0), 1200, "the ODE's ends"


@dataclass(frozen=True)
class Setting:
    """One student; `teacher` is the updates that the teacher was learned in, 0 for the exact one."""

    method: str
    guidance: float = 1.0
    num_steps: int = 16
    dim: int = 2
    teacher: int = 0
    seed: int = 0

    @property
    def file(self) -> Path:
        method, *numbers = asdict(self).values()
        name = re.sub(r"[^\w ]", "", method).replace(" ", "_")
        return RUNS / ("-".join([name, *map(str, numbers)]) + ".safetensors")

    @property
    def finished(self) -> bool:
        return self.file.with_suffix(".json").is_file()


@cache
def networks(dim: int, teacher: int) -> tuple[nn.Module, Network]:
    """A teacher and the student's start: a learned teacher's copy, or a network fitted to the exact one."""
    if not teacher:
        return Exact(), pretrain(2000, width=WIDTH, dim=dim)
    network = learn(teacher, width=WIDTH, dim=dim)
    return network, network


@cache
def judge_of(guidance: float, dim: int, teacher: int) -> Judge:
    return Judge(networks(dim, teacher)[0], guidance, dim)


def train(setting: Setting) -> Network:
    """Distil the student of a setting."""
    teacher, start = networks(setting.dim, setting.teacher)
    if setting.method == "untrained":
        return start
    if setting.method == "CDM":
        return cdm_mixture.distil(start, "CDM", CDM_UPDATES, setting.seed, guidance_scale=setting.guidance)
    method = METHODS[setting.method]
    recording = record(
        method.places,
        trig(teacher),
        ROWS,
        setting.guidance,
        num_steps=setting.num_steps,
        dim=setting.dim,
        seed=1000 + setting.seed,
    )
    return distil(start, recording, method.phases(), setting.seed)


def student_of(setting: Setting) -> tuple[Network, dict[str, Any]]:
    """The student and its figures, from the folder of runs where they are there."""
    network, figures_file = Network(WIDTH, setting.dim), setting.file.with_suffix(".json")
    if setting.finished:
        network.load_state_dict(load_file(setting.file))
        return network, json.loads(figures_file.read_text())
    begin = time.process_time()
    network = train(setting)
    seconds = time.process_time() - begin
    measured = judge_of(setting.guidance, setting.dim, setting.teacher)(network)
    record_of_run = {**asdict(setting), **measured, "CPU seconds": round(seconds, 1)}
    setting.file.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), setting.file)
    figures_file.write_text(json.dumps(record_of_run))
    print(record_of_run, flush=True)
    return network, record_of_run


def settings_of(study: str, seed: int) -> list[Setting]:
    """The students of a study, for one seed."""
    if study == "methods":
        return [Setting(method, guidance, seed=seed) for guidance in GUIDANCE for method in FIRST]
    return [
        *(Setting(method, guidance, seed=seed) for guidance in (1.0, 3.0, 5.0) for method in COMPARED),
        *(
            Setting(method, guidance, teacher=teacher, seed=seed)
            for teacher in (3000, 300)
            for guidance in GUIDANCE
            for method in COMPARED
        ),
        *(Setting(method, 3.0, dim=dim, seed=seed) for dim in (8, 16) for method in COMPARED),
        *(Setting(COMPARED[0], 3.0, num_steps=steps, seed=seed) for steps in (4, 8)),
    ]


def report_methods(runs: pandas.DataFrame) -> None:
    """Table and scatter of the methods."""
    samples = {}
    for guidance in GUIDANCE:
        judge = judge_of(guidance, 2, 0)
        samples[guidance] = {ENDS: judge.ends[:SHOWN]}
        for setting in (Setting(method, guidance) for method in PICTURED):
            if setting.finished:
                samples[guidance][setting.method] = judge.draw(student_of(setting)[0])[:SHOWN]
    figure = report.plot_samples(samples, [ENDS, *PICTURED], judge.classes[:SHOWN])
    figure.savefig(RESULTS / "toy_methods.png", dpi=100)
    details = {"rows": ROWS, "batch size": BATCH_SIZE, "CDM updates": CDM_UPDATES, **machine(torch.device("cpu"))}
    write_results("toy_methods", report.methods_table(runs), details, runs=json.loads(runs.to_json(orient="records")))


def report_rows(runs: pandas.DataFrame) -> None:
    """Table and curves of trajectory rows against noised rows."""
    cells = runs[["guidance", "dim", "teacher"]].drop_duplicates().itertuples(index=False)
    drifts = {
        tuple(cell): report.drift(trig(networks(cell.dim, cell.teacher)[0]), cell.guidance, cell.dim) for cell in cells
    }
    report.plot_rows(runs, COMPARED).savefig(RESULTS / "toy_rows.png", dpi=90)
    details = {"rows": ROWS, "batch size": BATCH_SIZE, "updates": 2000, **machine(torch.device("cpu"))}
    table = report.rows_table(runs, COMPARED, drifts)
    write_results("toy_rows", table, details, runs=json.loads(runs.to_json(orient="records")))


REPORTS = {"methods": report_methods, "rows": report_rows}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=list(REPORTS), help="both by default")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--finished", action="store_true", help="train nothing, report the runs that are there")
    args = parser.parse_args(argv)
    studies = [args.study] if args.study else list(REPORTS)
    if not args.finished:
        for seed in range(args.seeds):  # every seed of both studies, before the next
            for setting in chain(*(settings_of(study, seed) for study in studies)):
                student_of(setting)
    for study in studies:
        settings = [setting for seed in range(args.seeds) for setting in settings_of(study, seed)]
        runs = [student_of(setting)[1] for setting in settings if setting.finished]
        REPORTS[study](pandas.DataFrame(runs))


if __name__ == "__main__":
    torch.set_num_threads(1)  # of this process alone
    main()
