"""Confidence intervals of means: bootstrap over documents, and Wilson's interval for counts."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

LEVEL, RESAMPLES = 0.95, 2000


def interval(
    values: ArrayLike, *, seed: int = 0, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The percentile bootstrap interval (Efron 1979) of the mean of `values` [N], one per document or sequence.

    For a difference of two models pass the differences on the same documents. Equal values give an interval of width
    0, which for fractions of 0 or 1 is too narrow by up to 3 / N: use `wilson` for counts.

    Raises ValueError for no values and for a level outside 0 to 1.

    >>> interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    >>> low, high = interval(np.arange(100.0))
    >>> low < 49.5 < high
    True
    """
    given = np.asarray(values, dtype=np.float64).ravel()
    if not len(given):
        raise ValueError("expected at least one value, got none")
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, got {level}")
    drawn = np.random.default_rng(seed).integers(0, len(given), (resamples, len(given)))
    means = given[drawn].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson(successes: float, trials: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval (1927) of a probability from `successes` out of `trials`.

    Raises ValueError unless 0 <= successes <= trials and trials >= 1.

    >>> low, high = wilson(30, 30)
    >>> round(low, 3), round(high, 3)
    (0.886, 1.0)
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"expected 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * ((p * (1 - p) + z * z / (4 * trials)) / trials) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
