"""How far apart two sets of pictures are, how varied one is, how decided, and how sure of it one can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


RESAMPLES = 200  # their standard deviation is known to about 5%
CONFIDENCE = 0.95
KERNEL_SUBSETS = 20
LEAST_SUBSETS = 3  # without one, pictures of two prompts are left to make a pair
NEIGHBOURS = 3  # Kynkaanniemi et al.'s choice
ROUNDING = 1e-12  # of squared distances in float64, against squared lengths
ROWS = 1024  # of a matrix between all features that are in memory at a time


class Estimate(NamedTuple):
    """A measured value and its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Tensor], float],
    count: int,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Measure a statistic of prompts with a confidence interval: value -+ z bootstrap standard errors.

    The interval is of what the statistic gives on average for this many prompts. Percentiles of the resamples would
    not be: a resample repeats prompts, which biases a Frechet distance or a recall as fewer prompts would.

    Args:
        statistic: gives the value for indices of prompts, int64 (count,), that may repeat.
        count: prompts, >= 2.
        resamples: how often prompts are drawn anew, with replacement.
        confidence: of the interval.
        seed: of the resamples. Equal seeds draw equal prompts, so that a difference is `bootstrap` of the difference.

    Returns:
        The value for all prompts, and the interval.

    Raises:
        ValueError: where there are fewer than 2 prompts or resamples.
    """
    if count < 2 or resamples < 2:
        raise ValueError(f"count is {count} and resamples {resamples}: an interval takes at least 2 of both")
    rng = np.random.default_rng(seed)
    values = [statistic(torch.from_numpy(rng.integers(count, size=count))) for _ in range(resamples)]
    value = statistic(torch.arange(count))
    margin = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.std(values, ddof=1))
    return Estimate(value, value - margin, value + margin)


def fit_gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a Gaussian.

    Args:
        features: (N, D), N >= 2.

    Returns:
        Mean (D,) and unbiased covariance (D, D), float64.
    """
    features = features.double()
    return features.mean(dim=0), features.T.cov().reshape(features.shape[1], -1)


def symmetric_root(matrix: Tensor) -> Tensor:
    """Take the square root of a covariance.

    Args:
        matrix: (D, D), symmetric and positive semidefinite up to rounding.

    Returns:
        (D, D), symmetric.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_distance(mean: Tensor, root: Tensor, features: Tensor) -> float:
    """Measure the squared Frechet distance between a Gaussian and the one fitted to features (Heusel et al., 2017).

    With the root of one covariance given, the other root's trace takes eigenvalues of a symmetric matrix only: ten
    times as fast as those of the product of covariances, for resamples against one reference.

    Args:
        mean: (D,), float64, of the reference.
        root: (D, D), float64, `symmetric_root` of its covariance.
        features: (N, D), N >= 2.

    Returns:
        The distance, >= 0 up to rounding. It is biased upwards by about 1 / N: compare at one N.
    """
    other_mean, other = fit_gaussian(features)
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + root.square().sum() + other.trace() - 2 * cross)


def kernel_distance(
    real: Tensor,
    generated: Tensor,
    *,
    prompts: Sequence[str] = (),
    real_prompts: Sequence[str] = (),
    subsets: int = KERNEL_SUBSETS,
    seed: int = 0,
) -> Estimate:
    """Measure the unbiased squared MMD over all pairs, with KID's kernel (x y / D + 1)^3 (Binkowski et al., 2018).

    Images of one prompt are alike for that reason alone: they make no pair, nor does an image with itself. KID's own
    mean over small subsets uses a part of the pairs only, and its subsets overlap. Here the interval is a jackknife:
    how the value changes without each of some disjoint random subsets of the prompts, the real images being given.

    Args:
        real: (N, D).
        generated: (M, D).
        prompts: what each generated image was drawn for, M names; none where each has a prompt of its own.
        real_prompts: the same of the real images, N names, or none; an image of the name "" has a prompt of its own.
        subsets: to leave out, 3 or more, at most one a prompt.
        seed: of the split.

    Returns:
        The value and its 95% interval. It is unbiased: 0 on average for equal distributions, whatever their numbers.

    Raises:
        ValueError: where there are too few prompts for the subsets, or real images of fewer than 2.
    """
    from scipy.stats import t as student_t
    from torchmetrics.image.kid import poly_kernel

    groups, groups_of_real = _groups(prompts, len(generated)), _groups(real_prompts, len(real))
    if not LEAST_SUBSETS <= subsets <= len(groups) or len(groups_of_real) < 2:
        raise ValueError(
            f"subsets is {subsets} for {len(groups)} prompts, and {len(groups_of_real)} of real images: it takes"
            f" {LEAST_SUBSETS} or more, at most one a prompt, and 2"
        )
    real, generated = real.double(), generated.double()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(groups)) % subsets)  # a prompt's subset
    of_picture = torch.empty(len(generated), dtype=torch.long)
    for subset, group in zip(order, groups.values(), strict=True):
        of_picture[group] = subset
    member, sizes = F.one_hot(of_picture, subsets).double(), torch.bincount(of_picture, minlength=subsets).double()

    # Sums of the kernel, and numbers of pairs, over all pairs less those of one prompt
    within = torch.zeros(subsets, subsets, dtype=torch.double)
    across = torch.zeros(subsets, dtype=torch.double)
    for rows, of_subset in zip(generated.split(ROWS), member.split(ROWS), strict=True):
        within += of_subset.T @ poly_kernel(rows, generated) @ member
        across += of_subset.T @ poly_kernel(rows, real).sum(dim=1)
    pairs_within, pairs_across = sizes[:, None] * sizes, sizes * len(real)
    for subset, (name, group) in zip(order, groups.items(), strict=True):
        within[subset, subset] -= poly_kernel(generated[group], generated[group]).sum()
        pairs_within[subset, subset] -= len(group) ** 2
        if (of_real := groups_of_real.get(name)) is not None:
            across[subset] -= poly_kernel(generated[group], real[of_real]).sum()
            pairs_across[subset] -= len(group) * len(of_real)
    within_real = sum(float(poly_kernel(rows, real).sum()) for rows in real.split(ROWS))
    within_real -= sum(float(poly_kernel(real[group], real[group]).sum()) for group in groups_of_real.values())
    within_real /= len(real) ** 2 - sum(len(group) ** 2 for group in groups_of_real.values())

    def value(kept: Tensor) -> float:
        of_generated = within[kept][:, kept].sum() / pairs_within[kept][:, kept].sum()
        return within_real + float(of_generated - 2 * across[kept].sum() / pairs_across[kept].sum())

    estimate = value(torch.arange(subsets))
    without = [value(torch.tensor([i for i in range(subsets) if i != left_out])) for left_out in range(subsets)]
    error = float(np.std(without)) * (subsets - 1) ** 0.5
    margin = float(student_t.ppf((1 + CONFIDENCE) / 2, df=subsets - 1)) * error
    return Estimate(estimate, estimate - margin, estimate + margin)


def _groups(prompts: Sequence[str], count: int) -> dict[object, list[int]]:
    """Which images are of each prompt, by its name; one without a name has a prompt of its own."""
    groups: dict[object, list[int]] = {}
    for place, prompt in enumerate(prompts or [""] * count):
        groups.setdefault(prompt or object(), []).append(place)
    return groups


def within_balls(features: Tensor, centres: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Say which features lie in the manifold of others: a ball around each up to its k-th neighbour.

    Args:
        features: (M, D).
        centres: (N, D), N > k, whose manifold it is.
        k: which neighbour (Kynkaanniemi et al., 2019).

    Returns:
        (M, N), bool: whether feature m lies in the ball around centre n.

    Raises:
        ValueError: where there are not more than k centres.
    """
    if len(centres) <= k:
        raise ValueError(f"k is {k} for {len(centres)} features: it takes more features than neighbours")
    features, centres = features.double(), centres.double()
    # Every centre is its own first neighbour.
    radii = torch.cat([_squared_distances(rows, centres).kthvalue(k + 1).values for rows in centres.split(ROWS)])
    radii += ROUNDING * centres.square().sum(dim=1).max()  # copies are at distance 0 up to rounding
    return torch.cat([_squared_distances(rows, centres) <= radii for rows in features.split(ROWS)])


