"""Classifier-free guidance of a network, the velocity v or the TrigFlow F, both branches in one batch."""

import torch

from .flow import FlowTransformer, broadcast_time
from .text import Text


def guidance_branches(teacher: FlowTransformer, text: Text, negative_text: Text | None) -> Text:
    """Put together the prompts that a teacher sees in one call, padded to one length with masked tokens.

    Args:
        teacher: the network F, or v.
        text: of the batch's prompts.
        negative_text: of one negative prompt, or one for each; None only for a teacher that embeds guidance.

    Returns:
        The text for `guided_output`: the negative prompts and then the prompts, 2 batch of them; for a teacher that
        embeds guidance the prompts alone, as they are.

    Raises:
        ValueError: if `negative_text` is None and the teacher needs it.
    """
    if teacher.guidance_embeds:
        return text
    if negative_text is None:
        raise ValueError("`negative_text` is None, but the teacher needs it for guidance.")
    return Text.cat([negative_text.expand(len(text)), text])


def guided_output(
    teacher: FlowTransformer,
    sample: torch.Tensor,
    t: torch.Tensor,
    branches: Text,
    guidance_scale: torch.Tensor,
) -> torch.Tensor:
    """Evaluate F_uncond + w (F_cond - F_uncond), or F(w) of a teacher that embeds guidance.

    It is what the teacher's stock pipeline follows: some rescale the guided v.

    Args:
        teacher: the network F, or v.
        sample: x_t / sigma_data, or x_s, (batch, channels, height, width).
        t: angles in radians, or s, (batch,).
        branches: from `guidance_branches`.
        guidance_scale: classifier-free guidance weight w, (batch,).

    Returns:
        The guided F or v, the shape of `sample`.
    """
    if teacher.guidance_embeds:
        return teacher(sample, t, **branches.arguments(), guidance=guidance_scale)
    both = teacher(torch.cat([sample, sample]), t.repeat(2), **branches.arguments())
    unconditional, conditional = both.chunk(2)
    guided = combine_branches(unconditional, conditional, guidance_scale)
    return teacher.rescale_guided(guided, conditional, sample, t)


def combine_branches(
    unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: torch.Tensor
) -> torch.Tensor:
    """Evaluate F_uncond + w (F_cond - F_uncond).

    Args:
        unconditional: F, or v, for the negative prompt, (batch, channels, height, width).
        conditional: the same for the prompt.
        guidance_scale: w, (batch,).

    Returns:
        The guided F or v, the shape of either.
    """
    scale = broadcast_time(guidance_scale.to(conditional.dtype), conditional)
    return unconditional + scale * (conditional - unconditional)
