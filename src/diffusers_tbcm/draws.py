"""Randomness keyed by (seed, draw): a run does not depend on how many processes share it."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from .transfer import to_device


def prompt_at(draw: int, num_prompts: int, seed: int) -> int:
    """Say which prompt the run's draw number `draw` sees: every epoch is a permutation of its own.

    Args:
        draw: the run's count of prompts drawn, from 0, over all processes.
        num_prompts: how many prompts there are.
        seed: the run's seed.

    Returns:
        Index of the prompt.
    """
    epoch, position = divmod(draw, num_prompts)
    return int(_epoch_order(epoch, num_prompts, seed)[position])


@lru_cache(maxsize=2)
def _epoch_order(epoch: int, num_prompts: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_prompts)


def draw_generator(draw: int, seed: int, stream: int = 0) -> torch.Generator:
    """Make the CPU generator that everything random about a draw comes from.

    Args:
        draw: the run's count of prompts drawn, from 0, over all processes.
        seed: the run's seed.
        stream: tells what else is counted from 0 in a run, such as its draws from a buffer, from its draws of prompts.

    Returns:
        A generator that depends on these numbers and on nothing else.
    """
    # torch's CPU generator reads 32 bits of its seed: hash the pair into them instead of adding it up.
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, draw, stream]).generate_state(1)[0]))


def per_prompt_generators(
    generator: torch.Generator | list[torch.Generator] | None, batch_size: int
) -> Sequence[torch.Generator | None]:
    """Give every prompt the generator that its random numbers come from.

    Args:
        generator: one per prompt, or one (or None, the global one) that all prompts draw from in turn.
        batch_size: number of prompts.

    Returns:
        `batch_size` generators.

    Raises:
        ValueError: if a list has another length than `batch_size`.
    """
    if not isinstance(generator, list):
        return [generator] * batch_size
    if len(generator) != batch_size:
        raise ValueError(f"`generator` is a list of {len(generator)} generators for a batch of {batch_size} prompts.")
    return generator


def draw_guidance_scale(
    scales: Sequence[float], generators: Sequence[torch.Generator], *, device: torch.device | str | None = None
) -> torch.Tensor:
    """Choose a guidance scale for every draw.

    Args:
        scales: to choose from, each with the same chance.
        generators: one a draw, on the CPU.
        device: where the result lies.

    Returns:
        (draws,), float32.
    """
    picks = [torch.randint(len(scales), (), generator=generator) for generator in generators]
    return to_device(torch.tensor(scales)[torch.stack(picks)], device)


def draw_noise(
    shape: Sequence[int], generators: Sequence[torch.Generator], *, device: torch.device | str | None = None
) -> torch.Tensor:
    """Draw standard normal noise for every draw.

    Args:
        shape: of one draw's.
        generators: one a draw, on the CPU.
        device: where the result lies.

    Returns:
        (draws, *shape), float32.
    """
    return to_device(torch.stack([torch.randn(shape, generator=generator) for generator in generators]), device)
