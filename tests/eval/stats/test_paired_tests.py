"""Paired comparisons against worked examples, binomtest, enumeration, scipy and simulation."""

from __future__ import annotations

import itertools
import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from longctx.errors import DataError
from longctx.eval.stats.paired_tests import (
    cluster_bootstrap,
    holm,
    mcnemar,
    paired_bootstrap,
    sign_flip,
)

quick = settings(deadline=None, max_examples=50)  # a busy machine is not a failure
Triples = list[tuple[int, int, str]]
triples = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.sampled_from("abcdef")),
    min_size=1,
    max_size=40,
)


def columns(rows: Triples) -> tuple[list[int], list[int], list[str]]:
    return [a for a, _, _ in rows], [b for _, b, _ in rows], [c for _, _, c in rows]


def table(both: int, first: int, second: int, neither: int) -> tuple[list[int], list[int]]:
    a = [1] * both + [1] * first + [0] * second + [0] * neither
    b = [1] * both + [0] * first + [1] * second + [0] * neither
    return a, b


def test_mcnemar_by_hand() -> None:
    found = mcnemar(*table(5, 1, 6, 3))
    assert (found.both, found.only_first, found.only_second, found.neither) == (5, 1, 6, 3)
    assert found.difference == pytest.approx(5 / 15)
    assert found.p_value == pytest.approx(2 * (1 + 7) / 2**7)


def test_mcnemar_of_a_published_table() -> None:
    # Fagerland, Lydersen & Laake 2013, table 1 (airway hyper-responsiveness): 1 against 7 of 21;
    # they give 0.070
    a, b = table(1, 1, 7, 12)
    assert mcnemar(a, b).p_value == pytest.approx(0.0703125)


@quick
@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    a, b = table(2, first, second, 1)
    exact = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(a, b).p_value == pytest.approx(exact)


@quick
@given(triples)
def test_swapping_the_methods_changes_signs_only(rows: Triples) -> None:
    a, b, clusters = columns(rows)
    there, back = mcnemar(a, b), mcnemar(b, a)
    assert there.p_value == back.p_value
    assert there.difference == -back.difference
    ahead, behind = sign_flip(a, b, clusters), sign_flip(b, a, clusters)
    assert ahead.p_value == behind.p_value
    assert ahead.difference == -behind.difference


@quick
@given(triples, st.randoms(use_true_random=False))
def test_the_order_of_pairs_does_not_matter(rows: Triples, random: Random) -> None:
    mixed = list(rows)
    random.shuffle(mixed)
    one, other = columns(rows), columns(mixed)
    assert mcnemar(*one[:2]) == mcnemar(*other[:2])
    assert sign_flip(*one) == sign_flip(*other)
    scaled = [[value * 0.1 for value in part] for part in (one[0], one[1], other[0], other[1])]
    there = paired_bootstrap(scaled[0], scaled[1], one[2], resamples=99)
    assert str(there) == str(paired_bootstrap(scaled[2], scaled[3], other[2], resamples=99))


@quick
@given(triples)
def test_sign_flips_by_enumeration(rows: Triples) -> None:
    a, b, clusters = columns(rows)
    names = sorted(set(clusters))
    sums = [sum(y - x for x, y, c in rows if c == name) for name in names]
    flips = list(itertools.product((1, -1), repeat=len(names)))
    far = [abs(sum(s * t for s, t in zip(flip, sums, strict=True))) for flip in flips]
    found = sign_flip(a, b, clusters)
    assert found.p_value == sum(d >= abs(sum(sums)) for d in far) / len(flips)
    assert found.smallest_p <= found.p_value <= 1
    assert (found.pairs, found.clusters) == (len(rows), len(names))
    assert found.informative == sum(map(bool, sums))


def test_each_its_own_cluster_is_mcnemar() -> None:
    a, b = table(7, 3, 11, 4)
    found = sign_flip(a, b, [str(i) for i in range(len(a))])
    assert found.p_value == pytest.approx(mcnemar(a, b).p_value)
    assert found.difference == pytest.approx(mcnemar(a, b).difference)


def test_a_haystack_counts_once() -> None:
    # 40 prompts all better, but in two haystacks: of 4 sign patterns 2 are as extreme
    found = sign_flip([0] * 40, [1] * 40, ["a"] * 20 + ["b"] * 20)
    assert (found.p_value, found.smallest_p) == (0.5, 0.5)
    assert sign_flip([0] * 40, [1] * 40, ["a"] * 40).p_value == 1
    assert mcnemar([0] * 40, [1] * 40).p_value < 1e-10


