"""Is one method better than another, or is it the draw of prompts? Comparisons of paired results.

Both methods answered the same prompts, or were scored on the same target tokens, in the same order;
differences are second − first. Results of one haystack or document hang together, so that whole
clusters are drawn again or change sign. Random numbers come from PCG64 with the seed given, and
clusters are taken in the order of their names: the order of the input does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from longctx.errors import DataError

from .intervals import too_few

__all__ = [
    "Estimate",
    "McNemar",
    "SignFlip",
    "cluster_bootstrap",
    "holm",
    "mcnemar",
    "paired_bootstrap",
    "sign_flip",
]

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]

_ENUMERATED = 20  # clusters: 2²⁰ sign patterns take 8 MiB and some ms
_TIE = 1e-12  # relative; figures that differ by rounding alone are equal


@dataclass(frozen=True, slots=True)
class McNemar:
    """Two methods on the same prompts of one cell, counted in prompts."""

    both: int
    """Prompts that both answer correctly."""
    only_first: int
    only_second: int
    neither: int
    difference: float
    """Accuracy of the second minus that of the first, −1 to 1."""
    p_value: float
    """Two-sided."""


@dataclass(frozen=True, slots=True)
class SignFlip:
    """Two methods on the prompts of several cells together."""

    difference: float
    """Mean of second − first over the pairs, in their unit."""
    p_value: float
    """Two-sided."""
    smallest_p: float
    """No figures in so many clusters could give less: above 0.05 the test cannot reject."""
    pairs: int
    clusters: int
    informative: int
    """Clusters whose differences do not cancel: the others have no say."""
    draws: int
    """Sign patterns tried: all there are, or so many random ones."""
    seed: int | None
    """None where all patterns were tried."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A weighted mean and its interval (NaN where there is none)."""

    value: float
    low: float
    high: float
    interval: str
    """Which interval, over what; "none: …" says why there is none."""
    clusters: int
    resamples: int
    seed: int


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Compare accuracies on identical prompts by the exact test of those where they differ.

    Source: McNemar 1947 with binomial probabilities. If neither is better, a prompt that only one
    answers is as likely the one's as the other's. Assumes independent prompts: see `sign_flip`
    where they share haystacks. p is 1 without a difference.

    Args:
        first: correct (1) or not (0) per prompt.
        second: of the other method, in the same order.

    Raises:
        DataError: no prompts, unequal numbers, or outcomes that are neither 0 nor 1.

    >>> mcnemar([1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1]).p_value     # 1 against 3: 2 · 5/16
    0.625
    """
    a, b = _paired(first, second, binary=True)
    only_first, only_second = int((a > b).sum()), int((b > a).sum())
    both, n = int((a * b).sum()), only_first + only_second
    p = float(stats.binomtest(only_first, n).pvalue) if n else 1.0
    return McNemar(both, only_first, only_second, len(a) - both - n, (b - a).sum() / len(a), p)


def sign_flip(
    first: ArrayLike, second: ArrayLike, clusters: ArrayLike, *, draws: int = 9_999, seed: int = 0
) -> SignFlip:
    """Compare two methods over pooled cells; a cluster's differences change sign together.

    Source: Fisher 1935, section 21; whole blocks: Winkler et al. 2015. If neither is better,
    swapping the two within a haystack or document leaves its results as probable as they were.
    Assumes independent clusters. The statistic is the sum of all differences. Up to 20 informative
    clusters all patterns are tried, beyond them random ones (+1: Phipson & Smyth 2010).

    Args:
        first: a figure per pair: correct (0 or 1), a score, or summed NLL in nats.
        second: of the other method, in the same order.
        clusters: haystack or document of each pair, the same name in every cell it occurs in.
        draws: random sign patterns where there are too many to try all.
        seed: of those.

    Raises:
        DataError: no pairs, unequal numbers, NaN or infinity, or no draws.
    """
    a, b = _paired(first, second)
    totals = _sums(b - a, check_clusters(clusters, len(a)))
    size = math.fsum(np.abs(a)) + math.fsum(np.abs(b))
    active = totals[np.abs(totals) > _TIE * size]
    whole = math.fsum(active)
    extreme = abs(whole) - _TIE * size
    exact = len(active) <= _ENUMERATED
    if exact:
        tried, p = _every_flip(active, extreme)
        least = min(1.0, 2 / tried)
    else:
        p = _drawn_flips(active, abs(whole), _TIE * size, draws, seed)
        tried, least = draws, 1 / (1 + draws)
    used = None if exact else seed
    return SignFlip(whole / len(a), p, least, len(a), len(totals), len(active), tried, used)


def _every_flip(totals: Floats, extreme: float) -> tuple[int, float]:
    """All sign patterns: how many there are, and the share of them that is extreme.

    By doubling, since `scipy.stats.permutation_test` builds each pattern in Python: of 20 clusters
    it takes 20 s, this some ms.
    """
    flipped = np.zeros(1)
    for total in totals:
        flipped = np.concatenate([flipped + total, flipped - total])
    return len(flipped), float((np.abs(flipped) >= extreme).mean())


def _drawn_flips(totals: Floats, whole: float, tie: float, draws: int, seed: int) -> float:
    """Two-sided p-value over random sign patterns; `whole` is how far the true one is from 0."""

    def distance(signed: Floats, axis: int) -> Floats:
        return _tied(np.abs(signed.sum(axis)), whole, tie)

    found = stats.permutation_test(
        (totals,),
        distance,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_checked_draws(draws),
        batch=_batch(2 * len(totals)),
        alternative="greater",
        rng=_generator(seed),
    )
    return float(found.pvalue)


def cluster_bootstrap(
    totals: ArrayLike,
    clusters: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 9_999,
    seed: int = 0,
) -> Estimate:
    """Return Σ totals / Σ weights and its BCa bootstrap interval, drawing whole clusters.

    Source: Efron 1987, with the jackknife over clusters. Assumes independent clusters of one
    population. From few of them it is too narrow, as every bootstrap is (95% covered 87% with 8,
    92% with 20, 94% with 60, simulated): `stats.mean_interval` (t over clusters) is safer there.
    There is no interval from one cluster, from two, or from clusters that are all alike.

    Args:
        totals: per observation: 1 or 0 for an answer, NLL summed over its targets in nats, …
        clusters: haystack or document of each.
        weights: per observation, such as the number of targets; None weighs all alike.
        confidence: of the interval, 0 to 1.
        resamples: bootstrap samples.
        seed: of those.

    Raises:
        DataError: no observations, unequal numbers, NaN or infinity, a weight, confidence or
            number of resamples that makes no sense.
    """
    y = check_numbers(totals, "totals")
    w = np.ones(len(y)) if weights is None else check_numbers(weights, "weights")
    if len(w) != len(y) or w.min() <= 0:
        raise DataError(f"{len(y)} totals, {len(w)} weights from {w.min():g}: one above 0 each.")
    if not 0 < confidence < 1:
        raise DataError(f"confidence={confidence}: expected a share such as 0.95.")
    group = check_clusters(clusters, len(y))
    sums, sizes = _sums(y, group), _sums(w, group)
    n, whole, size, shares = len(sums), math.fsum(sums), math.fsum(sizes), sums / sizes
    value, tie = whole / size, _TIE * float(np.abs(shares).max())
    draws = _checked_draws(resamples)
    why = too_few(n) or (f"none: all {n} clusters are alike" if np.ptp(shares) <= tie else "")
    if why:
        return Estimate(value, math.nan, math.nan, why, n, 0, seed)

    def ratio(sums: Floats, sizes: Floats, axis: int) -> Floats:
        return _tied(sums.sum(axis) / sizes.sum(axis), value, tie)

    interval = stats.bootstrap(
        (sums, sizes),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=draws,
        batch=_batch(n),
        confidence_level=confidence,
        method="BCa",
        rng=_generator(seed),
    ).confidence_interval
    low, high = interval.low, interval.high
    name = f"BCa bootstrap over {n} clusters, {confidence:.0%}"
    return Estimate(value, float(low), float(high), name, n, resamples, seed)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    clusters: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 9_999,
    seed: int = 0,
) -> Estimate:
    """Return the change from first to second, as `cluster_bootstrap` (assumptions, errors) does.

    Of accuracy: outcomes (0 or 1) and no weights. Of NLL per token: NLL summed over target tokens
    that are the same for both, and their number as weights; then, above 0 the second is worse
    and its perplexity is exp(change) times the first's.
    """
    a, b = _paired(first, second)
    return cluster_bootstrap(
        b - a, clusters, weights=weights, confidence=confidence, resamples=resamples, seed=seed
    )


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust the p-values of several comparisons: all those below α hold at once, in their order.

    scipy has adjustments of the false discovery rate only. Source: Holm 1979. Assumes nothing about
    how they hang together. DataError: not from 0 to 1.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise DataError(f"{p} is not a p-value: expected 0 to 1; leave out tests without one.")
    adjusted, floor, m = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        adjusted[i] = floor = max(floor, min(1.0, (m - rank) * float(p_values[i])))
    return tuple(adjusted)


def check_numbers(values: ArrayLike, what: str, *, binary: bool = False) -> Floats:
    """Return finite numbers (binary: 0 and 1) as a vector; a DataError says what is wrong."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} is not a vector of numbers: {error}.") from error
    if found.ndim != 1 or not found.size:
        raise DataError(f"{what} has shape {found.shape}: expected a vector; leave out empty cells")
    if bad := int((~np.isfinite(found)).sum()):
        raise DataError(
            f"{what}: {bad} of {len(found)} are NaN or infinite, so not measured. Report the cell "
            "as failed, or leave these pairs out of both methods and say so."
        )
    if binary and len(other := found[(found != 0) & (found != 1)]):
        raise DataError(f"{what} holds {other[0]:g}: expected 0 or 1 (correct) per prompt.")
    return found


