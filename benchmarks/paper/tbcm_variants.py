#!/usr/bin/env python
"""TBCM with the choices of the published code where this project made others, and with a discriminator.

    python benchmarks/paper/tbcm_variants.py VARIANT ...    # ... are the flags of examples/tbcm/train_tbcm_distill.py

    one_route      all prompts of a batch share a route
    prompt_mask    the unconditional branch reads the padded empty prompt as far as the prompt beside it is long
    adversarial    Sana-Sprint's discriminator beside TBCM's loss; what it takes for real is the end of the teacher's
                   trajectory, so that there is still no picture; its flags are those of train_sana_sprint.py

(A third difference, the row at pi/2 that is left out here, changes nothing: its weight 1 / tan(pi/2) is 0.)
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tbcm"))

from adversarial_objective import AdversarialObjective
from distill_args import parse_args
from methods import Method
from objectives import TBCMObjective
from teacher_rows import TeacherRows
from train_tbcm_distill import main

from diffusers_tbcm.embeddings import PromptEncoder


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


class AdversarialTBCMObjective(AdversarialObjective, TBCMObjective):
    """TBCM's loss with its schedule of r, and the discriminator's; there is no endpoint warm-up."""

    def __init__(self, args: argparse.Namespace, *parts: Any, **options: Any) -> None:
        super().__init__(args, *parts, **options)
        self.rows_per_draw = args.train_batch_size * (args.route_steps - 1)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        TBCMObjective.add_flags(parser)
        AdversarialObjective.add_discriminator_flags(parser)

    @staticmethod
    def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        TBCMObjective.check_flags(parser, args)
        AdversarialObjective.check_flags(parser, args)
        if args.endpoint_warmup_steps > 0:
            parser.error(f"--endpoint_warmup_steps is {args.endpoint_warmup_steps}: the discriminator goes without")

    @staticmethod
    def describe(args: argparse.Namespace) -> dict[str, object]:
        return AdversarialObjective.describe(args) | TBCMObjective.describe(args)


VARIANTS = {
    "one_route": Method("TBCM, one route a batch", OneRouteRows, TBCMObjective, image_free=True),
    "adversarial": Method("TBCM with a discriminator", TeacherRows, AdversarialTBCMObjective, image_free=True),
    "prompt_mask": Method("TBCM, empty prompt masked as the prompt", PromptMaskRows, TBCMObjective, image_free=True),
}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"The first argument is one of {', '.join(VARIANTS)}.\n\n{__doc__}")
    method = VARIANTS[sys.argv.pop(1)]
    main(parse_args(description=__doc__, method=method), method)
