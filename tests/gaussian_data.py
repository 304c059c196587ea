"""Normally distributed data, for which teacher, trajectory and student are known in closed form.

The data is N(0, DATA_STD^2 I), not SIGMA_DATA, for which F would be zero. The probability-flow ODE is then linear:
x_t = x_{pi/2} std(t) / SIGMA_DATA, and x_0 = x_t DATA_STD / std(t).
"""

import torch
from toy_networks import SIGMA_DATA, FlowFunction, four_axes

from diffusers_tbcm.backbones import sana
from diffusers_tbcm.trigflow import TrigFlowTransformer


DATA_STD = 0.9


def gaussian_std(t):
    return torch.sqrt((DATA_STD * torch.cos(t)) ** 2 + (SIGMA_DATA * torch.sin(t)) ** 2)


def gaussian_flow_velocity(flow_sample, s):
    """E[e - x_0 | x_s] for unit-scale data of standard deviation DATA_STD / SIGMA_DATA."""
    s, variance = four_axes(s), (DATA_STD / SIGMA_DATA) ** 2
    return (s - (1 - s) * variance) / (s**2 + (1 - s) ** 2 * variance) * flow_sample


def gaussian_teacher():
    return TrigFlowTransformer(FlowFunction(gaussian_flow_velocity), backbone=sana)


def exact_gaussian_function(sample, t):
    """F of the exact consistency function f(x_t, t) = x_t DATA_STD / std(t)."""
    return four_axes((t.cos() - DATA_STD / gaussian_std(t)) / t.sin()) * sample