def check_clusters(clusters: ArrayLike, n: int) -> Indices:
    """Return the rank of each one's name among all names; DataError unless there are n."""
    names = np.asarray(clusters)
    if names.shape != (n,):
        raise DataError(f"{n} observations but clusters of shape {names.shape}: one name each.")
    return np.unique(names, return_inverse=True)[1]


def _paired(first: ArrayLike, second: ArrayLike, *, binary: bool = False) -> tuple[Floats, Floats]:
    a = check_numbers(first, "first", binary=binary)
    b = check_numbers(second, "second", binary=binary)
    if len(a) != len(b):
        raise DataError(f"{len(a)} figures against {len(b)}: pass the same prompts in one order.")
    return a, b


def _sums(values: Floats, group: Indices) -> Floats:
    """Sum by cluster, rounded once, so that the order within a cluster does not matter."""
    order = np.argsort(group, kind="stable")
    parts = np.split(values[order], np.flatnonzero(np.diff(group[order])) + 1)
    return np.array([math.fsum(part) for part in parts])


def _tied(found: Floats, value: float, tie: float) -> Floats:
    """The same, with `value` itself in place of what differs from it by rounding alone.

    scipy.stats.bootstrap has no tolerance for ties, permutation_test one that is 0 at a sum of 0.
    """
    return np.where(np.abs(found - value) <= tie, value, found)


def _checked_draws(count: int) -> int:
    if count < 1:
        raise DataError(f"{count} random draws: expected at least 1, better some thousands.")
    return count


def _batch(width: int) -> int:
    """How many resamples of this width take some 8 MiB."""
    return max(1, (1 << 20) // width)


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))
