"""Classifier-free guidance of a TrigFlow network, both branches in one batch."""

import torch

from .trigflow import TrigFlowTransformer, broadcast_time


def guidance_branches(
    teacher: TrigFlowTransformer,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    *,
    prompt_attention_mask: torch.Tensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put together the prompts that a teacher sees in one call, padded to one length with masked tokens.

    Args:
        teacher: the network F.
        prompt_embeds: (batch, length, dim).
        negative_prompt_embeds: (1 or batch, any length, dim); None only for a teacher that embeds guidance.
        prompt_attention_mask: 1 for a token, 0 for padding, (batch, length).
        negative_prompt_attention_mask: the same for the negative prompt, (1 or batch, its length).

    Returns:
        Embeddings and mask for `guided_output`: the negative prompts and then the prompts, (2 batch, L, dim) and
        (2 batch, L); for a teacher that embeds guidance the prompts alone, as they are.

    Raises:
        ValueError: if `negative_prompt_embeds` is None and the teacher needs it.
    """
    if prompt_attention_mask is None:
        prompt_attention_mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=prompt_embeds.device)
    if teacher.guidance_embeds:
        return prompt_embeds, prompt_attention_mask
    if negative_prompt_embeds is None:
        raise ValueError("`negative_prompt_embeds` is None, but the teacher needs them for guidance.")
    if negative_prompt_attention_mask is None:
        negative_prompt_attention_mask = prompt_attention_mask.new_ones(negative_prompt_embeds.shape[:2])
    length = max(negative_prompt_embeds.shape[1], prompt_embeds.shape[1])
    embeds, masks = [], []
    for branch, mask in (
        (negative_prompt_embeds, negative_prompt_attention_mask),
        (prompt_embeds, prompt_attention_mask),
    ):
        padding = length - branch.shape[1]
        embeds.append(torch.nn.functional.pad(branch, (0, 0, 0, padding)).expand(len(prompt_embeds), -1, -1))
        masks.append(torch.nn.functional.pad(mask, (0, padding)).expand(len(prompt_embeds), -1))
    return torch.cat(embeds), torch.cat(masks)


def guided_output(
    teacher: TrigFlowTransformer,
    sample: torch.Tensor,
    t: torch.Tensor,
    branch_embeds: torch.Tensor,
    branch_mask: torch.Tensor,
    guidance_scale: torch.Tensor,
) -> torch.Tensor:
    """Evaluate F_uncond + w (F_cond - F_uncond), or F(w) of a teacher that embeds guidance.

    Args:
        teacher: the network F.
        sample: x_t / sigma_data, (batch, channels, height, width).
        t: angles in radians, (batch,).
        branch_embeds: from `guidance_branches`.
        branch_mask: from `guidance_branches`.
        guidance_scale: classifier-free guidance weight w, (batch,).

    Returns:
        The guided F, the shape of `sample`.
    """
    if teacher.guidance_embeds:
        return teacher(sample, t, branch_embeds, branch_mask, guidance_scale)
    both = teacher(sample.repeat(2, 1, 1, 1), t.repeat(2), branch_embeds, branch_mask)
    unconditional, conditional = both.chunk(2)
    return unconditional + broadcast_time(guidance_scale.to(both.dtype), both) * (conditional - unconditional)
