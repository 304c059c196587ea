"""The mixture in the plane: the method converges there, its control does not, and a study goes on where it ended."""

import json
from functools import cache, partial

import pandas
import pytest
import torch
from scipy import stats

from benchmarks.toy import report, study
from benchmarks.toy.methods import LCM, LCM_GRID, Consistency, Endpoint, record
from benchmarks.toy.mixture import CLASSES, RADIUS, energy_distance, modes, ode_ends, real_samples
from benchmarks.toy.network import FAMILY, Exact, Network, learn, pretrain, trig
from benchmarks.toy.training import Judge, Phase, distil
from diffusers_tbcm.flow import FlowTransformer
from diffusers_tbcm.trigflow import SIGMA_DATA


def rows_of(places, rows=2**9, **changes):
    options = {"guidance": 3.0, "num_steps": 16, "dim": 2, "seed": 1} | changes
    return record(places, trig(Exact()), rows, **options)


def test_the_recommended_setting_converges_to_the_teachers_guided_ode_and_its_control_does_not():
    """In two thirds of the study's updates; the bounds on a converged student are those of the study at its end."""
    start, judge = pretrain(1000, width=128), Judge(Exact(), 3.0, points=1024)
    untrained, recording = judge(start), rows_of("trajectory", 2**16)
    warm = distil(start, recording, [Phase(Endpoint(), 1500, 3e-3)], seed=0)
    found, control = (
        judge(distil(warm, recording, [Phase(Consistency(sign=sign), 400, 1e-4)], seed=0)) for sign in (1, -1)
    )
    assert untrained["RMSE"] > 0.4
    assert found["RMSE"] < 0.1 and found["energy distance"] < 0.005 and found["right mode"] > 0.99
    assert control["RMSE"] > 0.1 and control["energy distance"] > 0.005


def test_the_ode_ends_where_twice_as_many_steps_end_and_at_the_data_without_guidance():
    noise, generator = (
        torch.randn(512, 2, generator=torch.Generator().manual_seed(0)),
        torch.Generator().manual_seed(1),
    )
    classes = torch.arange(512) % CLASSES
    teacher = FlowTransformer(Exact(), backbone=FAMILY)
    ends, closer = (ode_ends(teacher, noise, classes, 3.0, steps) for steps in (200, 400))
    assert (ends - closer).abs().median() < 1e-3
    plain = ode_ends(teacher, noise, classes, 1.0)
    one = classes == 0
    assert energy_distance(plain[one], real_samples(classes[one], generator)) < 0.05  # of 128 points; 1.3 untrained


@pytest.mark.parametrize("dim", [2, 3, 32])
def test_modes_are_opposite_and_as_far_per_element_in_every_dimension(dim):
    centres = modes(dim)
    torch.testing.assert_close(centres[::2], -centres[1::2])
    torch.testing.assert_close(centres.square().mean(1), torch.full((8,), RADIUS**2 / 2))


def test_rows_lie_where_their_method_has_them():
    trajectory, same_times = rows_of("trajectory"), rows_of("noised, route's times")
    assert torch.equal(trajectory.rows().timesteps, same_times.rows().timesteps)
    assert not torch.equal(rows_of("noised").rows().timesteps[: len(same_times)], same_times.rows().timesteps)
    assert set(rows_of("noised, grid").rows().timesteps.tolist()) <= set(LCM_GRID.tolist())
    ends = trajectory.rows(torch.arange(15)).pred_original_sample
    assert torch.equal(ends, ends[:1].expand(15, -1))


def test_lcm_agrees_with_the_next_point_of_the_grid():
    """f = -t: the loss is the length of the interval, on unit scale."""
    rows = rows_of("noised, grid").rows(torch.arange(64))
    inner = rows.timesteps > LCM_GRID[-1]  # after the last comes t = 0, where f is the sample whatever F says
    rows = rows_of("noised, grid").rows(torch.arange(64)[inner])

    def student(sample, t, **_):
        return ((torch.cos(t)[:, None] * SIGMA_DATA * sample + t[:, None]) / torch.sin(t)[:, None]) / SIGMA_DATA

    place = torch.tensor([LCM_GRID.tolist().index(t) for t in rows.timesteps.tolist()])
    length = (LCM_GRID[place] - LCM_GRID[place + 1]) / SIGMA_DATA
    assert LCM()(student, rows).item() == pytest.approx(length.mean().item(), abs=1.5e-3)  # Huber's c is .001


