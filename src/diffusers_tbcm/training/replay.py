"""Training rows and a shuffled buffer of them: the teacher is frozen, so what it generated stays true throughout."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from ..trajectory import TrajectoryOutput
from ..transfer import to_device


@dataclass
class Recording:
    """Teacher trajectories and what they were generated from.

    Args:
        trajectory: of the prompts, (prompts, places, ...).
        prompt_embeds: (prompts, length, dim).
        prompt_attention_mask: 1 for a token, 0 for padding, (prompts, length).
        guidance_scale: classifier-free guidance weight, (prompts,).
    """

    trajectory: TrajectoryOutput
    prompt_embeds: torch.Tensor
    prompt_attention_mask: torch.Tensor
    guidance_scale: torch.Tensor

    def __len__(self) -> int:
        return self.trajectory.timesteps.numel()

    def select(self, prompts: torch.Tensor) -> Recording:
        """Keep some of the prompts.

        Args:
            prompts: numbers.

        Returns:
            The recording of those.
        """
        prompts = to_device(prompts, self.guidance_scale.device)
        trajectory = TrajectoryOutput(
            *(getattr(self.trajectory, field.name)[prompts] for field in fields(TrajectoryOutput))
        )
        return Recording(
            trajectory, self.prompt_embeds[prompts], self.prompt_attention_mask[prompts], self.guidance_scale[prompts]
        )

    def rows(self, numbers: torch.Tensor | None = None) -> TrainingRows:
        """Take points of the trajectories as training rows.

        Args:
            numbers: which, counted trajectory by trajectory, (rows,) integers; by default all, trajectory by
                trajectory, sharing their prompts.

        Returns:
            The rows, in that order.
        """
        trajectory, places = self.trajectory, self.trajectory.timesteps.shape[1]
        if numbers is None:
            return TrainingRows(
                latents=trajectory.latents.flatten(0, 1),
                velocity=trajectory.velocity.flatten(0, 1),
                timesteps=trajectory.timesteps.flatten(),
                pred_original_sample=trajectory.pred_original_sample.repeat_interleave(places, dim=0),
                prompt_embeds=self.prompt_embeds,
                prompt_attention_mask=self.prompt_attention_mask,
                guidance_scale=self.guidance_scale.repeat_interleave(places),
            )
        numbers = to_device(numbers, trajectory.timesteps.device)
        prompt, place = numbers // places, numbers % places
        return TrainingRows(
            latents=trajectory.latents[prompt, place],
            velocity=trajectory.velocity[prompt, place],
            timesteps=trajectory.timesteps[prompt, place],
            pred_original_sample=trajectory.pred_original_sample[prompt],
            prompt_embeds=self.prompt_embeds[prompt],
            prompt_attention_mask=self.prompt_attention_mask[prompt],
            guidance_scale=self.guidance_scale[prompt],
        )


@dataclass
class TrainingRows:
    """Points of teacher trajectories, each with all that a student is trained on there.

    Args:
        latents: x_t, (rows, channels, height, width).
        velocity: the teacher's dx_t/dt, the shape of `latents`.
        timesteps: t in radians, (rows,).
        pred_original_sample: x_0, the end of the row's trajectory, the shape of `latents`.
        prompt_embeds: (prompts, length, dim): a prompt for every row, or one for as many consecutive rows as others.
        prompt_attention_mask: 1 for a token, 0 for padding, (prompts, length).
        guidance_scale: classifier-free guidance weight, (rows,).
    """

    latents: torch.Tensor
    velocity: torch.Tensor
    timesteps: torch.Tensor
    pred_original_sample: torch.Tensor
    prompt_embeds: torch.Tensor
    prompt_attention_mask: torch.Tensor
    guidance_scale: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @staticmethod
    def cat(parts: Sequence[TrainingRows]) -> TrainingRows:
        """Put rows with a prompt each together, the prompts padded to the longest with masked tokens."""
        length = max(part.prompt_embeds.shape[1] for part in parts)
        padded = []
        for part in parts:
            padding = length - part.prompt_embeds.shape[1]
            embeds = torch.nn.functional.pad(part.prompt_embeds, (0, 0, 0, padding))
            mask = torch.nn.functional.pad(part.prompt_attention_mask, (0, padding))
            padded.append(replace(part, prompt_embeds=embeds, prompt_attention_mask=mask))
        return TrainingRows(
            *(torch.cat([getattr(part, field.name) for part in padded]) for field in fields(TrainingRows))
        )


class ReplayBuffer:
    """The latest recordings, whose rows are drawn in random order.

    Neighbours on a trajectory share prompt, noise and picture: a batch that is drawn from many trajectories says more
    than one of few, and rows that are drawn again share the cost of their trajectory. What the buffer holds depends on
    the latest recordings only: a resumed run records them again.

    Args:
        capacity: recordings kept; the oldest gives way.

    Raises:
        ValueError: if `capacity` is not positive.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"`capacity` is {capacity}, but a buffer holds at least one recording.")
        self.recordings: deque[Recording] = deque(maxlen=capacity)

    @property
    def capacity(self) -> int:
        """Recordings kept."""
        return self.recordings.maxlen or 0

    def __len__(self) -> int:
        return sum(map(len, self.recordings))

    def add(self, recording: Recording) -> None:
        """Take in a recording; it may have no prompts left."""
        self.recordings.append(recording)

    def sample(self, num_rows: int, generator: torch.Generator) -> TrainingRows:
        """Draw different rows at random, each with the same chance.

        Args:
            num_rows: rows to draw; all, where there are fewer.
            generator: on the CPU.

        Returns:
            The rows.
        """
        if len(self.recordings) == 1 and num_rows >= len(self):
            return self.recordings[0].rows()
        numbers = torch.randperm(len(self), generator=generator)[:num_rows].sort().values
        parts: list[TrainingRows] = []
        start = 0
        for recording in self.recordings:
            own = numbers[(numbers >= start) & (numbers < start + len(recording))] - start
            start += len(recording)
            if len(own) > 0 or not parts:  # no row of it: its prompts are not to lengthen the others
                parts.append(recording.rows(own))
        return TrainingRows.cat(parts)
