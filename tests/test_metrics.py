import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from diffusers_tbcm.evaluation.metrics import (
    bootstrap,
    decisiveness,
    diversity,
    fit_gaussian,
    frechet_distance,
    kernel_distance,
    mirror_products,
    precision_recall,
    symmetric_root,
    within_balls,
)


def normal(count, size=6, seed=0, mean=0.0, scale=1.0):
    return mean + scale * torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def distance(first, second):
    mean, covariance = fit_gaussian(first)
    return frechet_distance(mean, symmetric_root(covariance), second)


def with_moments(count, mean, covariance, seed):
    """Features whose sample mean and covariance are exactly these."""
    raw = normal(count, len(mean), seed)
    raw = raw - raw.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(raw.T.cov()), raw.T, upper=False).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def covariance(size, seed):
    factor = normal(size, size, seed)
    return factor @ factor.T / size + 0.1 * torch.eye(size, dtype=torch.double)


class Identity(torch.nn.Module):
    num_features = 6

    def forward(self, features):
        return features


def kernel(x, y):
    return (x @ y / len(x) + 1) ** 3


def test_frechet_distance_of_gaussians_is_the_closed_form():
    zero, shift = torch.zeros(3, dtype=torch.double), torch.tensor([1.0, -2.0, 0.5], dtype=torch.double)
    first, second = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    features = with_moments(50, zero, first.diag(), 0), with_moments(70, shift, second.diag(), 1)
    assert distance(*features) == pytest.approx(5.25 + 1 + 1 + 2.5**2, rel=1e-9)  # |m|^2 + sum (s1 - s2)^2
    assert distance(*reversed(features)) == pytest.approx(13.5, rel=1e-9)


def test_frechet_distance_is_scipys_and_torchmetrics():
    first, second = normal(40) @ covariance(6, 3), normal(90, seed=1) @ covariance(6, 4) + 0.3
    (mean, one), (other_mean, other) = fit_gaussian(first), fit_gaussian(second)
    root = torch.from_numpy(sqrtm((one @ other).numpy()).real)
    expected = (mean - other_mean).square().sum() + one.trace() + other.trace() - 2 * root.trace()
    assert distance(first, second) == pytest.approx(float(expected), rel=1e-9)
    metric = FrechetInceptionDistance(feature=Identity())
    metric.update(first, real=True)
    metric.update(second, real=False)
    assert distance(first, second) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_distance_of_a_set_from_itself_is_zero_even_without_full_rank():
    assert distance(normal(50), normal(50)) == pytest.approx(0, abs=1e-9)
    assert distance(normal(5), normal(5)) == pytest.approx(0, abs=1e-6)  # the root of a rounded 0 is 1e-8


def test_kernel_distance_is_torchmetrics_over_all_pairs():
    real, generated = normal(60), normal(60, seed=1, mean=0.2)
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=60)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    for subsets in (3, 7, 60):  # which only the interval depends on
        assert kernel_distance(real, generated, subsets=subsets).value == pytest.approx(float(metric.compute()[0]))


def test_kernel_distance_and_its_jackknife_are_those_of_explicit_sums():
    """Images of one prompt, in any order and on either side, make no pair."""
    real, generated = normal(6, 3), normal(8, 3, seed=1, mean=0.5)
    prompts, real_prompts = [*"abcdabda"], [*"aaxb", "", ""]
    distinct = [*"aaxb", 4, 5]

    def mean(left, right):
        return sum(pairs := [float(kernel(x, y)) for name, x in left for other, y in right if name != other]) / len(
            pairs
        )

    def explicit(without):
        drawn = [each for each in zip(prompts, generated, strict=True) if each[0] not in without]
        given = [*zip(distinct, real, strict=True)]
        return mean(drawn, drawn) + mean(given, given) - 2 * mean(drawn, given)

    measured = kernel_distance(real, generated, prompts=prompts, real_prompts=real_prompts, subsets=4)
    assert measured.value == pytest.approx(explicit(""), rel=1e-9)
    without = [explicit(prompt) for prompt in "abcd"]
    error = (3 / 4 * sum((value - sum(without) / 4) ** 2 for value in without)) ** 0.5
    assert measured.high - measured.value == pytest.approx(3.182446305284263 * error, rel=1e-6)  # t with 3 degrees
    assert measured.value - measured.low == pytest.approx(measured.high - measured.value)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("each", [1, 4])
