#!/usr/bin/env python
"""TBCM with the choices of the published code where this project made others: rows of the study's table `extras`.

    python -m benchmarks.paper.tbcm_variants VARIANT ...    # ... are the flags of examples/tbcm/train_tbcm_distill.py

    one_route      all prompts of a batch share a route
    prompt_mask    the unconditional branch reads the padded empty prompt as far as the prompt beside it is long

Each replaces what the script calls in one of its steps. (A third difference is the row at pi/2, which is left out
here: its weight 1 / tan(pi/2) is 0, it gives no gradient.)
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

from diffusers_tbcm.data.embeddings import UNCONDITIONAL, PromptEncoder
from diffusers_tbcm.rows import Recording
from diffusers_tbcm.text import Text
from diffusers_tbcm.training.consistency import ConsistencyDistillation
from diffusers_tbcm.training.launch import launch
from diffusers_tbcm.training.settings import parse_settings
from diffusers_tbcm.trajectory import record_trajectory, sample_timesteps
from diffusers_tbcm.trigflow import TrigFlowTransformer
from examples.tbcm import train_tbcm_distill as script


def one_route(settings: script.TBCMSettings) -> AbstractContextManager[object]:
    """The timesteps of a batch's first prompt are those of all its prompts."""
    size = settings.train_batch_size

    def shared(
        scheme: str, count: int, steps: int, *, generator: list[torch.Generator], **options: Any
    ) -> torch.Tensor:
        timesteps = sample_timesteps(scheme, count // size, steps, generator=generator[::size], **options)
        return timesteps.repeat_interleave(size, 0)

    return patch.multiple(script, METHOD="TBCM, one route a batch", sample_timesteps=shared)


def prompt_mask(settings: script.TBCMSettings) -> AbstractContextManager[object]:
    """The empty prompt has the mask of the prompt, so that guidance also leads away from its padding tokens."""
    empty_prompt: list[torch.Tensor] = []

    class WithPaddedPrompt(ConsistencyDistillation):
        def __init__(self, *parts: Any, **options: Any) -> None:
            super().__init__(*parts, **options)
            if not isinstance(self.encode, PromptEncoder):
                raise ValueError("prompt_mask needs the text encoder: leave --precompute_embeddings out")
            padded, *_ = self.encode.pipeline.encode_prompt(
                UNCONDITIONAL,
                do_classifier_free_guidance=False,
                device=self.run.device,
                max_sequence_length=settings.max_sequence_length,
            )
            empty_prompt[:] = [padded]

    def record(
        teacher: TrigFlowTransformer,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        text: Text,
        negative_text: Text,
        guidance_scale: torch.Tensor,
    ) -> Recording:
        padded = empty_prompt[0][:, : text.mask.shape[1]].expand(len(text), -1, -1)
        return record_trajectory(teacher, noise, timesteps, text, Text(padded, text.mask), guidance_scale)

    return patch.multiple(
        script,
        METHOD="TBCM, empty prompt masked as the prompt",
        ConsistencyDistillation=WithPaddedPrompt,
        record_trajectory=record,
    )


VARIANTS: dict[str, Callable[[script.TBCMSettings], AbstractContextManager[object]]] = {
    "one_route": one_route,
    "prompt_mask": prompt_mask,
}


def main(argv: Sequence[str] | None = None) -> None:
    name, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in VARIANTS:
        sys.exit(f"The first argument is one of {', '.join(VARIANTS)}.\n\n{__doc__}")
    settings = parse_settings(script.TBCMSettings, flags, description=__doc__)
    with VARIANTS[name](settings):
        launch(script.train, settings)


if __name__ == "__main__":
    main()
