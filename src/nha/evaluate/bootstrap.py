"""How sure a mean is: bootstrap intervals over documents or rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

LEVEL, RESAMPLES = 0.95, 2000


def interval(
    values: ArrayLike, *, seed: int = 0, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The percentile bootstrap interval (Efron 1979) of the mean of `values` [N], one per document or row.

    For a difference of two models give the differences on the same rows: what the rows share cancels. Values that are
    all equal give an interval without width, which for shares of 0 or 1 is too sure: up to 3 / N may be missing.

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