def test_kernel_distance_is_unbiased_and_its_interval_holds_0_whatever_images_are_of_one_prompt(each, shared):
    """Images lie about their prompts' centres; the real ones are of the same prompts, or of none of them."""
    prompts = [f"prompt {place}" for place in range(30) for _ in range(each)]
    trials = []
    for seed in range(100):
        centres, others = normal(30, 4, seed=4 * seed), normal(120, 4, seed=4 * seed + 1)
        drawn = centres.repeat_interleave(each, 0) + 0.3 * normal(30 * each, 4, seed=4 * seed + 2)
        real = (centres.repeat_interleave(2, 0) if shared else others[:60]) + 0.3 * normal(60, 4, seed=4 * seed + 3)
        names = [f"prompt {place}" for place in range(30) for _ in range(2)] if shared else []
        trials.append(kernel_distance(real, drawn, prompts=prompts, real_prompts=names))
    values = np.array([trial.value for trial in trials])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    if shared:  # the interval takes the real images as given: what others there might have been is not in it
        assert np.mean([trial.low <= 0 <= trial.high for trial in trials]) >= 0.9


@pytest.mark.parametrize("mean", [0.0, 0.2])
def test_kernel_distance_intervals_cover_what_is_true_on_average(mean):
    real = normal(100, 4)
    trials = [kernel_distance(real, normal(100, 4, seed=1 + s, mean=mean)) for s in range(200)]
    truth = np.mean([trial.value for trial in trials])
    assert 0.9 <= np.mean([trial.low <= truth <= trial.high for trial in trials]) <= 0.99


def test_kernel_distance_refuses_too_few_images():
    with pytest.raises(ValueError, match="subsets is 20 for 19 prompts, and 50 of real images"):
        kernel_distance(normal(50), normal(38), prompts=[str(place % 19) for place in range(38)])
    with pytest.raises(ValueError, match="subsets is 2 "):
        kernel_distance(normal(50), normal(50), subsets=2)
    with pytest.raises(ValueError, match="and 1 of real images"):
        kernel_distance(normal(50), normal(50), real_prompts=["one"] * 50)


def test_precision_and_recall_by_hand():
    real, generated = torch.tensor([[0.0], [1], [3]]), torch.tensor([[0.5], [0.6], [10]])
    # balls of the real ones reach to -1..1, 0..2, 1..5; of the generated ones to 0.4..0.6, 0.5..0.7, 0.6..19.4
    inside = [[True, True, False], [True, True, False], [False, False, False]]
    assert within_balls(generated, real, k=1).tolist() == inside
    assert precision_recall(real, generated, k=1) == pytest.approx((2 / 3, 2 / 3))
    assert precision_recall(real, torch.tensor([[0.5], [0.6]]), k=1) == (1, 0)


def test_precision_and_recall_of_equal_and_of_distant_sets():
    features = normal(60)
    features[10:20] = features[0]  # copies: their balls have no radius, and still hold each other
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features + 100) == (0, 0)
    with pytest.raises(ValueError, match="k is 3 for 3 features"):
        precision_recall(features, features[:3])


def test_many_features_are_compared_in_parts(monkeypatch):
    whole = within_balls(normal(30), normal(40, seed=1))
    kernel_of_whole = kernel_distance(normal(30), normal(40, seed=1))
    monkeypatch.setattr("diffusers_tbcm.evaluation.metrics.ROWS", 7)
    assert torch.equal(within_balls(normal(30), normal(40, seed=1)), whole)
    assert kernel_distance(normal(30), normal(40, seed=1)) == pytest.approx(kernel_of_whole, rel=1e-9)


def test_diversity_is_the_mean_over_pairs():
    features = normal(4, 30).view(4, 5, 6)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    similarity = torch.nn.functional.cosine_similarity
    expected = [1 - float(sum(similarity(row[i], row[j], dim=0) for i, j in pairs)) / len(pairs) for row in features]
    torch.testing.assert_close(diversity(features), torch.tensor(expected).double())


