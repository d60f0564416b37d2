"""Intervals for the cells of a sweep, at 95% unless said otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

__all__ = ["mean_interval", "perplexity_of", "wilson"]

NAN = math.nan


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of `hits` in `n` independent trials.

    Unlike the normal one it stays within [0, 1] and is not empty at 0 of n or n of n.

    Source: Wilson 1927; Brown, Cai & DasGupta 2001 recommend it for small n.

    >>> [round(x, 3) for x in wilson(9, 10)]
    [0.596, 0.982]
    """
    if n == 0:
        return NAN, NAN
    interval = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(
    totals: Sequence[float],
    weights: Sequence[float],
    clusters: Sequence[str],
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return Σ totals / Σ weights and its t interval, with clusters as the independent units.

    With the sums y and w of each of n clusters and the ratio r, the variance of r is
    n/(n−1) · Σ (y − r·w)² / (Σ w)² (linearisation, Cochran 1977, section 6.3), on n − 1 degrees of
    freedom. The interval is NaN for a single cluster, which says nothing about others.
    """
    sums: dict[str, tuple[float, float]] = {}
    for total, weight, cluster in zip(totals, weights, clusters, strict=True):
        y, w = sums.get(cluster, (0.0, 0.0))
        sums[cluster] = (y + total, w + weight)
    whole = math.fsum(w for _, w in sums.values())
    if not whole:
        return NAN, NAN, NAN
    mean = math.fsum(y for y, _ in sums.values()) / whole
    n = len(sums)
    if n < 2 or math.isnan(mean):
        return mean, NAN, NAN
    squares = math.fsum((y - mean * w) ** 2 for y, w in sums.values())
    error = math.sqrt(n / (n - 1) * squares) / whole
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return mean, mean - reach, mean + reach


def perplexity_of(nll: float) -> float:
    """Exp of a mean NLL in nats, infinite where a float cannot hold it."""
    return math.exp(nll) if nll < 700 or math.isnan(nll) else math.inf
