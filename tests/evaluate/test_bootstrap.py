"""Bootstrap intervals cover the truth as often as they say, and pairing makes differences sharper."""

from __future__ import annotations

import numpy as np
import pytest

from nha.evaluate.bootstrap import interval, wilson


@pytest.mark.parametrize("draw", ["normal", "coin"])
def test_intervals_cover_the_truth_as_often_as_they_say(draw):
    generator, hits, trials = np.random.default_rng(0), 0, 500
    for trial in range(trials):
        values = generator.normal(2.0, 1.0, 50) if draw == "normal" else generator.random(50) < 0.7
        low, high = interval(values, seed=trial, resamples=500)
        hits += low <= (2.0 if draw == "normal" else 0.7) <= high
    # 3 standard errors of a share of 0.95 over 500 trials, and 1 to 2 % that percentile intervals lack at N = 50
    assert 0.90 <= hits / trials <= 0.98


def test_an_interval_of_a_count_holds_its_share_and_a_sure_one_ends_there():
    for trials in range(1, 200):
        for successes in (0, trials // 3, trials):
            low, high = wilson(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1
        assert wilson(0, trials)[0] == 0 and wilson(trials, trials)[1] == 1


def test_differences_on_the_same_rows_are_sharper_than_the_rows():
    generator = np.random.default_rng(1)
    rows = generator.normal(3.0, 1.0, 64)
    first, second = rows + generator.normal(0, 0.01, 64), rows + 0.02
    low, high = interval(second - first)
    assert low > 0
    assert high - low < 0.05 * (interval(rows)[1] - interval(rows)[0])


def test_intervals_are_a_function_of_values_and_seed():
    values = np.random.default_rng(2).random(30)
    assert interval(values, seed=4) == interval(values, seed=4) != interval(values, seed=5)


@pytest.mark.parametrize(
    "values, options, message",
    [([], {}, "expected at least one value, got none"), ([1.0], {"level": 1.0}, "expected a level between 0 and 1")],
)
def test_what_has_no_interval_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        interval(values, **options)


@pytest.mark.parametrize("p, n", [(0.5, 40), (0.95, 40), (0.02, 200)])
def test_wilson_intervals_cover_the_truth_as_often_as_they_say(p, n):
    # the exact probability, a sum over all counts; Wilson's is within 4 points of its level at these sizes
    from math import comb

    covered = sum(
        comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1]
    )
    assert covered == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize("successes, trials", [(0, 0), (-1, 3), (4, 3)])
def test_counts_that_cannot_be_have_no_interval(successes, trials):
    with pytest.raises(ValueError, match="expected 0 <= successes <= trials"):
        wilson(successes, trials)
