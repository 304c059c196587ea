"""Classifier-free guidance of a TrigFlow network, both branches in one batch."""

from collections.abc import Callable

import torch

from .trigflow import TrigFlowTransformer, broadcast_time


def guided_output(
    teacher: TrigFlowTransformer,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    guidance_scale: torch.Tensor,
    *,
    prompt_attention_mask: torch.Tensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Put the prompts of both guidance branches together, once for all calls of the network.

    Args:
        teacher: the network F; one that embeds guidance is given the scale and called once.
        prompt_embeds: (batch, length, dim).
        negative_prompt_embeds: (1 or batch, any length, dim); None only for a teacher that embeds guidance.
        guidance_scale: classifier-free guidance weight w, (batch,).
        prompt_attention_mask: 1 for a token, 0 for padding, (batch, length).
        negative_prompt_attention_mask: the same for the negative prompt, (1 or batch, its length).

    Returns:
        The function of x_t / sigma_data, (batch, channels, height, width), and t, (batch,), that gives
        F_uncond + w (F_cond - F_uncond).

    Raises:
        ValueError: if `guidance_scale` does not fit the batch, or `negative_prompt_embeds` is None and the teacher
            needs it.
    """
    rows = len(prompt_embeds)
    if guidance_scale.shape != (rows,):
        raise ValueError(f"`guidance_scale` has shape {tuple(guidance_scale.shape)}, but it must be ({rows},).")
    if teacher.guidance_embeds:
        return lambda sample, t: teacher(sample, t, prompt_embeds, prompt_attention_mask, guidance_scale)
    if negative_prompt_embeds is None:
        raise ValueError("`negative_prompt_embeds` is None, but the teacher needs them for guidance.")

    length = max(negative_prompt_embeds.shape[1], prompt_embeds.shape[1])
    embeds, masks = [], []
    for branch, mask in (
        (negative_prompt_embeds, negative_prompt_attention_mask),
        (prompt_embeds, prompt_attention_mask),
    ):
        mask = branch.new_ones(branch.shape[:2]) if mask is None else mask
        padding = length - branch.shape[1]
        embeds.append(torch.nn.functional.pad(branch, (0, 0, 0, padding)).expand(rows, -1, -1))
        masks.append(torch.nn.functional.pad(mask, (0, padding)).expand(rows, -1))
    both_embeds, both_masks = torch.cat(embeds), torch.cat(masks)

    def output(sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = teacher(sample.repeat(2, 1, 1, 1), t.repeat(2), both_embeds, both_masks)
        unconditional, conditional = both.chunk(2)
        weight = broadcast_time(guidance_scale.to(both.dtype), sample)
        return unconditional + weight * (conditional - unconditional)

    return output