def precision_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Measure how much of what is generated is like real images, and how much of the real ones is covered.

    Args:
        real: (N, D), N > k.
        generated: (M, D), M > k.
        k: the neighbour that sets the radius of a manifold's balls.

    Returns:
        Precision, the share of generated images in the real ones' manifold, and recall, the converse.

    Raises:
        ValueError: where a set has not more than k features.
    """
    shares = [within_balls(*pair, k).any(dim=1).double().mean() for pair in ((generated, real), (real, generated))]
    return float(shares[0]), float(shares[1])


def _squared_distances(rows: Tensor, centres: Tensor) -> Tensor:
    return rows.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1) - 2 * rows @ centres.T


def diversity(features: Tensor) -> Tensor:
    """Measure how much the pictures of each prompt differ: 0 where all are copies, as after mode collapse.

    Args:
        features: (P, M, D), of M >= 2 pictures of each of P prompts.

    Returns:
        (P,), float64, mean cosine distance of two different pictures of a prompt.

    Raises:
        ValueError: where there is one picture a prompt.
    """
    pictures = features.shape[1]
    if pictures < 2:
        raise ValueError(f"features have {pictures} picture a prompt: diversity takes at least 2")
    unit = F.normalize(features.double(), dim=-1)
    similarity = (unit.sum(dim=1).square().sum(dim=-1) - pictures) / (pictures * (pictures - 1))
    return 1 - similarity


def mirror_products(pictures: Tensor, teacher: Tensor) -> Tensor:
    """Measure pictures along the line from the teacher's mirror image m to the teacher's own picture x, in pixels.

    The projection of a picture p on that line, with its middle as 0 and x as 1, is
    2 <p - m, x - m> / |x - m|^2 - 1 = 2 <p, x - m> / |x - m|^2, as x and m are equally long.

    Args:
        pictures: p, (N, 3, H, W), of a student.
        teacher: x, (N, 3, H, W), of the same prompts and noises.

    Returns:
        (N, 2), float64: numerator and denominator of each.

    Raises:
        ValueError: where the shapes differ.
    """
    if pictures.shape != teacher.shape:
        raise ValueError(
            f"pictures are {tuple(pictures.shape)} and the teacher's {tuple(teacher.shape)}: each takes its own"
        )
    picture, axis = pictures.double(), teacher.double() - teacher.double().flip(-1)
    return torch.stack([2 * (picture * axis).flatten(1).sum(dim=1), axis.square().flatten(1).sum(dim=1)], dim=1)


def decisiveness(products: Tensor) -> float:
    """Measure whether pictures choose between a teacher's picture and its mirror image, and as the teacher does.

    A teacher that draws a subject facing either way leaves the choice to the noise. A student that hedges draws both
    at once. A ratio of sums: a nearly symmetric picture, for which there is nothing to choose, hardly counts.

    Args:
        products: (N, 2), `mirror_products` of the pictures.

    Returns:
        1 for the teacher's pictures; 0 for pictures halfway to their mirror images, for symmetric ones, and on average
        for those that choose regardless of the noise; -1 for the mirror images. NaN where all of the teacher's
        pictures are symmetric.
    """
    along, whole = products.double().sum(dim=0).tolist()
    return along / whole if whole else float("nan")
