"""What a network reads of its prompts, whatever the family: embeddings, their mask, and a pooled embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from .transfer import to_device
from .versions import token_embedding


LEAST_VOCABULARY = 0.9  # of the text encoder's: some round theirs up, none by so much


def check_tokenizer(tokenizer: Any, text_encoder: Any) -> None:
    """Refuse a tokenizer that reads no prompt, or not the tokens that a text encoder embeds.

    Args:
        tokenizer: of transformers, which makes an empty one where its files are missing.
        text_encoder: of transformers.

    Raises:
        ValueError: where all prompts are alike to the tokenizer, or its vocabulary is another one's.
    """
    if tokenizer("cat").input_ids == tokenizer("dog").input_ids:
        raise ValueError("`tokenizer` reads every prompt alike: its files, such as tokenizer.json, are missing.")
    tokens, embedded = len(tokenizer), token_embedding(text_encoder).weight.shape[0]
    if not LEAST_VOCABULARY * embedded <= tokens <= embedded:
        raise ValueError(
            f"`tokenizer` has {tokens} tokens and `text_encoder` embeds {embedded}: they are not of one model."
        )


@dataclass(frozen=True)
class Text:
    """The embeddings of B prompts, padded to one length L.

    Args:
        embeds: one embedding a token, (B, L, D).
        mask: 1 for a token, 0 for padding, (B, L).
        pooled: one embedding a prompt, (B, P), for networks that read one.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor | None = None

    @classmethod
    def unmasked(cls, embeds: torch.Tensor, pooled: torch.Tensor | None = None) -> Text:
        """Take embeddings without padding, or with padding that a network attends to.

        Args:
            embeds: (B, L, D).
            pooled: (B, P), where the network reads it.

        Returns:
            The text; its mask is all ones.
        """
        return cls(embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device), pooled)

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, prompts: torch.Tensor | slice) -> Text:
        """Take some of the prompts, by number; a prompt may be taken more than once."""
        return self._map(lambda tensor: tensor[prompts])

    @property
    def holds_values(self) -> bool:
        """Whether the tensors hold values: a memory plan's have shapes alone."""
        return not (self.mask.is_meta or isinstance(self.mask, FakeTensor))

    def lengths(self) -> list[int]:
        """Say how many tokens every prompt has before its padding; the host waits for the device.

        Returns:
            B numbers; L for all where the tensors hold no values.
        """
        return self.mask.sum(1).tolist() if self.holds_values else [self.mask.shape[1]] * len(self)

    def arguments(self) -> dict[str, torch.Tensor]:
        """Give the text as the keyword arguments of a network F."""
        named = {"encoder_hidden_states": self.embeds, "encoder_attention_mask": self.mask}
        return named if self.pooled is None else {**named, "pooled_projections": self.pooled}

    def to(self, device: torch.device | str | None) -> Text:
        """Move the text, without waiting for a GPU's queue."""
        return self._map(lambda tensor: to_device(tensor, device))

    def pad(self, length: int) -> Text:
        """Pad to a length with masked tokens.

        Args:
            length: of the result, at least L.

        Returns:
            The text, (B, `length`, D).
        """
        padding = length - self.embeds.shape[1]
        return Text(F.pad(self.embeds, (0, 0, 0, padding)), F.pad(self.mask, (0, padding)), self.pooled)

    def expand(self, batch_size: int) -> Text:
        """Let one prompt stand for a batch, without a copy.

        Args:
            batch_size: of the result; the text has 1 prompt, or this many already.

        Returns:
            The text, (`batch_size`, L, D).
        """
        return self._map(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]))

    def repeat(self, times: int) -> Text:
        """Repeat every prompt.

        Args:
            times: how often, next to each other.

        Returns:
            The text, (B * `times`, L, D).
        """
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def for_rows(self, rows: int) -> Text:
        """Give every row a prompt of its own.

        Args:
            rows: number of samples, the consecutive ones of a prompt together.

        Returns:
            The text, (`rows`, L, D).

        Raises:
            ValueError: if `rows` is no multiple of the number of prompts.
        """
        if rows % len(self):
            raise ValueError(
                f"`encoder_hidden_states` has {len(self)} prompts for {rows} rows: every prompt has to serve"
                " the same number of rows."
            )
        return self if rows == len(self) else self.repeat(rows // len(self))

    def roll(self, shift: int) -> Text:
        """Give every prompt's place to the prompt `shift` places before it, around the end."""
        return self._map(lambda tensor: tensor.roll(shift, 0))

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        """Put texts together, padded to the longest with masked tokens.

        Args:
            parts: at least one; all with a pooled embedding or none.

        Returns:
            Their prompts, in order.
        """
        length = max(part.embeds.shape[1] for part in parts)
        padded = [part.pad(length) for part in parts]
        pooled = [part.pooled for part in padded if part.pooled is not None]
        return Text(
            torch.cat([part.embeds for part in padded]),
            torch.cat([part.mask for part in padded]),
            torch.cat(pooled) if pooled else None,
        )

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Text:
        return Text(change(self.embeds), change(self.mask), None if self.pooled is None else change(self.pooled))


def tokens_read(asked: int | None, *, usual: int, most: int) -> int:
    """Say how many tokens of a prompt a stock pipeline reads.

    Args:
        asked: as many as asked for; None for the usual number.
        usual: what it reads where it is told nothing.
        most: what it allows.

    Returns:
        The number.

    Raises:
        ValueError: for more than it allows.
    """
    if asked is not None and asked > most:
        raise ValueError(f"`max_sequence_length` is {asked}: this teacher's pipeline reads {most} tokens")
    return usual if asked is None else asked
