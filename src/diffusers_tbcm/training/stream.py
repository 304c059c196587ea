"""What a run trains on, micro-step by micro-step: recordings made ahead of time, kept in a buffer, drawn from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import torch

from ..draws import draw_generator, prompt_at
from ..rows import Recording, TrainingRows
from ..transfer import HostCopy
from .replay import ReplayBuffer


Record = Callable[[list[int]], tuple[Recording, torch.Tensor]]


class RowStream:
    """The recordings of a run in order, each process its share of every one, and the rows of every micro-step.

    Draw k of the whole run is the same prompt and the same noise however many processes share it.

    Args:
        record: makes the recording of some draws, numbered over the whole run, and says which of their prompts to
            keep, (draws,) booleans.
        rows_per_prompt: places of a recording.
        num_prompts: how many prompts, or pictures, there are to draw from.
        batch_size: prompts per process and micro-step.
        recorded_at_once: prompts per process that `record` is called for, a multiple of `batch_size`.
        buffer_size: prompts per process whose rows are kept; 0 for those of one micro-step, which are all used.
        replay_steps: micro-steps per recording.
        ahead: recordings made before they are needed, so that a GPU has work whenever the host waits for a result.
        seed: the run's.
        num_processes: how many share the run.
        process_index: this process among them.
    """

    def __init__(
        self,
        record: Record,
        *,
        rows_per_prompt: int,
        num_prompts: int,
        batch_size: int,
        recorded_at_once: int,
        buffer_size: int,
        replay_steps: int,
        ahead: int,
        seed: int,
        num_processes: int,
        process_index: int,
    ) -> None:
        self.record = record
        self.rows_per_prompt = rows_per_prompt
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.at_once = recorded_at_once // batch_size
        self.replay_steps = replay_steps
        self.ahead = ahead
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.buffer = ReplayBuffer(max(1, buffer_size // batch_size))
        self.dropped = 0  # prompts of the latest micro-step's recording
        self.number = 0  # recordings taken so far
        self._waiting: deque[tuple[Recording, HostCopy]] = deque()
        self._recordings: Iterator[tuple[Recording, HostCopy]] = iter(())

    @property
    def rows_per_micro_step(self) -> int:
        """Rows that a process trains on in a micro-step where none is dropped."""
        return self.batch_size * self.rows_per_prompt

    @property
    def prompts_per_recording(self) -> int:
        """Prompts of a recording, in all processes."""
        return self.batch_size * self.num_processes

    def start(self, micro_step: int, last_micro_step: int) -> None:
        """Go to a place in the run; the buffer's recordings are made again.

        Args:
            micro_step: the next one.
            last_micro_step: where the run ends.
        """
        self.number = -(-micro_step // self.replay_steps)
        first = max(0, self.number - self.buffer.capacity)
        self._recordings = self._numbered(first, -(-last_micro_step // self.replay_steps))
        self.prefetch()
        for _ in range(self.number - first):
            self._take()

    def rows(self, micro_step: int) -> tuple[TrainingRows, int]:
        """Give a micro-step's rows.

        Args:
            micro_step: over the whole run, in order.

        Returns:
            The rows, and how many of them count: none, where every prompt was dropped and the rows only keep this
            process in step with the others.
        """
        self.dropped = 0
        if micro_step % self.replay_steps == 0:
            self._take()
            self.number += 1
            self.dropped = self.batch_size - len(self.buffer.recordings[-1]) // self.rows_per_prompt
        generator = draw_generator(self.draw(micro_step), self.seed, stream=1)
        rows = self.buffer.sample(self.rows_per_micro_step, generator)
        return (rows, len(rows)) if len(rows) else (self._latest.rows(), 0)

    def prefetch(self) -> None:
        """Make recordings ahead of time."""
        self._waiting.extend(islice(self._recordings, self.ahead - len(self._waiting)))

    def draw(self, micro_step: int) -> int:
        """Number this process's micro-step among those of all processes."""
        return micro_step * self.num_processes + self.process_index

    def draws(self, number: int) -> list[int]:
        """Say which draws are this process's share of a recording."""
        first = self.draw(number) * self.batch_size
        return list(range(first, first + self.batch_size))

    def prompt_numbers(self, micro_steps: int) -> list[int]:
        """Say which prompts the latest micro-steps may have trained on, in all processes.

        Args:
            micro_steps: how many.

        Returns:
            Their numbers.
        """
        oldest = max(0, self.number - self.buffer.capacity - micro_steps + 1)
        size = self.prompts_per_recording
        return [prompt_at(draw, self.num_prompts, self.seed) for draw in range(oldest * size, self.number * size)]

    def _take(self) -> None:
        self._latest, keep = self._waiting.popleft() if self._waiting else next(self._recordings)
        self.buffer.add(self._latest.select(keep.read().nonzero().squeeze(1)))

    def _numbered(self, first: int, end: int) -> Iterator[tuple[Recording, HostCopy]]:
        """Recordings number `first` to `end` - 1, and which of their prompts are kept, bound for the host."""
        for start in range(first - first % self.at_once, end, self.at_once):
            draws = [draw for number in range(start, start + self.at_once) for draw in self.draws(number)]
            recording, keep = self.record(draws)
            batches = zip(torch.arange(len(draws)).split(self.batch_size), keep.split(self.batch_size), strict=True)
            made = [(recording.select(batch), HostCopy(kept)) for batch, kept in batches]
            yield from made[max(0, first - start) : end - start]
