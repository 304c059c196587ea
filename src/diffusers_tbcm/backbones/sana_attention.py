"""Cross-attention whose text side is computed once per prompt: shared by rows, and kept over a teacher's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention

from ..text import Text


class PromptAttnProcessor:
    """Sana's cross-attention for prompts that serve several consecutive rows each.

    A query attends to its prompt whichever row it belongs to, so the rows of a prompt are one row with more queries.
    With as many prompts as rows this is diffusers' SanaAttnProcessor2_0.
    """

    def __init__(self) -> None:
        self.keeps_text = False
        self.key_value: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the prompts.

        Args:
            attn: the attention module that holds the weights.
            hidden_states: (rows, tokens, dim).
            encoder_hidden_states: the text of `deal_out`, (rows, any length, dim).
            attention_mask: the bias of the scores, (prompts, 1, text tokens), rows being a multiple of prompts; None
                for a prompt per row without padding.

        Returns:
            The shape of `hidden_states`.
        """
        prompts = hidden_states.shape[0] if attention_mask is None else attention_mask.shape[0]
        bias = None if attention_mask is None else attention_mask[:, None].to(hidden_states.dtype)
        query = attn.to_q(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        query = query.reshape(prompts, -1, attn.heads, query.shape[-1] // attn.heads).transpose(1, 2)
        key, value = self.key_value or self._project(attn, encoder_hidden_states.flatten(0, 1), prompts)
        if self.keeps_text:
            self.key_value = key, value
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        attended = attended.transpose(1, 2).reshape(*hidden_states.shape[:2], -1).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](attended))

    @staticmethod
    def _project(attn: Attention, text: torch.Tensor, prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = attn.to_k(text), attn.to_v(text)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        key, value = (part.reshape(prompts, -1, attn.heads, part.shape[-1] // attn.heads) for part in (key, value))
        return key.transpose(1, 2), value.transpose(1, 2)


def deal_out(embeds: torch.Tensor, mask: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every row a share of its prompt's tokens: the stock forward wants as many rows of text as of samples.

    Projection and norm of the text work token by token; `PromptAttnProcessor` gathers the shares again.

    Args:
        embeds: (prompts, length, dim).
        mask: 1 for a token, 0 for padding, (prompts, length).
        rows: number of samples, the consecutive ones of a prompt together.

    Returns:
        The text, (rows, share, dim), and its mask, (prompts, rows / prompts * share).

    Raises:
        ValueError: if `rows` is no multiple of the number of prompts.
    """
    prompts, length = mask.shape
    if rows % prompts:
        raise ValueError(
            f"`encoder_hidden_states` has {prompts} prompts for {rows} rows: every prompt has to serve"
            " the same number of rows."
        )
    padding = -length % (rows // prompts)
    embeds, mask = F.pad(embeds, (0, 0, 0, padding)), F.pad(mask, (0, padding))
    return embeds.reshape(rows, -1, embeds.shape[-1]), mask


def make_ready(transformer: SanaTransformer2DModel) -> list[PromptAttnProcessor]:
    """Let the cross-attention of a transformer take the text of `deal_out`; its weights stay as they are.

    Args:
        transformer: changed in place.

    Returns:
        The processors, block by block.
    """
    processors = []
    for block in transformer.transformer_blocks:
        if not isinstance(block.attn2.processor, PromptAttnProcessor):
            block.attn2.set_processor(PromptAttnProcessor())
        processors.append(block.attn2.processor)
    return processors


@contextmanager
def keep_text(transformer: SanaTransformer2DModel) -> Iterator[Callable[[Text], Text]]:
    """Compute keys and values of the text in the first call inside, and use them in the others.

    Args:
        transformer: a frozen one; all calls inside are on the same prompts and rows.

    Yields:
        What makes of the first call's text that of the others: a token a prompt, as nothing is read but the mask.
    """
    processors = make_ready(transformer)
    for processor in processors:
        processor.keeps_text = True
    try:
        yield lambda text: replace(text, embeds=text.embeds[:, :1])
    finally:
        for processor in processors:
            processor.keeps_text, processor.key_value = False, None
