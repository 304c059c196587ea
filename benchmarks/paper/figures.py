"""The figures of arXiv 2511.20410 that need no training, on the embedded emoji teacher.

    python -m benchmarks.paper.figures noise         # Figures 3 and 8: equivalent noise, forward and generated
    python -m benchmarks.paper.figures schemes       # Figure 7: where the sampling schemes put their angles
    python -m benchmarks.paper.figures predictions   # Figure 9: x_0 by scheme and number of steps
    python -m benchmarks.paper.figures pictures --students "TBCM=outputs/quickstart"    # Figure 6: side by side

Each writes PNG and JSON into --output_dir. What takes minutes is kept in --work_dir: run the same command again to
resume. Needs the extras `eval` and `paper`.
"""

import argparse
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from examples.tbcm.mini_teacher.emoji_metrics import SEED

from ..common import ROOT, made_folder
from .noise import draw_noise
from .sampling import draw_predictions, draw_schemes
from .side_by_side import draw_pictures
from .study_report import RESULTS


MIN_PROMPTS = 12
FIGURES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "noise": draw_noise,
    "schemes": draw_schemes,
    "predictions": draw_predictions,
    "pictures": draw_pictures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--prompts", type=int, default=200, help="evaluation prompts that numbers are averaged over")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[4.5, 1.0], help="noise: one column each")
    parser.add_argument("--route_steps", type=int, default=32, help="noise: steps of the trajectories")
    parser.add_argument("--students", nargs="*", default=[], metavar="NAME=FOLDER", help="pictures: what to compare")
    parser.add_argument("--steps", type=int, nargs="+", default=[1], help="pictures: of the students")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "paper_figures")
    parser.add_argument("--output_dir", type=made_folder, default=RESULTS)
    args = parser.parse_args()
    if args.prompts < MIN_PROMPTS:
        parser.error(f"--prompts is {args.prompts}, but has to be at least {MIN_PROMPTS}: some of the first are shown")

    start = time.perf_counter()
    record = {
        **FIGURES[args.figure](args),
        "seed": SEED,
        "seconds": round(time.perf_counter() - start),  # less where a part was found in --work_dir
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    path = args.output_dir / f"{args.figure}.json"
    lines = json.dumps(record, indent=1)
    lines = re.sub(r"\[[-+\s\d.,e]+\]", lambda found: json.dumps(json.loads(found[0])), lines)  # numbers on one line
    path.write_text(lines + "\n", encoding="utf-8")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
