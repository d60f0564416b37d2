"""Intervals against worked values, a simulation and the plain t interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from longctx.eval.stats.intervals import (
    LEAST,
    clustered_wilson,
    jackknife_interval,
    mean_interval,
    wilson,
)


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
    mean, low, high = mean_interval([10.0, 90.0, 50.0], [10.0, 30.0, 20.0], list("abc"))
    assert mean == 2.5
    assert low < 2.5 < high


def test_below_three_clusters_there_is_no_interval_and_of_nothing_no_mean() -> None:
    for clusters in (["a", "a"], ["a", "b"]):
        mean, low, high = mean_interval([3.0, 5.0], [1.0, 1.0], clusters)
        assert mean == 4.0
        assert math.isnan(low)
        assert math.isnan(high)
    assert all(map(math.isnan, mean_interval([], [], [])))
    assert all(map(math.isnan, mean_interval([1.0, math.nan], [1.0, 1.0], ["a", "b"])))


def test_how_much_wider_few_clusters_make_an_interval() -> None:
    """Half of an interval over n normal values, on average, against that of a known spread."""

    def ratio(n: int) -> float:
        mean_of_s = math.sqrt(2 / (n - 1)) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
        return float(stats.t.ppf(0.975, n - 1) * mean_of_s / stats.norm.ppf(0.975))

    assert [round(ratio(n), 1) for n in (2, LEAST, 5)] == [5.2, 1.9, 1.3]


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        level = rng.normal(3.0, 0.5, size=8)  # documents differ, their tokens resemble each other
        sums = [float(rng.normal(mean, 1.0, size=50).sum()) for mean in level]
        _, low, high = mean_interval(sums, [50.0] * 8, [str(i) for i in range(8)])
        covered += low < 3.0 < high
    assert 0.92 < covered / 400 < 0.98


def test_independent_trials_are_wilson_up_to_t() -> None:
    # Clusters of one trial each: the design effect is n/(n − 1), and t takes the place of z.
    hits = [True] * 30 + [False] * 70
    names = [str(i) for i in range(100)]
    share, low, high = clustered_wilson(hits, names, names)
    assert share == 0.3
    assert (low, high) == pytest.approx(wilson(30, 100), abs=0.004)
    assert high - low > np.diff(wilson(30, 100))[0]


def test_copies_of_a_trial_say_nothing_new() -> None:
    hits, names = [True, False, False, True, False] * 4, [str(i) for i in range(20)]
    once = clustered_wilson(hits, names, names)
    thrice = clustered_wilson(hits * 3, names * 3, names * 3)
    assert thrice == pytest.approx(once)


def test_where_all_agree_units_are_counted() -> None:
    documents = [str(i // 8) for i in range(80)]
    prompts = [i // 4 for i in range(80)]
    share, low, high = clustered_wilson([False] * 80, documents, prompts)
    assert (share, low) == (0.0, 0.0)
    assert wilson(0, 20)[1] < high < wilson(0, 12)[1]
    assert clustered_wilson([True] * 80, documents, prompts) == pytest.approx((1, 1 - high, 1))
    assert all(map(math.isnan, clustered_wilson([True, False], ["a", "a"], [0, 1])[1:]))
    assert all(map(math.isnan, clustered_wilson([], [], [])))


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_shares_of_clusters_are_covered_where_wilson_is_not(share: float) -> None:
    rng = np.random.default_rng(1)
    documents = [str(i // 20) for i in range(200)]
    prompts = [i // 4 for i in range(200)]
    covered = plain = 0
    for _ in range(300):  # 10 documents of 5 prompts of 4 samples, which hang together
        level = rng.beta(share * 9, (1 - share) * 9, size=(10, 1)).repeat(5, 1).clip(1e-6, 1 - 1e-6)
        prompt = rng.beta(level * 3, (1 - level) * 3)
        hits = (rng.random((10, 5, 4)) < prompt[..., None]).ravel().tolist()
        _, low, high = clustered_wilson(hits, documents, prompts)
        covered += low <= share <= high
        low, high = wilson(sum(hits), 200)
        plain += low <= share <= high
    assert covered / 300 > 0.9
    assert plain / 300 < 0.85


def test_shares_of_the_default_cell_of_keys_are_covered_where_wilson_is_not() -> None:
    """50 prompts in repeated sentences, all found, and ten in each of five stretches of text."""
    rng = np.random.default_rng(2)
    clusters = [*(f"text/{i // 10}" for i in range(50)), *(f"grass/{i}" for i in range(50))]
    covered = plain = 0
    for _ in range(400):
        level = rng.beta(0.7 * 7 / 3, 0.3 * 7 / 3, size=5).repeat(
            10
        )  # correlation 0.3 in a stretch
        hits = [*(rng.random(50) < level).tolist(), *[True] * 50]
        _, low, high = clustered_wilson(hits, clusters, range(100))
        covered += low <= 0.85 <= high
        low, high = wilson(sum(hits), 100)
        plain += low <= 0.85 <= high
    assert covered / 400 > 0.9
    assert plain / 400 < 0.75


def test_the_jackknife_of_a_mean_is_the_t_interval() -> None:
    values = {"a": [1.0], "b": [4.0], "c": [2.5], "d": [7.0]}
    found = jackknife_interval(lambda items: sum(items) / len(items), values)
    flat = [value for (value,) in values.values()]
    assert found == pytest.approx(mean_interval(flat, [1.0] * 4, list("abcd")))
    assert all(map(math.isnan, jackknife_interval(len, {"a": [1, 2]})[1:]))


def test_the_jackknife_covers_an_entropy() -> None:
    def entropy(items: Sequence[Any]) -> float:
        counts = np.sum(items, axis=0)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log2(shares)).sum())

    rng = np.random.default_rng(2)
    common = 1 / np.arange(1, 101)
    found = []
    for _ in range(200):
        documents = [rng.multinomial(300, rng.dirichlet(common * 20)) for _ in range(8)]
        found.append(jackknife_interval(entropy, {str(i): [d] for i, d in enumerate(documents)}))
    truth = np.mean([value for value, _, _ in found])  # of so many tokens, not of more
    assert 0.9 < np.mean([low < truth < high for _, low, high in found]) < 0.99
