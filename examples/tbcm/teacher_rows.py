"""Where TBCM's rows come from, steps 1 to 4 of Algorithm 1: a frozen teacher along its own denoising trajectories."""

import argparse
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator

from diffusers_tbcm.brightness import keep_mask
from diffusers_tbcm.prompts import draw_generator, prompt_at
from diffusers_tbcm.replay import Recording
from diffusers_tbcm.trajectory import record_trajectory, sample_timesteps
from diffusers_tbcm.transfer import HostCopy, to_device
from diffusers_tbcm.trigflow import TrigFlowTransformer


Encoder = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]


class TeacherRows:
    """Recordings, numbered over the whole run, each of --train_batch_size prompts for one process.

    Args:
        args: the flags.
        accelerator: says which of the draws are this process's.
        teacher: the frozen network F.
        encoder: embeds a list of prompts: (B, L, D) and their mask (B, L).
        prompts: what to draw from.
        latent_shape: channels, height, width.
        sigma_data: standard deviation of the latents.
        black: the black latent, for the brightness filter; None for no filter.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        teacher: TrigFlowTransformer,
        encoder: Encoder,
        prompts: list[str],
        latent_shape: tuple[int, ...],
        *,
        sigma_data: float,
        black: torch.Tensor | None,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.teacher = teacher
        self.encoder = encoder
        self.prompts = prompts
        self.latent_shape = latent_shape
        self.sigma_data = sigma_data
        self.black = black
        self.guidance_choices = torch.tensor(args.guidance_scales)
        self.negative_embeds, self.negative_mask = encoder([""])

    def numbered(self, first: int, end: int) -> Iterator[tuple[Recording, HostCopy]]:
        """Record number `first` to `end` - 1, --teacher_batch_size prompts at a time.

        With every recording comes which of its prompts the brightness filter keeps, (prompts,), bound for the host.
        """
        args = self.args
        at_once = args.teacher_batch_size // args.train_batch_size
        for start in range(first - first % at_once, end, at_once):
            yield from self.record(range(start, start + at_once))[max(0, first - start) : end - start]

    def draws(self, number: int) -> list[int]:
        """Draw k of the whole run is the same prompt and the same noise however many processes share it."""
        size = self.args.train_batch_size
        first = (number * self.accelerator.num_processes + self.accelerator.process_index) * size
        return list(range(first, first + size))

    def prompt_numbers(self, numbers: range) -> list[int]:
        """Which prompts these recordings are of, in all processes."""
        size = self.args.train_batch_size * self.accelerator.num_processes
        draws = range(numbers.start * size, numbers.stop * size)
        return [prompt_at(draw, len(self.prompts), self.args.seed) for draw in draws]

    def record(self, numbers: range) -> list[tuple[Recording, HostCopy]]:
        args, device = self.args, self.accelerator.device

        # 1. Prompts
        draws = [draw for number in numbers for draw in self.draws(number)]
        generators = [draw_generator(draw, args.seed) for draw in draws]
        prompts = [self.prompts[prompt_at(draw, len(self.prompts), args.seed)] for draw in draws]
        prompt_embeds, prompt_mask = self.encoder(prompts)
        picks = [torch.randint(len(self.guidance_choices), (), generator=generator) for generator in generators]
        guidance_scale = to_device(self.guidance_choices[torch.stack(picks)], device)
        noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])

        # 2. Timesteps
        timesteps = sample_timesteps(
            args.sampling_scheme,
            len(draws),
            args.route_steps,
            shift=args.flow_shift,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            sigma_data=self.sigma_data,
            generator=generators,
            device=device,
        )

        # 3. The teacher's trajectory
        trajectory = record_trajectory(
            self.teacher,
            to_device(noise, device),
            timesteps,
            prompt_embeds,
            self.negative_embeds,
            guidance_scale,
            prompt_attention_mask=prompt_mask,
            negative_prompt_attention_mask=self.negative_mask,
            sigma_data=self.sigma_data,
        )

        # 4. Brightness filter
        keep = torch.ones(len(draws), dtype=torch.bool)
        if self.black is not None:
            keep = keep_mask(
                trajectory.pred_original_sample,
                self.black,
                args.brightness_threshold,
                sigma_data=self.sigma_data,
                hard=args.brightness_hard,
                generator=generators,
            )
        recording = Recording(trajectory, prompt_embeds, prompt_mask, guidance_scale)
        size = args.train_batch_size
        batches = zip(torch.arange(len(draws)).split(size), keep.split(size), strict=True)
        return [(recording.select(batch), HostCopy(kept)) for batch, kept in batches]
