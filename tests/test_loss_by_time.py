"""The shares of the loss's weight and the logvar head's distance, by interval of t, against closed forms."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from toy_networks import SIGMA_DATA, randn

from diffusers_tbcm.loss import consistency_weight
from diffusers_tbcm.training.loss_by_time import DECAY, LossByTime
from diffusers_tbcm.trajectory import reference_route, sample_timesteps


ROUTE = reference_route(16).double()
MIDDLES = ((ROUTE[1:] + ROUTE[:-1]) / 2).float()


class Run:
    """What of a run is needed; it keeps what it is told."""

    def __init__(self, dry_run=False):
        self.accelerator, self.settings = Accelerator(cpu=True), SimpleNamespace(dry_run=dry_run)
        self.device, self.has_rows = torch.device("cpu"), True
        self.logged, self.said = {}, []

    def log(self, **measures):
        self.logged |= measures

    def say(self, message):
        self.said.append(message)


def watch(weighting, *steps, **options):
    """A watch after steps of (t, error, logvar)."""
    found = LossByTime(Run(**options), weighting)
    for rows in steps:
        found.note(*rows)
        found.log()
    return found


def rows(t, error=None, logvar=None):
    return t, torch.ones_like(t) if error is None else error, torch.zeros_like(t) if logvar is None else logvar


def test_the_intervals_are_those_that_the_reference_scheme_draws_from():
    t = sample_timesteps("reference", 50, 16, generator=torch.Generator().manual_seed(0))[:, 1:].flatten()
    by_time = watch("uniform", rows(t), rows(torch.tensor([0.001])))
    assert by_time.edges.tolist() == pytest.approx([*ROUTE[:-1].tolist(), 0])
    torch.testing.assert_close(by_time._sums[0, :-1], torch.full((14,), 50 * DECAY))
    assert by_time._sums[0, -1].item() == pytest.approx(50 * DECAY + 1)


def test_uniform_shares_are_those_of_the_rows():
    logged = watch("uniform", rows(MIDDLES))._run.logged
    assert logged.keys() == {"weight_share_large_t", "weight_share_small_t", "weight_shares"}
    torch.testing.assert_close(logged["weight_shares"], torch.full((15,), 1 / 15))
    assert logged["weight_share_large_t"].item() == pytest.approx(4 / 15)
    assert logged["weight_share_small_t"].item() == pytest.approx(1 / 15)


def test_the_priors_shares_are_its_integrals():
    """The mean of 1 / (sigma_data tan t) over t from a to b is ln(sin b / sin a) / (sigma_data (b - a))."""
    count, lower, upper = 20000, ROUTE[1:], ROUTE[:-1]
    places = (torch.arange(count) + 0.5) / count
    t = (lower[:, None] + (upper - lower)[:, None] * places).flatten().float()
    means = (upper.sin() / lower.sin()).log() / (SIGMA_DATA * (upper - lower))
    shares = watch("prior", rows(t, logvar=randn(len(t)).float()))._run.logged["weight_shares"]
    torch.testing.assert_close(shares.double(), means / means.sum(), rtol=1e-3, atol=1e-7)  # float32 sums, midpoints
    assert shares[:4].sum() < 0.01 and shares[-1] > 0.6  # what the docs say of it


def test_a_learned_weights_shares_are_those_of_one_over_the_error_at_the_fixed_point():
    error = torch.linspace(0.5, 2.0, 15)
    fixed_point = (consistency_weight(MIDDLES) * error).log()
    by_time = watch("learned", rows(MIDDLES, error, fixed_point))
    torch.testing.assert_close(by_time.shares(), (1 / error) / (1 / error).sum())
    torch.testing.assert_close(by_time.distances(), torch.zeros(15), atol=1e-5, rtol=0)
    assert by_time._run.logged["logvar_distance"].item() < 1e-5
    offsets = torch.linspace(-3.0, 2.0, 15)
    moved = watch("learned", rows(MIDDLES, error, fixed_point + offsets))
    torch.testing.assert_close(moved.distances(), offsets, atol=1e-5, rtol=1e-5)
    assert moved._run.logged["logvar_distance"].item() == pytest.approx(3, rel=1e-5)


def test_the_errors_mean_is_taken_before_its_logarithm():
    t = MIDDLES[:1].repeat(2)
    by_time = watch("learned", rows(t, torch.tensor([1.0, 3.0]), consistency_weight(t).log()))
    assert by_time.distances()[0].item() == pytest.approx(-math.log(2), rel=1e-5)
    assert by_time.distances()[1:].isnan().all() and by_time._run.logged["logvar_distance"].isfinite()


def test_micro_steps_are_a_larger_batch_and_old_steps_fade():
    t = ROUTE[1] + 0.01 + torch.zeros(3).double()
    first, second = rows(t.float()), rows(MIDDLES[-1:])
    parts, whole = LossByTime(Run(), "prior"), LossByTime(Run(), "prior")
    for part in (first, second):
        parts.note(*part)
    whole.note(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
    for by_time in (parts, whole):
        by_time.log()
    torch.testing.assert_close(parts._sums, whole._sums)
    faded = watch("uniform", first, *[second] * 69)
    expected = 3 * DECAY**69 / (3 * DECAY**69 + (1 - DECAY**69) / (1 - DECAY))
    assert faded.shares()[0].item() == pytest.approx(expected, rel=1e-5)


def test_what_does_not_count_and_what_is_not_finite_leaves_the_sums_as_they_are():
    by_time = watch("uniform", rows(MIDDLES))
    before = by_time._sums.clone()
    by_time.note(*rows(MIDDLES, error=torch.full((15,), math.nan)))
    by_time.log()
    assert torch.equal(by_time._sums, before)
    by_time._run.has_rows = False
    by_time.note(*rows(MIDDLES[:3], error=torch.full((3,), math.nan)))
    by_time.log()
    torch.testing.assert_close(by_time._sums, DECAY * before)
    by_time._run.logged.clear()
    by_time.log()  # a step of another loss
    assert by_time._run.logged == {} and torch.equal(by_time._sums, DECAY * before)


def test_a_head_that_is_far_from_its_fixed_point_is_warned_of_at_the_end(caplog):
    fixed_point = consistency_weight(MIDDLES).log()
    off = torch.zeros(15)
    off[1] = 2.5
    with caplog.at_level(logging.WARNING):
        watch("learned", rows(MIDDLES, logvar=fixed_point + 0.9)).conclude()
        watch("learned", rows(MIDDLES, logvar=fixed_point + off), dry_run=True).conclude()
        watch("prior", rows(MIDDLES)).conclude()
        watch("learned").conclude()  # nothing was trained
        assert caplog.text == ""
        far = watch("learned", rows(MIDDLES, logvar=fixed_point + off))
        far.conclude()
        watch("learned", rows(MIDDLES, logvar=fixed_point - 1.2)).conclude()
    assert "at t from 1.51 to 1.54 logvar is 2.5 above its fixed point" in caplog.text
    assert "logvar is 1.2 below its fixed point" in caplog.text and "`loss_weighting` uniform" in caplog.text
    weights = (-off).exp()
    large = weights[:4].sum() / weights.sum()
    assert far._run.said == [
        f"Share of the loss's weight: {large:.1%} at t above 1.43, {1 / weights.sum():.1%} below 0.18"
    ]