def test_rounding_does_not_untie() -> None:
    # the three are equally far, 0.1 + 0.2 only by rounding: both patterns of 4 signs count
    found = sign_flip([0.0, 0.0, 0.0], [0.1, 0.2, -0.3], ["a", "b", "c"])
    assert found.p_value == 1
    noise = sign_flip([0.3, 1.0], [0.1 + 0.2, 2.0], ["a", "b"])
    assert noise.informative == 1


def test_many_clusters_are_drawn() -> None:
    rng = np.random.default_rng(3)
    first = rng.normal(3.0, 1.0, 60)
    second = first + rng.normal(0.25, 1.0, 60)
    names = [f"{i:02}" for i in range(60)]
    found = sign_flip(first, second, names, draws=20_000, seed=5)
    reference = stats.permutation_test(
        (second, first),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(9),
    )
    assert found.p_value == pytest.approx(float(reference.pvalue), abs=0.015)
    assert (found.draws, found.seed) == (20_000, 5)
    assert found == sign_flip(first, second, names, draws=20_000, seed=5)
    assert found.p_value != sign_flip(first, second, names, draws=20_000, seed=6).p_value
    certain = sign_flip(np.zeros(60), np.ones(60), names, draws=999)
    assert certain.p_value == certain.smallest_p == 1 / 1000


def test_the_seed_gives_these_figures_on_every_platform() -> None:
    first, second = np.zeros(30), np.tile([1.0, 1.0, -1.0], 10)
    names = [f"{i:02}" for i in range(30)]
    found = sign_flip(first, second, names, draws=999, seed=1)
    assert found.p_value == 0.099  # of these draws; the binomial test says 0.0987
    change = paired_bootstrap(first, second, names, resamples=999, seed=1)
    assert (change.low, change.high) == pytest.approx((-0.00863267643, 0.6))


def test_sign_flips_hold_their_level_where_prompts_share_haystacks() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(10), 20)
    flips = binomial = 0
    for _ in range(400):
        # each haystack suits one of the methods, neither is better over all
        shift = rng.normal(0.0, 0.25, 10)[clusters]
        a = rng.random(200) < 0.5 - shift
        b = rng.random(200) < 0.5 + shift
        flips += sign_flip(a, b, clusters).p_value <= 0.05
        binomial += mcnemar(a, b).p_value <= 0.05
    assert flips / 400 < 0.08
    assert binomial / 400 > 0.2  # why clusters matter


def test_the_bootstrap_agrees_with_scipy() -> None:
    rng = np.random.default_rng(2)
    weights = rng.integers(50, 200, 25).astype(float)
    totals = weights * rng.gamma(2.0, 1.0, 25)  # skewed, where BCa differs from percentiles
    found = cluster_bootstrap(
        totals, [str(i) for i in range(25)], weights=weights, resamples=20_000
    )
    reference = stats.bootstrap(
        (totals, weights),
        lambda y, w, axis=-1: y.sum(axis=axis) / w.sum(axis=axis),
        paired=True,
        n_resamples=20_000,
        method="BCa",
        rng=np.random.default_rng(8),
    )
    wide = float(reference.confidence_interval.high - reference.confidence_interval.low)
    assert found.value == pytest.approx(totals.sum() / weights.sum())
    assert found.low == pytest.approx(float(reference.confidence_interval.low), abs=0.03 * wide)
    assert found.high == pytest.approx(float(reference.confidence_interval.high), abs=0.03 * wide)
    assert found.interval == "BCa bootstrap over 25 clusters, 95%"


def test_a_cluster_is_drawn_as_a_whole() -> None:
    once = cluster_bootstrap([2.0, 6.0, 4.0], ["a", "b", "c"], weights=[2, 2, 2])
    halves = cluster_bootstrap([1, 1, 3, 3, 2, 2], list("aabbcc"), weights=[1] * 6)
    assert once == halves
    assert once.low < once.value == 2.0 < once.high