def test_weights_of_a_row():
    """A head of zeros is the prior weight, and the prior weight is w(t) of the uniform loss, row by row."""
    torch.manual_seed(0)
    student, rows = trig(Network(16)), rows_of("trajectory").rows(torch.arange(8))

    def gradient(weighting):
        student.zero_grad()
        Consistency(weighting)(student, rows).backward()
        return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])

    torch.testing.assert_close(gradient("learned"), gradient("prior"))
    rows = rows_of("trajectory").rows(torch.tensor([9]))
    weight = 1 / (SIGMA_DATA * torch.tan(rows.timesteps))
    torch.testing.assert_close(gradient("prior"), weight * gradient("uniform"), rtol=1e-4, atol=1e-6)


def test_a_learned_teacher_takes_the_empty_prompt():
    """It is nearer to the exact velocity after more updates, with and without a prompt."""
    rows = rows_of("noised").rows(torch.arange(400))
    empty = {name: value * 0 for name, value in rows.text.arguments().items()}

    def error(network, words):
        sample = rows.latents / SIGMA_DATA
        difference = trig(network)(sample, rows.timesteps, **words) - trig(Exact())(sample, rows.timesteps, **words)
        return difference.square().mean().item()

    short, longer = learn(5, width=64), learn(150, width=64)
    assert error(longer, rows.text.arguments()) < 0.5 * error(short, rows.text.arguments())
    assert error(longer, empty) < 0.8 * error(short, empty)


def test_the_difference_is_the_paired_t_interval():
    first, second = pandas.Series({0: 0.1, 1: 0.3, 2: 0.2}), pandas.Series({0: 0.2, 1: 0.31, 2: 0.25})
    low, high = stats.ttest_rel(first, second).confidence_interval()
    assert report.difference(first, second, 3) == f"{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}"
    assert report.difference(first[:1], second, 3) == "-0.100"


@cache
def small_judge(guidance, dim, teacher):
    return Judge(study.networks(dim, teacher)[0], guidance, dim, points=32)


@cache
def small_networks(dim, teacher):
    network = Network(study.WIDTH, dim)
    return (network if teacher else Exact()), network


def test_a_study_goes_on_where_it_was_ended_and_writes_its_tables_and_figures(tmp_path, monkeypatch):
    brief = {
        name: study.Method(method.places, lambda made=method.phases: [Phase(made()[-1].loss, 1, 1e-4)])
        for name, method in study.METHODS.items()
    }
    for name, value in {
        "METHODS": brief, "ROWS": 2**9, "CDM_UPDATES": 1, "RUNS": tmp_path / "runs", "RESULTS": tmp_path,
        "judge_of": small_judge, "networks": small_networks,
    }.items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "write_results", partial(study.write_results, folder=tmp_path))
    monkeypatch.setattr(report, "drift", lambda teacher, guidance, dim: guidance)
    last = study.settings_of("rows", 1)[-1]
    trained = []
    monkeypatch.setattr(study, "train", lambda setting, made=study.train: trained.append(setting) or made(setting))
    made, _ = study.student_of(last)
    threads = torch.get_num_threads()
    study.main(["--seeds", "2"])
    assert torch.get_num_threads() == threads  # which other tests' sums depend on
    assert len(trained) == len(set(trained)) and trained[0] == last
    for name in ("toy_methods", "toy_rows"):
        assert all((tmp_path / f"{name}{suffix}").stat().st_size for suffix in (".json", ".md", ".png"))
    lines = json.loads((tmp_path / "toy_methods.json").read_text())["rows"]
    assert [line["student"] for line in lines] == list(study.FIRST) and {line["seeds"] for line in lines} == {2}
    assert set(trained) == {one for seed in (0, 1) for name in study.REPORTS for one in study.settings_of(name, seed)}
    kept = study.student_of(last)[0].state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in made.state_dict().items())
