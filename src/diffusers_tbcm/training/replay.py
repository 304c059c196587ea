"""A shuffled buffer of recordings: the teacher is frozen, so what it generated stays true throughout."""

from __future__ import annotations

from collections import deque

import torch

from ..rows import Recording, TrainingRows


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
