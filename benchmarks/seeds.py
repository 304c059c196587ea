"""What several seeds say together."""

import math

import pandas
from scipy import stats


def seed_interval(differences: pandas.Series) -> tuple[float, float]:
    """Average differences between runs of one seed.

    Args:
        differences: one a seed.

    Returns:
        Their mean, and half of Student's 95% interval of it, NaN for a single seed.
    """
    count = len(differences)
    half = stats.t.ppf(0.975, count - 1) * differences.sem() if count > 1 else math.nan
    return float(differences.mean()), float(half)


def seeds_in_words(differences: pandas.Series, spec: str) -> str:
    """Write `seed_interval`, such as "+1.5 (-4.85 to +7.85)".

    Args:
        differences: one a seed.
        spec: the format of each number.

    Returns:
        The mean and, of several seeds, the ends of its interval.
    """
    mean, half = seed_interval(differences)
    return f"{mean:{spec}}" + ("" if math.isnan(half) else f" ({mean - half:{spec}} to {mean + half:{spec}})")
