"""Embeddings of sinusoids of 1000 s: which of them are slow, and what a student makes of them."""

import math

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from diffusers_tbcm.backbones.time_embedding import (
    STEEPEST,
    WideTimestepEmbedding,
    sees_slow_sinusoids_only,
    slow_features,
    slow_sinusoids,
)


@pytest.fixture
def embedder():
    torch.manual_seed(0)
    return TimestepEmbedding(256, 16)


@pytest.mark.parametrize("flipped", [True, False])
def test_slow_sinusoids_are_those_of_low_frequency(flipped):
    projection = Timesteps(256, flip_sin_to_cos=flipped, downscale_freq_shift=0)
    slopes = 1000 * 10000 ** (-torch.arange(128) / 128)  # of sin(1000 f s) at s = 0
    # A cosine of less than half a period comes nowhere to its steepest; one of these is between its sine and STEEPEST
    sine, cosine = slow_sinusoids(projection).roll(128 * flipped).chunk(2)
    assert torch.equal(sine, slopes <= STEEPEST) and 40 < sine.sum() < 60
    assert torch.equal(cosine, torch.where(slopes < math.pi / 2, slopes * slopes.sin(), slopes) <= STEEPEST)
    times = torch.tensor([0.0, 300.0, 1000.0])
    features, all_features = slow_features(projection, times), projection(times)
    seen = slow_sinusoids(projection)
    assert torch.equal(features[:, seen], all_features[:, seen]) and not features[:, ~seen].any()


def test_an_embedder_in_dense_time_gives_fast_sinusoids_no_weight(embedder):
    projection = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert not sees_slow_sinusoids_only(projection, embedder)
    with torch.no_grad():
        embedder.linear_1.weight[:, ~slow_sinusoids(projection)] = 0
    assert sees_slow_sinusoids_only(projection, embedder)
    with torch.no_grad():
        embedder.linear_1.weight[3, 1] = 1e-9
    assert not sees_slow_sinusoids_only(projection, embedder)


def test_a_wide_embedding_is_diffusers_in_float32_and_leaves_what_has_no_weight(embedder):
    with torch.no_grad():
        embedder.linear_1.weight[:, :100] = 0
    sinusoids = torch.rand(3, 256)
    expected = embedder(sinusoids)
    wide = WideTimestepEmbedding(embedder)
    assert wide.state_dict().keys() == embedder.state_dict().keys()
    assert torch.equal(wide(sinusoids), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(embedder(sinusoids), expected)
        found = wide(sinusoids)
    assert torch.equal(found, expected) and found.dtype == torch.float32
    found.sum().backward()
    gradient = wide.linear_1.weight.grad
    assert not gradient[:, :100].any() and gradient[:, 100:].all()
    assert wide.to(torch.bfloat16)(sinusoids).dtype == torch.bfloat16
