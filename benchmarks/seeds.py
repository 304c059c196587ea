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
