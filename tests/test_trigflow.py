import logging
import math

import pytest
import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from tiny import tiny_sana_pipeline, tiny_transformer
from toy_networks import SIGMA_DATA, FlowFunction, four_axes, network_inputs, randn

from diffusers_tbcm.backbones import sana
from diffusers_tbcm.trigflow import (
    TrigFlowTransformer,
    consistency_output,
    flow_to_trig_output,
    flow_to_trig_sample,
    flow_to_trig_timestep,
    trig_to_flow_output,
    trig_to_flow_sample,
    trig_to_flow_timestep,
)


def straight_path(batch=4, seed=0):
    """Unit-scale data and noise, an angle per sample, and x_t between them."""
    data, noise = randn(2, batch, 3, 4, 5, seed=seed)
    t = torch.linspace(0, math.pi / 2, batch, dtype=torch.float64)
    return data, noise, t, SIGMA_DATA * (four_axes(t).cos() * data + four_axes(t).sin() * noise)


def test_times_map_as_equation_5_and_back():
    t = torch.tensor([0.0, math.atan(0.25), math.pi / 4, math.pi / 2], dtype=torch.float64)
    s = trig_to_flow_timestep(t)
    # tan t = 1/4 gives s = 1 / (1 + 4).
    torch.testing.assert_close(s, torch.tensor([0, 0.2, 0.5, 1], dtype=torch.float64))
    torch.testing.assert_close(flow_to_trig_timestep(s), t)


def test_samples_map_to_the_straight_flow_path_and_back():
    data, noise, t, sample = straight_path()
    s = t.sin() / (t.sin() + t.cos())
    flow_sample = trig_to_flow_sample(sample, t, SIGMA_DATA)
    torch.testing.assert_close(flow_sample, (1 - four_axes(s)) * data + four_axes(s) * noise)
    torch.testing.assert_close(flow_to_trig_sample(flow_sample, s, SIGMA_DATA), sample)


def test_outputs_map_to_the_derivative_of_the_trig_path_and_back():
    # On a straight path v = noise - data, and F = (dx_t/dt) / sigma_data = cos t noise - sin t data without Eq. 7.
    data, noise, t, sample = straight_path()
    s = trig_to_flow_timestep(t)
    flow_sample = trig_to_flow_sample(sample, t, SIGMA_DATA)
    trig_output = flow_to_trig_output(flow_sample, noise - data, s)
    torch.testing.assert_close(trig_output, four_axes(t).cos() * noise - four_axes(t).sin() * data)
    torch.testing.assert_close(trig_to_flow_output(flow_sample, trig_output, s), noise - data)


def test_consistency_output_of_an_exact_network_is_the_clean_latent():
    data, noise, t, sample = straight_path()
    trig_output = four_axes(t).cos() * noise - four_axes(t).sin() * data
    torch.testing.assert_close(consistency_output(sample, trig_output, t, SIGMA_DATA), SIGMA_DATA * data)


@pytest.mark.parametrize("timestep_scale", [1.0, 3.0])
def test_wrapper_feeds_the_flow_form_and_returns_the_trig_form(timestep_scale):
    data, noise, t, sample = straight_path()
    network = FlowFunction(lambda x, s: noise - data, guidance_embeds=True)
    wrapper = TrigFlowTransformer(network, timestep_scale=timestep_scale, backbone=sana)
    output = wrapper(sample / SIGMA_DATA, t, torch.zeros(4, 2, 1), torch.ones(4, 2), torch.full((4,), 4.5))
    torch.testing.assert_close(output, four_axes(t).cos() * noise - four_axes(t).sin() * data)
    (call,) = network.calls
    torch.testing.assert_close(call["hidden_states"], trig_to_flow_sample(sample, t, SIGMA_DATA))
    torch.testing.assert_close(call["timestep"], timestep_scale * trig_to_flow_timestep(t))
    torch.testing.assert_close(call["guidance"], torch.full((4,), 0.45))
    assert torch.equal(call["encoder_attention_mask"], torch.ones(4, 2))


