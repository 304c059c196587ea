import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import tiny_transformer
from toy_networks import four_axes, network_inputs, randn

from diffusers_tbcm.flow import FlowTransformer, add_flow_noise, flow_prediction, flow_step, shift_sigmas
from diffusers_tbcm.trigflow import (
    TrigFlowTransformer,
    flow_to_trig_output,
    flow_to_trig_sample,
    flow_to_trig_timestep,
)


def test_noise_and_velocity_lead_back_to_the_clean_latent():
    original, noise = randn(2, 5, 2, 3, 3)
    s = torch.linspace(0, 1, 5, dtype=torch.float64)
    sample = add_flow_noise(original, noise, s)
    assert torch.equal(sample, (1 - four_axes(s)) * original + four_axes(s) * noise)
    torch.testing.assert_close(flow_prediction(sample, noise - original, s), original)


def test_steps_along_a_straight_line_go_anywhere():
    original, noise = randn(2, 4, 2, 3, 3)
    s = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    sample, velocity = add_flow_noise(original, noise, s), noise - original
    elsewhere = torch.tensor([0.7, 0.5, 0.0, 0.3], dtype=torch.float64)
    moved = flow_step(sample, velocity, s, elsewhere)
    torch.testing.assert_close(moved, add_flow_noise(original, noise, elsewhere))
    assert torch.equal(flow_step(sample, velocity, s, s), sample)  # t' = t
    torch.testing.assert_close(  # t' = 0
        flow_step(sample, velocity, s, torch.zeros_like(s)), flow_prediction(sample, velocity, s)
    )


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_shift_is_that_of_the_stock_scheduler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(shift_sigmas(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), shift), scheduler.sigmas)


def test_velocity_of_a_transformer_is_its_own_output():
    transformer, (sample, _, embeds, mask) = tiny_transformer(), network_inputs()
    s = torch.tensor([0.1, 0.5, 1.0])
    expected = transformer(
        sample, encoder_hidden_states=embeds, timestep=1000 * s, encoder_attention_mask=mask, return_dict=False
    )[0]
    velocity = FlowTransformer(transformer, timestep_scale=1000.0)(sample, s, embeds, mask)
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, expected)


def test_flow_and_trigflow_are_two_views_of_one_network():
    transformer, (sample, _, embeds, mask) = tiny_transformer(), network_inputs()
    s = torch.tensor([0.2, 0.5, 0.9])
    velocity = FlowTransformer(transformer)(sample, s, embeds, mask)
    output = TrigFlowTransformer(transformer)(
        flow_to_trig_sample(sample, s, 1.0), flow_to_trig_timestep(s), embeds, mask
    )
    torch.testing.assert_close(output, flow_to_trig_output(sample, velocity, s), atol=1e-4, rtol=1e-4)


def test_half_precision_networks_give_wide_velocities():
    transformer, (sample, _, embeds, mask) = tiny_transformer().bfloat16(), network_inputs()
    assert FlowTransformer(transformer)(sample, torch.full((3,), 0.5), embeds, mask).dtype == torch.float32


def test_guidance_is_given_where_it_is_embedded_and_nowhere_else():
    sample, _, embeds, mask = network_inputs()
    s, guidance = torch.full((3,), 0.5), torch.full((3,), 4.5)
    with pytest.raises(ValueError, match=r"`guidance` is tensor.* does not embed"):
        FlowTransformer(tiny_transformer())(sample, s, embeds, mask, guidance=guidance)
    with pytest.raises(ValueError, match="`guidance` is None"):
        FlowTransformer(tiny_transformer(guidance_embeds=True))(sample, s, embeds, mask)
