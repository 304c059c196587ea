"""What a training row is, and what rows are taken from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from .text import Text
from .transfer import to_device


@dataclass
class Recording:
    """Points of a teacher's ODE, some places for every prompt.

    Args:
        latents: x_t, (prompts, places, channels, height, width).
        velocity: dx_t/dt, guided, the shape of `latents`.
        timesteps: t in radians, (prompts, places).
        pred_original_sample: the x_0 that they lead to, (prompts, channels, height, width).
        text: of the prompts.
        guidance_scale: classifier-free guidance weight, (prompts,).
    """

    latents: torch.Tensor
    velocity: torch.Tensor
    timesteps: torch.Tensor
    pred_original_sample: torch.Tensor
    text: Text
    guidance_scale: torch.Tensor

    def __len__(self) -> int:
        return self.timesteps.numel()

    def select(self, prompts: torch.Tensor) -> Recording:
        """Keep some of the prompts.

        Args:
            prompts: numbers.

        Returns:
            The recording of those.
        """
        prompts = to_device(prompts, self.guidance_scale.device)
        return Recording(*(getattr(self, field.name)[prompts] for field in fields(Recording)))

    def rows(self, numbers: torch.Tensor | None = None) -> TrainingRows:
        """Take points as training rows.

        Args:
            numbers: which, counted prompt by prompt, (rows,) integers; by default all, prompt by prompt, sharing their
                text.

        Returns:
            The rows, in that order.
        """
        places = self.timesteps.shape[1]
        if numbers is None:
            return TrainingRows(
                latents=self.latents.flatten(0, 1),
                velocity=self.velocity.flatten(0, 1),
                timesteps=self.timesteps.flatten(),
                pred_original_sample=self.pred_original_sample.repeat_interleave(places, dim=0),
                text=self.text,
                guidance_scale=self.guidance_scale.repeat_interleave(places),
            )
        numbers = to_device(numbers, self.timesteps.device)
        prompt, place = numbers // places, numbers % places
        return TrainingRows(
            latents=self.latents[prompt, place],
            velocity=self.velocity[prompt, place],
            timesteps=self.timesteps[prompt, place],
            pred_original_sample=self.pred_original_sample[prompt],
            text=self.text[prompt],
            guidance_scale=self.guidance_scale[prompt],
        )


@dataclass
class TrainingRows:
    """What one training pass sees.

    Args:
        latents: x_t, (rows, channels, height, width).
        velocity: dx_t/dt, guided, the shape of `latents`.
        timesteps: t in radians, (rows,).
        pred_original_sample: the x_0 that the row leads to, the shape of `latents`.
        text: of the prompts; rows are a multiple of them, and consecutive rows share one.
        guidance_scale: classifier-free guidance weight, (rows,).
    """

    latents: torch.Tensor
    velocity: torch.Tensor
    timesteps: torch.Tensor
    pred_original_sample: torch.Tensor
    text: Text
    guidance_scale: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @staticmethod
    def cat(parts: Sequence[TrainingRows]) -> TrainingRows:
        """Put rows with a prompt each together."""
        tensors = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(TrainingRows)
            if field.name != "text"
        }
        return TrainingRows(**tensors, text=Text.cat([part.text for part in parts]))