@pytest.mark.parametrize(
    ("sample_dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_wrapper_is_wide_around_a_narrow_network(sample_dtype, wide):
    network = FlowFunction(lambda x, s: x, dtype=torch.bfloat16)
    sample, t = randn(2, 1, 2, 2, dtype=sample_dtype), torch.tensor([0.3, 1.2], dtype=sample_dtype)
    output = TrigFlowTransformer(network, backbone=sana)(sample, t, torch.zeros(2, 1, 1))
    (call,) = network.calls
    assert call["hidden_states"].dtype == call["encoder_hidden_states"].dtype == torch.bfloat16
    assert call["timestep"].dtype == output.dtype == wide
    # v = x_FM rounded to bfloat16, the only rounding above `wide` that the output may carry.
    flow_sample = trig_to_flow_sample(sample.to(wide), t.to(wide), 1.0)
    expected = flow_to_trig_output(flow_sample, flow_sample.bfloat16().to(wide), trig_to_flow_timestep(t.to(wide)))
    torch.testing.assert_close(output, expected)


def test_wrapper_needs_guidance_exactly_where_the_network_embeds_it():
    arguments = (torch.zeros(2, 1, 2, 2), torch.ones(2), torch.zeros(2, 1, 1))
    with_guidance = TrigFlowTransformer(FlowFunction(lambda x, s: x, guidance_embeds=True), backbone=sana)
    without = TrigFlowTransformer(FlowFunction(lambda x, s: x), backbone=sana)
    with pytest.raises(ValueError, match="`guidance` is None"):
        with_guidance(*arguments)
    with pytest.raises(ValueError, match="does not embed guidance"):
        without(*arguments, guidance=torch.ones(2))
    assert with_guidance.guidance_embeds and not without.guidance_embeds


@pytest.mark.parametrize(
    ("config_scale", "argument", "resolved"),
    [(0.001, None, 1), (1.0, None, 1), (1000.0, None, 1000), (1000.0, 1.0, 1)],
)
def test_timestep_scale_is_resolved_and_a_large_one_warned_of(config_scale, argument, resolved, caplog):
    transformer = tiny_transformer(timestep_scale=config_scale)
    with caplog.at_level(logging.WARNING):
        wrapper = TrigFlowTransformer(transformer, timestep_scale=argument)
        sample, t, embeds, mask = network_inputs()
        output = wrapper(sample, t, embeds, mask)
    assert wrapper.timestep_scale == resolved
    assert sum("timestep_scale=1000" in message for message in caplog.messages) == (resolved == 1000)
    flow_sample, s = trig_to_flow_sample(sample, t, 1.0), trig_to_flow_timestep(t)
    velocity = transformer(flow_sample, embeds, s * resolved, encoder_attention_mask=mask).sample
    torch.testing.assert_close(output, flow_to_trig_output(flow_sample, velocity, s))


def test_wrapper_agrees_with_the_stock_pipeline():
    components = tiny_sana_pipeline(guidance_embeds=True).components
    pipeline = SanaSprintPipeline(
        **{**components, "scheduler": SCMScheduler(prediction_type="trigflow", sigma_data=0.5)}
    )
    noise, _, embeds, mask = network_inputs(batch=2)
    start = 1.1  # an angle where neither cos nor sin vanishes
    latents = pipeline(
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        latents=noise,
        num_inference_steps=1,
        max_timesteps=start,
        intermediate_timesteps=None,
        guidance_scale=4.5,
        height=64,
        width=64,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    t = torch.full((2,), start)
    with torch.no_grad():
        trig_output = TrigFlowTransformer(pipeline.transformer)(noise, t, embeds, mask, torch.full((2,), 4.5))
    # The same float32 operations up to their order.
    torch.testing.assert_close(latents, consistency_output(noise, trig_output, t, 1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_embedded_timestep_is_the_networks_own(guidance_embeds):
    wrapper = TrigFlowTransformer(tiny_transformer(guidance_embeds=guidance_embeds), timestep_scale=2.0)
    sample, t, embeds, mask = network_inputs()
    guidance = torch.tensor([4.0, 4.5, 5.0]) if guidance_embeds else None
    seen = []
    wrapper.transformer.norm_out.register_forward_hook(lambda module, arguments, output: seen.append(arguments[1]))
    wrapper(sample, t, embeds, mask, guidance)
    embedded = wrapper.embed_timestep(t, guidance)
    assert embedded.shape == (3, 16)
    assert torch.equal(embedded, seen[0])
