#!/usr/bin/env python
"""CDM without one of its ideas: rows of `benchmarks.cdm_emoji`'s ablations.

    python -m benchmarks.cdm_variants VARIANT ...    # ... are the flags of examples/tbcm/train_cdm.py

    fixed_schedule    every rollout takes four even steps, as the student is drawn
    on_trajectory     the CDM term is taken at the rollout's own point, where the DM term is, with another noise

Each replaces what the script calls in one of its steps. Terms are left out by the script's own weights.
"""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

from diffusers_tbcm.flow import shift_sigmas
from diffusers_tbcm.rows import TrainingRows
from diffusers_tbcm.scheduling_flow import even_sigmas
from diffusers_tbcm.training.launch import launch
from diffusers_tbcm.training.run import Run
from diffusers_tbcm.training.settings import parse_settings
from examples.tbcm import train_cdm as script


FIXED_STEPS = 4


def fixed_schedule() -> AbstractContextManager[object]:
    def even(generator: torch.Generator, *, shift: float, **_: Any) -> torch.Tensor:
        return shift_sigmas(torch.tensor([*even_sigmas(FIXED_STEPS), 0.0]), shift)

    return patch.multiple(script, METHOD="CDM, fixed schedule", draw_sigmas=even)


def on_trajectory() -> AbstractContextManager[object]:
    def where_it_is(run: Run, rows: TrainingRows) -> tuple[torch.Tensor, torch.Tensor]:
        return rows.latents, rows.timesteps

    return patch.multiple(script, METHOD="CDM, on the trajectory", off_rollout=where_it_is)


VARIANTS = {"fixed_schedule": fixed_schedule, "on_trajectory": on_trajectory}


def main(argv: Sequence[str] | None = None) -> None:
    name, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in VARIANTS:
        sys.exit(f"The first argument is one of {', '.join(VARIANTS)}.\n\n{__doc__}")
    settings = parse_settings(script.CDMSettings, flags, description=__doc__)
    with VARIANTS[name]():
        launch(script.train, settings)


if __name__ == "__main__":
    main()
