import pytest
import torch
from test_trajectory import cfg_arguments
from test_trigflow import SIGMA_DATA, four_axes
from tiny import tiny_transformer

from diffusers_tbcm.guidance import guidance_branches, guided_output
from diffusers_tbcm.trajectory import record_trajectory
from diffusers_tbcm.trigflow import TrigFlowTransformer


def branches(teacher, embeds, mask, negative, negative_mask):
    return guidance_branches(
        teacher, embeds, negative, prompt_attention_mask=mask, negative_prompt_attention_mask=negative_mask
    )


def test_guidance_moves_from_the_unconditional_output_past_the_conditional_one():
    noise, timesteps, embeds, mask, negative, negative_mask, weight = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer().double())
    noise, t, weight = noise.double(), timesteps[:, 1].double(), weight.double()
    guided = guided_output(teacher, noise, t, *branches(teacher, embeds, mask, negative, negative_mask), weight)
    conditional = teacher(noise, t, embeds, mask)
    unconditional = teacher(noise, t, negative.expand(2, -1, -1), negative_mask.expand(2, -1))
    assert not torch.allclose(conditional, unconditional, rtol=0.01)
    # Padding to one length and a larger batch only change the order of sums; the model's own float32 upcasts bound it.
    torch.testing.assert_close(
        guided, four_axes(weight) * conditional + (1 - four_axes(weight)) * unconditional, rtol=1e-4, atol=1e-5
    )


def test_it_is_the_guidance_of_a_recorded_trajectory():
    noise, timesteps, embeds, mask, negative, negative_mask, weight = cfg_arguments()
    for guidance_embeds in (False, True):
        teacher = TrigFlowTransformer(tiny_transformer(guidance_embeds=guidance_embeds))
        recorded = record_trajectory(
            teacher,
            noise,
            timesteps,
            embeds,
            negative,
            weight,
            prompt_attention_mask=mask,
            negative_prompt_attention_mask=negative_mask,
        )
        both = branches(teacher, embeds, mask, negative, negative_mask)
        with torch.no_grad():
            output = guided_output(teacher, recorded.latents[:, 1] / SIGMA_DATA, timesteps[:, 2], *both, weight)
        torch.testing.assert_close(SIGMA_DATA * output, recorded.velocity[:, 1])


def test_missing_masks_attend_to_every_token():
    _, _, embeds, mask, negative, negative_mask, _ = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer())
    found = guidance_branches(teacher, embeds, negative)
    expected = branches(teacher, embeds, torch.ones_like(mask), negative, torch.ones_like(negative_mask))
    assert all(map(torch.equal, found, expected))


def test_a_teacher_that_needs_the_negative_prompt_says_so():
    embeds = cfg_arguments()[2]
    with pytest.raises(ValueError, match="`negative_prompt_embeds` is None"):
        guidance_branches(TrigFlowTransformer(tiny_transformer()), embeds, None)
