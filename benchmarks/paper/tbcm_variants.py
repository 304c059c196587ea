#!/usr/bin/env python
"""TBCM with the choices of the published code where this project made others: rows of the study's table `extras`.

    python benchmarks/paper/tbcm_variants.py VARIANT ...    # ... are the flags of examples/tbcm/train_tbcm_distill.py

    one_route      all prompts of a batch share a route
    prompt_mask    the unconditional branch reads the padded empty prompt as far as the prompt beside it is long

(A third difference is the row at pi/2, which is left out here: its weight 1 / tan(pi/2) is 0, it gives no gradient.)
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tbcm"))

from distill_args import parse_args
from methods import Method
from objectives import TBCMObjective
from teacher_rows import TeacherRows
from train_tbcm_distill import main

from diffusers_tbcm.data.embeddings import PromptEncoder


class OneRouteRows(TeacherRows):
    """The timesteps of a batch's first prompt are those of all its prompts."""

    def draw_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        size = self.args.train_batch_size
        return super().draw_timesteps(generators[::size]).repeat_interleave(size, 0)


class PromptMaskRows(TeacherRows):
    """The empty prompt has the mask of the prompt, so that guidance also leads away from its padding tokens."""

    def __init__(self, args: argparse.Namespace, *parts: Any, **options: Any) -> None:
        super().__init__(args, *parts, **options)
        if not isinstance(self.encoder, PromptEncoder):
            raise ValueError("prompt_mask needs the text encoder: leave --precompute_embeddings out")
        self.padded_empty_prompt, *_ = self.encoder.pipeline.encode_prompt(
            "", do_classifier_free_guidance=False, device=self.device, max_sequence_length=args.max_sequence_length
        )

    def negative_prompt(self, prompt_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.padded_empty_prompt[:, : prompt_mask.shape[1]], prompt_mask


VARIANTS = {
    "one_route": Method("TBCM, one route a batch", OneRouteRows, TBCMObjective, image_free=True),
    "prompt_mask": Method("TBCM, empty prompt masked as the prompt", PromptMaskRows, TBCMObjective, image_free=True),
}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"The first argument is one of {', '.join(VARIANTS)}.\n\n{__doc__}")
    method = VARIANTS[sys.argv.pop(1)]
    main(parse_args(description=__doc__, method=method), method)
