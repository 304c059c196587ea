"""Networks to put in the place of a Sana transformer, and inputs for them."""

import torch
from torch import nn

from diffusers_tbcm.backbones import sana
from diffusers_tbcm.text import Text
from diffusers_tbcm.trajectory import sample_timesteps
from diffusers_tbcm.trigflow import (
    TrigFlowTransformer,
    flow_to_trig_sample,
    flow_to_trig_timestep,
    trig_to_flow_output,
)


SIGMA_DATA = 0.5


class FlowFunction(nn.Module):
    """A closed-form velocity v(x_FM, s) with the face of a Sana transformer; it keeps the arguments of its calls."""

    def __init__(self, velocity, dtype=torch.float64, **config):
        super().__init__()
        self.velocity = velocity
        self.dtype = dtype
        self.config = {"guidance_embeds": False, "guidance_embeds_scale": 0.1, "timestep_scale": 1.0, **config}
        self.calls = []
        self.transformer_blocks = ()

    def forward(self, hidden_states, return_dict=True, **kwargs):
        self.calls.append({"hidden_states": hidden_states, **kwargs})
        return (self.velocity(hidden_states, kwargs["timestep"]),)


def trig_student(function):
    """A student whose F(x_t / sigma_data, t) is `function` of the two."""

    def velocity(flow_sample, s):
        trig_output = function(flow_to_trig_sample(flow_sample, s, 1.0), flow_to_trig_timestep(s))
        return trig_to_flow_output(flow_sample, trig_output, s)

    return TrigFlowTransformer(FlowFunction(velocity), backbone=sana)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def four_axes(t):
    return t.view(-1, 1, 1, 1)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def no_text(prompts):
    """Text for a network that does not read any."""
    return Text.unmasked(torch.zeros(prompts, 1, 1))


def network_inputs(batch=3, dtype=torch.float32):
    """sample, timestep, prompt embeddings and their mask for the tiny transformer."""
    mask = torch.ones(batch, 6, dtype=torch.long)
    mask[:, 4:] = 0
    t = torch.linspace(0.2, 1.4, batch, dtype=dtype)
    return randn(batch, 4, 8, 8, dtype=dtype), t, randn(batch, 6, 16, seed=1, dtype=dtype), mask


def cfg_arguments():
    """noise, timesteps, text, negative text and guidance scale of a generation by the tiny transformer."""
    noise, _, embeds, mask = network_inputs(batch=2)
    mask[0, 2:] = 0
    negative, negative_mask = randn(1, 9, 16, seed=5, dtype=torch.float32), torch.ones(1, 9, dtype=torch.long)
    negative_mask[:, 7:] = 0
    timesteps = sample_timesteps("reference", 2, 4, generator=generators(0, 1))
    return noise, timesteps, Text(embeds, mask), Text(negative, negative_mask), torch.tensor([4.0, 5.0])
