"""The recordings of a run in order, each process its share of every one."""

import argparse
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator

from diffusers_tbcm.data.prompts import prompt_at
from diffusers_tbcm.text import Text
from diffusers_tbcm.training.replay import Recording
from diffusers_tbcm.transfer import HostCopy, to_device
from diffusers_tbcm.trigflow import TrigFlowTransformer


Encoder = Callable[[list[str]], Text]


class RowSource:
    """What a method's training rows come from: `teacher_rows.TeacherRows` or one of `image_rows`.

    Args:
        args: the flags.
        accelerator: the run's.
        teacher: the frozen network F.
        encoder: embeds a list of prompts: (B, L, D) and their mask (B, L).
        num_prompts: how many prompts, or pictures, there are to draw from.
        latent_shape: channels, height, width.
        sigma_data: standard deviation of the latents.
    """

    rows_per_prompt: int
    filters: bool  # whether a prompt may be dropped

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        teacher: TrigFlowTransformer,
        encoder: Encoder,
        num_prompts: int,
        latent_shape: tuple[int, int, int],
        sigma_data: float,
    ) -> None:
        self.args = args
        self.device = accelerator.device
        self.teacher = teacher
        self.encoder = encoder
        self.num_prompts = num_prompts
        self.latent_shape = latent_shape
        self.sigma_data = sigma_data
        self.guidance_choices = torch.tensor(args.guidance_scales)
        negative = encoder([""])
        self.negative_embeds, self.negative_mask = negative.embeds, negative.mask

    def draw_guidance_and_noise(self, generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        """Give every draw its guidance scale, (draws,), and its noise, (draws, channels, height, width)."""
        picks = [torch.randint(len(self.guidance_choices), (), generator=generator) for generator in generators]
        noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])
        return to_device(self.guidance_choices[torch.stack(picks)], self.device), to_device(noise, self.device)

    def record(self, draws: list[int]) -> tuple[Recording, torch.Tensor]:
        """Make the rows of some draws, numbered over the whole run, and say which to keep, (draws,)."""
        raise NotImplementedError


class RowStream:
    """Recordings, numbered over the whole run, each of --train_batch_size prompts for one process.

    Args:
        args: the flags.
        accelerator: says which of the draws are this process's.
        source: makes the rows.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, source: RowSource) -> None:
        self.args = args
        self.accelerator = accelerator
        self.source = source

    def numbered(self, first: int, end: int) -> Iterator[tuple[Recording, HostCopy]]:
        """Record number `first` to `end` - 1, --teacher_batch_size prompts at a time.

        With every recording comes which of its prompts are kept, (prompts,), bound for the host.
        """
        at_once = self.args.teacher_batch_size // self.args.train_batch_size
        for start in range(first - first % at_once, end, at_once):
            yield from self.record(range(start, start + at_once))[max(0, first - start) : end - start]

    def draws(self, number: int) -> list[int]:
        """Draw k of the whole run is the same prompt and the same noise however many processes share it."""
        size = self.args.train_batch_size
        first = (number * self.accelerator.num_processes + self.accelerator.process_index) * size
        return list(range(first, first + size))

    def prompt_numbers(self, numbers: range) -> list[int]:
        """Which prompts, or pictures, these recordings are of, in all processes."""
        size = self.args.train_batch_size * self.accelerator.num_processes
        draws = range(numbers.start * size, numbers.stop * size)
        return [prompt_at(draw, self.source.num_prompts, self.args.seed) for draw in draws]

    def record(self, numbers: range) -> list[tuple[Recording, HostCopy]]:
        draws = [draw for number in numbers for draw in self.draws(number)]
        recording, keep = self.source.record(draws)
        size = self.args.train_batch_size
        batches = zip(torch.arange(len(draws)).split(size), keep.split(size), strict=True)
        return [(recording.select(batch), HostCopy(kept)) for batch, kept in batches]
