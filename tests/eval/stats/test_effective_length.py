"""Effective length against closed forms, a grid search, the papers' definitions and simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from longctx.errors import DataError
from longctx.eval.stats.effective_length import (
    EffectiveLength,
    effective_length,
    pi_length,
    ruler_length,
    yarn_length,
)

LENGTHS = (1024, 2048, 4096, 8192, 16384)
quick = settings(deadline=None, max_examples=30)  # a busy machine is not a failure


def prompts(hits: tuple[int, ...], n: int = 20) -> tuple[list[int], list[int]]:
    lengths = [length for length in LENGTHS[: len(hits)] for _ in range(n)]
    return lengths, [int(i < hit) for hit in hits for i in range(n)]


def fit(hits: tuple[int, ...], n: int = 20, threshold: float = 0.8) -> EffectiveLength:
    return effective_length(*prompts(hits, n), threshold=threshold)


def loglik(x0: float, fall: float, hits: tuple[int, ...], n: int, threshold: float) -> float:
    """Written out anew, by length."""
    total = 0.0
    for length, hit in zip(LENGTHS, hits, strict=False):
        logit = math.log(threshold / (1 - threshold)) + fall * (x0 - math.log2(length))
        p = 1 / (1 + math.exp(-logit))
        total += hit * math.log(p) + (n - hit) * math.log1p(-p)
    return total


def test_two_lengths_in_closed_form() -> None:
    # logits ln 9 at 1,024 and −ln 9 at 2,048: 50% halfway (in octaves), 80% where 2 ln 9 · d = ln 4
    assert fit((18, 2), threshold=0.5).tokens == round(1024 * 2**0.5)
    before = math.log(4) / (2 * math.log(9))
    assert fit((18, 2)).tokens == round(1024 * 2 ** (0.5 - before))


def test_an_exact_curve_is_found_again() -> None:
    # 1000 prompts per length, hits as expected of a curve with 80% at 5,000 tokens
    hits = tuple(
        round(1000 * float(special.expit(math.log(4) + 2.5 * math.log2(5000 / length))))
        for length in LENGTHS
    )
    found = fit(hits, n=1000)
    assert found.bound == "at"
    assert found.tokens == pytest.approx(5000, rel=0.005)
    assert found.low is not None
    assert found.high is not None
    assert 4800 < found.low < 5000 < found.high < 5200
    assert found.misfit_p > 0.99


@pytest.mark.parametrize("hits", [(20, 19, 15, 10, 2), (20, 18, 17, 12, 9), (19, 20, 11, 2, 1)])
def test_estimate_and_interval_by_grid(hits: tuple[int, ...]) -> None:
    found = fit(hits)
    falls = np.linspace(0.01, 8, 800)
    grid = np.linspace(10, 14, 401)
    profile = np.array([max(loglik(x, u, hits, 20, 0.8) for u in falls[::8]) for x in grid])
    inside = grid[2 * (profile.max() - profile) <= stats.chi2.ppf(0.95, 1)]
    step = grid[1] - grid[0]
    assert math.log2(found.tokens) == pytest.approx(grid[profile.argmax()], abs=2 * step)
    assert found.low is not None
    assert math.log2(found.low) == pytest.approx(inside[0], abs=2 * step)
    if found.high is None:
        assert inside[-1] == grid[-1]
    else:
        assert math.log2(found.high) == pytest.approx(inside[-1], abs=2 * step)


@pytest.mark.parametrize("hits", [(20, 19, 15, 10, 2), (19, 20, 11, 2, 1)])
def test_the_likelihood_cannot_be_raised(hits: tuple[int, ...]) -> None:
    best = optimize.minimize(
        lambda v: -loglik(v[0], v[1], hits, 20, 0.8), (12.0, 1.0), method="Nelder-Mead"
    )
    assert math.log2(fit(hits).tokens) == pytest.approx(best.x[0], abs=2e-3)
    shares = np.array(hits) / 20
    free = 20 * float((special.xlogy(shares, shares) + special.xlogy(1 - shares, 1 - shares)).sum())
    assert fit(hits).misfit_p == pytest.approx(stats.chi2.sf(2 * (free + best.fun), 3), abs=1e-3)


def test_all_pass_is_a_bound() -> None:
    found = fit((20,) * 5)
    assert (found.tokens, found.bound, found.high) == (16384, "at least", None)
    # 20 of 20 where 80% are expected is improbable enough (2 · 20 · −ln 0.8 > 3.84): the lower
    # end lies beyond the longest, too; 5 of 5 are not
    assert found.low == 16384
    assert str(found) == "≥ 16,384 tokens (≥ 16,384)"
    few = fit((5,) * 5, n=5)
    assert (few.tokens, few.bound, few.high) == (16384, "at least", None)
    assert few.low is not None
    assert 8192 < few.low < 16384
    assert str(few) == f"≥ 16,384 tokens ({few.low:,} to ≥ 16,384)"


def test_all_fail_is_a_bound() -> None:
    found = fit((0,) * 5)
    assert (found.tokens, found.bound) == (1024, "below")
    assert (found.low, found.high) == (None, 1024)
    assert str(found) == "< 1,024 tokens (< 1,024)"
    one = fit((0,) * 5, n=1)
    assert one.bound == "below"
    assert one.high is not None
    assert one.high > 1024  # 1 failure at 80% is not much


def test_a_cliff_says_between_which_lengths() -> None:
    found = fit((20, 20, 20, 0, 0))
    assert found.between == (4096, 8192)
    assert found.tokens == round(math.sqrt(4096 * 8192))
    assert found.low is not None
    assert found.high is not None
    # the interval holds nearly all of the gap and, with 20 prompts, little else
    assert 4096 <= found.low < 4400
    assert 7600 < found.high <= 8192
    few = fit((3, 3, 3, 0, 0), n=3)
    assert few.low is not None
    assert few.high is not None
    assert few.low < 4096
    assert few.high > found.high


def test_a_length_that_half_passes_ends_a_cliff() -> None:
    found = fit((20, 20, 20, 10, 0))
    assert found.between is None
    assert found.low is not None
    assert 4096 < found.low < found.tokens < 8192


def test_flat_and_rising_accuracy() -> None:
    assert fit((17,) * 5).bound == "at least"
    assert fit((15,) * 5).bound == "below"
    assert (fit((15,) * 5).low, fit((15,) * 5).high) == (None, None)  # 75% may be 80% everywhere
    rising = fit((10, 15, 18, 20, 20))
    assert rising.misfit_p < 0.001  # a curve that falls does not describe it, and it says so
    assert fit((20, 3, 20, 20, 2)).misfit_p < 0.001  # nor a dip


def test_one_length() -> None:
    assert str(fit((20,))) == "≥ 1,024 tokens (≥ 1,024)"
    assert fit((19,)).bound == "at least"
    assert fit((10,)).bound == "below"
    assert fit((10,)).high == 1024
    assert math.isnan(fit((10,)).misfit_p)


def test_clusters_widen_the_interval() -> None:
    lengths, correct = prompts((20, 19, 15, 10, 2))
    plain = effective_length(lengths, correct)
    # the same share at each length, the hits in the first haystacks
    clustered = effective_length(lengths, correct, [i % 20 // 4 for i in range(100)])
    assert clustered.tokens == plain.tokens
    assert clustered.interval == "profile likelihood scaled for 5 clusters, 95%"
    assert plain.low is not None
    assert plain.high is not None
    assert (clustered.low or 0) < plain.low
    assert (clustered.high or math.inf) > plain.high


def test_copies_add_nothing() -> None:
    # every haystack asked four times with the same answers is worth no more than asked once
    lengths, correct = prompts((20, 19, 15, 10, 2))
    names = [str(i % 20) for i in range(100)]
    once = effective_length(lengths, correct, names)
    again = effective_length(lengths * 4, correct * 4, names * 4)
    assert (again.tokens, again.low, again.high) == (once.tokens, once.low, once.high)
    independent = effective_length(lengths * 4, correct * 4)
    assert independent.low is not None
    assert again.low is not None
    assert independent.low > again.low
    passed, cliff = [1] * 100, [int(length < 5000) for length in lengths]
    for outcomes in (passed, cliff):
        once = effective_length(lengths, outcomes, names)
        assert once == effective_length(lengths * 4, outcomes * 4, names * 4)


def test_one_haystack_has_no_interval() -> None:
    found = effective_length(*prompts((20, 19, 15, 10, 2)), ["a"] * 100)
    assert (found.low, found.high, found.interval) == (None, None, "none: one cluster")
    assert str(found) == f"{found.tokens:,} tokens"


hit_counts = st.lists(st.integers(0, 6), min_size=1, max_size=5).map(tuple)


@quick
@given(hit_counts, st.randoms(use_true_random=False), st.floats(0.1, 0.95))
def test_order_does_not_matter_and_bounds_hold(
    hits: tuple[int, ...], random: Random, threshold: float
) -> None:
    rows = list(zip(*prompts(hits, 6), strict=True))
    names = [str(i % 3) for i in range(len(rows))]
    both = list(zip(rows, names, strict=True))
    random.shuffle(both)
    lengths, correct = [row[0] for row, _ in both], [row[1] for row, _ in both]
    found = effective_length(lengths, correct, threshold=threshold)
    assert str(found) == str(fit(hits, 6, threshold))
    mixed = effective_length(lengths, correct, [name for _, name in both], threshold=threshold)
    assert str(mixed) == str(effective_length(*prompts(hits, 6), names, threshold=threshold))
    for result in (found, mixed):
        assert result.shortest <= result.tokens <= result.longest
        assert result.low is None or result.shortest <= result.low <= result.tokens + 1
        assert result.high is None or result.tokens - 1 <= result.high <= result.longest


@quick
@given(hit_counts)
def test_a_higher_threshold_is_never_longer(hits: tuple[int, ...]) -> None:
    found = [fit(hits, 6, threshold).tokens for threshold in (0.3, 0.5, 0.8)]
    assert found == sorted(found, reverse=True)


def covered(runs: int, haystacks: int, spread: float, *, clustered: bool) -> float:
    """How often the interval holds the length at which 80% of prompts in all haystacks pass."""
    rng = np.random.default_rng(haystacks)
    x = np.log2(LENGTHS)
    nodes = spread * stats.norm.ppf((np.arange(2000) + 0.5) / 2000)

    def passing(length: float) -> float:
        return float(special.expit(2.5 * (12.5 - length) + nodes).mean())

    crossing = optimize.root_scalar(lambda length: passing(length) - 0.8, bracket=(5, 14))
    truth = 2.0 ** float(crossing.root)
    names = np.repeat(np.arange(haystacks), 4 * len(x))
    lengths = np.tile(np.array(LENGTHS), haystacks * 4)
    hits = 0
    for _ in range(runs):
        shift = rng.normal(0, spread, haystacks)[names] if spread else 0.0
        correct = rng.random(len(names)) < special.expit(2.5 * (12.5 - np.log2(lengths)) + shift)
        found = effective_length(lengths, correct, names if clustered else None)
        hits += (found.low or 0) <= truth <= (found.high or math.inf)
    return hits / runs


def test_the_interval_covers_the_truth() -> None:
    assert 0.9 < covered(120, 8, 0.0, clustered=False) <= 1.0


@pytest.mark.slow
def test_the_interval_covers_the_truth_at_length() -> None:
    assert 0.935 < covered(2000, 8, 0.0, clustered=False) < 0.97
    assert 0.92 < covered(2000, 10, 1.5, clustered=True) < 0.98
    assert covered(1000, 10, 1.5, clustered=False) < 0.85  # why clusters matter


MEANS = {1024: 1.0, 2048: 0.9, 4096: 0.15, 8192: 0.856, 16384: 0.8, 32768: 0.2}


def test_the_definitions_of_the_papers() -> None:
    assert ruler_length(MEANS) == 2048  # above 85.6%, not at
    assert ruler_length({**MEANS, 8192: 0.857}) == 8192  # a dip before it does not matter
    assert yarn_length(MEANS) == 16384  # at least 80%
    assert pi_length(MEANS) == 2048  # every length up to it at least 20%
    assert pi_length({**MEANS, 4096: 0.2}) == 32768
    assert ruler_length(MEANS, threshold=0.1) == 32768
    assert [f({512: 0.0}) for f in (ruler_length, yarn_length, pi_length)] == [None] * 3
    assert pi_length(dict(reversed(MEANS.items()))) == 2048


@pytest.mark.parametrize("define", [ruler_length, yarn_length, pi_length])
def test_scores_that_are_none(define: Callable[[dict[int, float]], int | None]) -> None:
    for means, message in (
        ({}, "no lengths"),
        ({1024: 85.6}, "a mean score of 85.6 at 1024 tokens"),
        ({1024: math.nan}, "a mean score of nan"),
    ):
        with pytest.raises(DataError, match=message):
            define(means)


@pytest.mark.parametrize(
    ("lengths", "correct", "message"),
    [
        ([1024], [1, 0], "1 lengths, 2 outcomes"),
        ([], [], "leave out empty cells"),
        ([1024], [math.nan], "1 of 1 are NaN"),
        ([1024], [0.5], "correct holds 0.5"),
        ([0], [1], "a length of 0"),
        ([1024.5], [1], "a length of 1024.5"),
    ],
)
def test_input_that_is_refused(lengths: list[float], correct: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        effective_length(lengths, correct)


def test_settings_that_are_refused() -> None:
    for threshold in (0.0, 1.0, 80.0, math.nan):
        with pytest.raises(DataError, match="threshold="):
            effective_length([1024], [1], threshold=threshold)
    with pytest.raises(DataError, match="confidence=95"):
        effective_length([1024], [1], confidence=95)
    with pytest.raises(DataError, match="clusters of shape"):
        effective_length([1024], [1], ["a", "b"])