def test_a_wider_confidence_is_wider() -> None:
    values, names = [1.0, 4.0, 2.5, 3.0, 7.0, 2.0], list("abcdef")
    narrow = cluster_bootstrap(values, names, confidence=0.5)
    wide = cluster_bootstrap(values, names, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert min(values) <= wide.low
    assert wide.high <= max(values)


def test_nll_is_weighted_by_tokens() -> None:
    # documents of 100 and 300 tokens: +10 and +90 nats make +0.25 nats a token, not the mean of
    # +0.1 and +0.3
    before, after = [200.0, 700.0], [210.0, 790.0]
    found = paired_bootstrap(before, after, ["a", "b"], weights=[100, 300])
    assert found.value == pytest.approx(0.25)
    assert math.isnan(found.low)
    assert found.interval == "none: two clusters, and an interval takes three"
    more = paired_bootstrap([*before, 400.0], [*after, 440.0], list("abc"), weights=[100, 300, 200])
    assert 0.1 <= more.low < more.value < more.high <= 0.3


def test_what_is_common_to_both_drops_out() -> None:
    rng = np.random.default_rng(4)
    document = rng.normal(300.0, 100.0, 12)  # documents differ far more than the methods
    first, names = document + rng.normal(0, 1, 12), [str(i) for i in range(12)]
    second = document + 5 + rng.normal(0, 1, 12)
    assert paired_bootstrap(first, second, names).low > 0
    alone = [cluster_bootstrap(part, names) for part in (first, second)]
    assert alone[0].high > alone[1].low


def test_no_interval_is_invented() -> None:
    one = cluster_bootstrap([1, 0, 1], ["a"] * 3)
    assert one.interval == "none: one cluster"
    alike = paired_bootstrap([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], list("abc"))
    assert alike.interval == "none: all 3 clusters are alike"
    for found in (one, alike):
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert one.value == pytest.approx(2 / 3)


def covered(clusters: int, runs: int) -> float:
    """How often the interval of ΔNLL holds the truth: documents of 40 to 60 tokens that differ."""
    rng, hits = np.random.default_rng(clusters), 0
    for _ in range(runs):
        tokens = rng.integers(40, 61, clusters)
        base = rng.normal(100.0, 20.0, clusters)
        change = tokens * rng.normal(0.1, 0.3, clusters) + rng.normal(0, 1, clusters)
        names = np.arange(clusters)
        found = paired_bootstrap(base, base + change, names, weights=tokens, resamples=499)
        hits += found.low < 0.1 < found.high
    return hits / runs


def test_the_bootstrap_covers_the_truth() -> None:
    assert 0.9 < covered(30, 300) < 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("clusters", "least"), [(8, 0.85), (20, 0.91), (60, 0.93)])
def test_the_bootstrap_covers_the_truth_at_length(clusters: int, least: float) -> None:
    assert least < covered(clusters, 3000) < 0.965


def test_holm_by_hand() -> None:
    # sorted: 0.005 · 4, 0.01 · 3, 0.03 · 2, then 0.04 · 1 raised to the 0.06 before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.9]) == (1.0, 1.0)
    assert holm([]) == ()


@quick
@given(st.lists(st.floats(0, 1), max_size=7), st.floats(0.01, 0.5))
def test_holm_rejects_what_the_step_down_procedure_does(ps: list[float], alpha: float) -> None:
    rejected: set[int] = set()
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[i] * (len(ps) - rank) > alpha:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(ps)) if p <= alpha} == rejected
    assert all(raw <= p <= 1 for raw, p in zip(ps, holm(ps), strict=True))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1, 0], [1], "2 figures against 1"),
        ([], [], "leave out empty cells"),
        ([1, 2], [1, 0], "first holds 2"),
        ([1, 0], [1, 0.5], "second holds 0.5"),
        ([1, math.nan], [1, 0], "first: 1 of 2 are NaN"),
        ([1, 0], [1, None], "second: 1 of 2 are NaN"),
        ([[1, 0]], [[1, 0]], r"shape \(1, 2\)"),
        (["yes"], [1], "not a vector of numbers"),
    ],
)
def test_outcomes_that_cannot_be_compared(
    first: list[float], second: list[float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        mcnemar(first, second)


def test_other_input_that_is_refused() -> None:
    with pytest.raises(DataError, match="1 observations but clusters of shape"):
        sign_flip([1.0], [2.0], ["a", "b"])
    with pytest.raises(DataError, match="infinite"):
        sign_flip([math.inf], [2.0], ["a"])
    with pytest.raises(DataError, match="random draws"):
        sign_flip([0.0] * 30, [1.0] * 30, list(range(30)), draws=0)
    with pytest.raises(DataError, match="one above 0 each"):
        cluster_bootstrap([1.0, 2.0], ["a", "b"], weights=[1, 0])
    with pytest.raises(DataError, match="2 totals, 1 weights"):
        cluster_bootstrap([1.0, 2.0], ["a", "b"], weights=[1])
    with pytest.raises(DataError, match="confidence=95"):
        cluster_bootstrap([1.0, 2.0], ["a", "b"], confidence=95)
    with pytest.raises(DataError, match="random draws"):
        cluster_bootstrap([1.0, 2.0], ["a", "b"], resamples=0)
    with pytest.raises(DataError, match="nan is not a p-value"):
        holm([0.1, math.nan])
    with pytest.raises(DataError, match=r"1\.2 is not a p-value"):
        holm([1.2])
