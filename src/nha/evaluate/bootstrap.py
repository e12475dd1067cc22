"""Confidence intervals of means: bootstrap over documents, and Wilson's interval for counts."""

from __future__ import annotations

from collections.abc import Sequence
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
    means = _drawn_means(given, np.random.default_rng(seed), resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _drawn_means(values: np.ndarray, random: np.random.Generator, resamples: int) -> np.ndarray:
    """Means [resamples] of as many values [N], drawn with replacement."""
    return values[random.integers(0, len(values), (resamples, len(values)))].mean(1)


def nested_interval(
    groups: Sequence[ArrayLike], *, inner: bool = True, seed: int = 0, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over groups, of seeds for example, of their means.

    Groups are drawn with replacement, and so are the values of each that is drawn, unless they are no sample (`inner`
    False). Of three groups the interval ends near the least and the greatest mean.

    Raises ValueError for no group and for one without values.

    >>> low, high = nested_interval([[1.0, 1.0], [2.0], [3.0]])
    >>> (low, high)
    (1.0, 3.0)
    """
    given = [np.asarray(values, dtype=np.float64).ravel() for values in groups]
    if not given or not all(map(len, given)):
        raise ValueError(f"expected groups with values, got lengths {[len(values) for values in given]}")
    random = np.random.default_rng(seed)
    means = np.stack(
        [_drawn_means(values, random, resamples) if inner else np.full(resamples, values.mean()) for values in given]
    )
    chosen = random.integers(0, len(given), (len(given), resamples))
    low, high = np.quantile(means[chosen, np.arange(resamples)].mean(0), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson(successes: float, trials: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval (1927) of a probability from `successes` out of `trials`.

    Raises ValueError unless 0 <= successes <= trials and trials >= 1.

    >>> low, high = wilson(30, 30)
    >>> round(low, 3), high
    (0.886, 1.0)
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"expected 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * ((p * (1 - p) + z * z / (4 * trials)) / trials) ** 0.5
    return max(0.0, min(middle - half, p)), min(1.0, max(middle + half, p))  # rounding must not leave p outside