def test_diversity_of_copies_is_zero_and_of_opposites_two():
    picture = normal(1, 8)
    copies, opposites = torch.stack([picture[0], 2 * picture[0]]), torch.stack([picture[0], -picture[0]])
    torch.testing.assert_close(diversity(torch.stack([copies, opposites])), torch.tensor([0.0, 2.0]).double())
    with pytest.raises(ValueError, match="1 picture a prompt"):
        diversity(picture[None])


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    values = torch.from_numpy(np.random.default_rng(0).exponential(size=400))
    estimate = bootstrap(lambda index: float(values[index].mean()), 400, resamples=2000)
    assert estimate.value == float(values.mean())
    assert estimate.high - estimate.value == pytest.approx(1.96 * float(values.std()) / 20, rel=0.06)
    assert estimate.value - estimate.low == pytest.approx(estimate.high - estimate.value)
    narrower = bootstrap(lambda index: float(values[index].mean()), 400, resamples=2000, confidence=0.5)
    assert (narrower.high - narrower.low) / (estimate.high - estimate.low) == pytest.approx(0.6745 / 1.96, rel=1e-4)
    with pytest.raises(ValueError, match="count is 1 and resamples 200"):
        bootstrap(lambda index: 0.0, 1)


@pytest.mark.parametrize("statistic", ["mean", "frechet distance"])
def test_bootstrap_intervals_cover_what_is_true_on_average(statistic):
    mean, covariance = torch.zeros(4, dtype=torch.double), torch.eye(4, dtype=torch.double)

    def measure(features):
        return float(features.exp().mean()) if statistic == "mean" else frechet_distance(mean, covariance, features)

    def sample(seed):
        return normal(80, 4, seed, mean=0.3, scale=0.8)

    truth = np.mean([measure(sample(1000 + seed)) for seed in range(500)])
    covered = 0
    for seed in range(100):
        features = sample(seed)
        estimate = bootstrap(lambda index, features=features: measure(features[index]), 80, resamples=40, seed=seed)
        covered += estimate.low <= truth <= estimate.high
    assert 0.9 <= covered / 100 <= 0.99


def images(count, seed=0):
    return torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_decisiveness_is_the_place_between_a_picture_and_its_mirror_image():
    teacher = images(5)
    mirrored = teacher.flip(-1)
    for share, expected in ((1, 1), (0.75, 0.5), (0.5, 0), (0, -1)):
        drawn = share * teacher + (1 - share) * mirrored
        assert decisiveness(mirror_products(drawn, teacher)) == pytest.approx(expected, abs=1e-6)  # float32 pictures
    symmetric = images(5, seed=1) + images(5, seed=1).flip(-1)
    assert decisiveness(mirror_products(symmetric, teacher)) == pytest.approx(0, abs=1e-6)
    # What both ways of facing share, and what neither has, is no decision.
    assert decisiveness(mirror_products(teacher + symmetric, teacher)) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"pictures are \(4, 3, 4, 6\) and the teacher's \(5, 3, 4, 6\)"):
        mirror_products(teacher[:4], teacher)


def test_the_products_are_the_projection_on_the_line_from_the_mirror_image():
    drawn, teacher = images(5, seed=1), images(5)
    along, whole = mirror_products(drawn, teacher).unbind(dim=1)
    for index in range(5):
        p, x, m = (picture.double().flatten() for picture in (drawn[index], teacher[index], teacher[index].flip(-1)))
        projection = (p - m) @ (x - m) / ((x - m) @ (x - m))
        assert float(along[index] / whole[index]) == pytest.approx(2 * float(projection) - 1, rel=1e-9)


def test_nearly_symmetric_pictures_hardly_count():
    teacher, drawn = images(6), images(6)
    symmetric = teacher[3:] + teacher[3:].flip(-1)
    teacher[3:] = symmetric / 2 + 1e-4 * (teacher[3:] - 0.5)
    drawn[3:] = 0.5 + 0.5 * teacher[3:].flip(-1) - 0.2 * teacher[3:]  # the wrong way, far beyond the mirror image
    assert decisiveness(mirror_products(drawn, teacher)) == pytest.approx(1, abs=1e-3)
    assert np.isnan(decisiveness(mirror_products(drawn[3:], symmetric)))
