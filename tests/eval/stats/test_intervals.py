"""Intervals against worked values, a simulation and the plain t interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from longctx.eval.stats.intervals import mean_interval, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3; so are the next two
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),  # mirrors 0 of 20
    ],
)
def test_wilson(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_of_nothing() -> None:
    assert all(math.isnan(end) for end in wilson(0, 0))


def test_equal_weights_are_the_plain_t_interval() -> None:
    values = [1.0, 4.0, 2.5, 3.0, 7.0]
    found = mean_interval(values, [1.0] * 5, list("abcde"))
    plain = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert found == pytest.approx((np.mean(values), *plain))


def test_a_cluster_counts_once() -> None:
    once = mean_interval([2.0, 6.0, 4.0], [2.0, 2.0, 2.0], list("abc"))
    halves = mean_interval([1.0, 1.0, 3.0, 3.0, 2.0, 2.0], [1.0] * 6, list("aabbcc"))
    assert halves == pytest.approx(once)


def test_the_mean_is_weighted_by_tokens() -> None:
    mean, low, high = mean_interval([10.0, 90.0], [10.0, 30.0], ["a", "b"])
    assert mean == 2.5
    assert low < 2.5 < high


def test_one_cluster_has_no_interval_and_nothing_no_mean() -> None:
    mean, low, high = mean_interval([3.0, 5.0], [1.0, 1.0], ["a", "a"])
    assert mean == 4.0
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(map(math.isnan, mean_interval([], [], [])))
    assert all(map(math.isnan, mean_interval([1.0, math.nan], [1.0, 1.0], ["a", "b"])))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        level = rng.normal(3.0, 0.5, size=8)  # documents differ, their tokens resemble each other
        sums = [float(rng.normal(mean, 1.0, size=50).sum()) for mean in level]
        _, low, high = mean_interval(sums, [50.0] * 8, [str(i) for i in range(8)])
        covered += low < 3.0 < high
    assert 0.92 < covered / 400 < 0.98
