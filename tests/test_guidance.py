import pytest
import torch
from tiny import tiny_transformer
from toy_networks import SIGMA_DATA, cfg_arguments, four_axes

from diffusers_tbcm.guidance import guidance_branches, guided_output
from diffusers_tbcm.trajectory import record_trajectory
from diffusers_tbcm.trigflow import TrigFlowTransformer


def test_guidance_moves_from_the_unconditional_output_past_the_conditional_one():
    noise, timesteps, text, negative, weight = cfg_arguments()
    teacher = TrigFlowTransformer(tiny_transformer().double())
    noise, t, weight = noise.double(), timesteps[:, 1].double(), weight.double()
    guided = guided_output(teacher, noise, t, guidance_branches(teacher, text, negative), weight)
    conditional = teacher(noise, t, text.embeds, text.mask)
    unconditional = teacher(noise, t, negative.embeds.expand(2, -1, -1), negative.mask.expand(2, -1))
    assert not torch.allclose(conditional, unconditional, rtol=0.01)
    # Padding to one length and a larger batch only change the order of sums; the model's own float32 upcasts bound it.
    torch.testing.assert_close(
        guided, four_axes(weight) * conditional + (1 - four_axes(weight)) * unconditional, rtol=1e-4, atol=1e-5
    )


def test_it_is_the_guidance_of_a_recorded_trajectory():
    noise, timesteps, text, negative, weight = cfg_arguments()
    for guidance_embeds in (False, True):
        teacher = TrigFlowTransformer(tiny_transformer(guidance_embeds=guidance_embeds))
        recorded = record_trajectory(teacher, noise, timesteps, text, negative, weight)
        both = guidance_branches(teacher, text, negative)
        with torch.no_grad():
            output = guided_output(teacher, recorded.latents[:, 1] / SIGMA_DATA, timesteps[:, 2], both, weight)
        torch.testing.assert_close(SIGMA_DATA * output, recorded.velocity[:, 1])


def test_the_branches_are_the_negative_prompts_and_then_the_prompts():
    _, _, text, negative, _ = cfg_arguments()
    plain, guided = (
        TrigFlowTransformer(tiny_transformer(guidance_embeds=guidance_embeds)) for guidance_embeds in (False, True)
    )
    found = guidance_branches(plain, text, negative)
    assert found.embeds.shape == (4, 9, 16)
    assert torch.equal(found.embeds[:2], negative.embeds.expand(2, -1, -1))
    assert torch.equal(found.embeds[2:, :6], text.embeds)
    assert torch.equal(found.mask[:2], negative.mask.expand(2, -1))
    assert torch.equal(found.mask[2:, :6], text.mask) and not found.mask[2:, 6:].any()
    assert guidance_branches(guided, text, None) is text


def test_a_teacher_that_needs_the_negative_prompt_says_so():
    text = cfg_arguments()[2]
    with pytest.raises(ValueError, match="`negative_text` is None"):
        guidance_branches(TrigFlowTransformer(tiny_transformer()), text, None)
