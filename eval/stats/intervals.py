"""Intervals for the cells of a sweep, at 95% unless said otherwise.

An interval over clusters takes three of them (`LEAST`). How clusters differ is estimated from
themselves, and from two it hardly is: the t of one degree of freedom is 12.7, so that a 95%
interval over two documents is on average 5.2 times as wide as if their spread were known, "1 to
1,693" for a perplexity of 40. From three it is 1.9 times as wide, from five 1.3 times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from scipy import stats

__all__ = [
    "LEAST",
    "clustered_wilson",
    "jackknife_interval",
    "mean_interval",
    "mean_of_means",
    "perplexity_of",
    "too_few",
    "wilson",
]

T = TypeVar("T")
NAN = math.nan
LEAST = 3
"""Clusters from which there is an interval over them."""


def too_few(clusters: int, what: str = "cluster") -> str:
    """Say why so few clusters have no interval; empty where they are enough.

    >>> too_few(1), too_few(2, "document"), too_few(3)
    ('none: one cluster', 'none: two documents, and an interval takes three', '')
    """
    if clusters >= LEAST:
        return ""
    return (
        f"none: two {what}s, and an interval takes three" if clusters == 2 else f"none: one {what}"
    )


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


def clustered_wilson(
    hits: Sequence[bool],
    clusters: Sequence[str],
    units: Sequence[Hashable],
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return the share of hits and Wilson's interval for trials that hang together.

    The number of trials is divided by the design effect, which is how many times larger the
    variance over clusters is than that of independent trials (1 at least), and by (t/z)², since a
    variance over few clusters is itself uncertain. Where all trials agree nothing shows how they
    hang together: there, those of one unit count as one. It is NaN below `LEAST` clusters.

    Args:
        hits: of each trial.
        clusters: the independent units, such as documents.
        units: what within a cluster may be one trial made several times, such as a prompt.
        confidence: of the interval.

    Source: Korn & Graubard 1998 (effective sample size and t), with Wilson's interval as in Franco,
    Little, Louis & Slud 2019, Journal of Survey Statistics and Methodology 7(3), 334-364.
    """
    n = len(hits)
    mean, low, high = mean_interval([float(hit) for hit in hits], [1.0] * n, clusters, confidence)
    count = len(set(clusters))
    if math.isnan(low):
        return mean, NAN, NAN
    z = float(stats.norm.ppf((1 + confidence) / 2))
    t = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    if 0 < mean < 1:
        variance = ((high - low) / 2 / t) ** 2
        effective = min(n, mean * (1 - mean) / variance) if variance else n
    else:
        effective = len(set(units))
    effective *= (z / t) ** 2
    middle = mean + z**2 / (2 * effective)
    reach = z * math.sqrt(mean * (1 - mean) / effective + (z / effective) ** 2 / 4)
    scale = 1 + z**2 / effective
    return mean, max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def jackknife_interval(
    statistic: Callable[[Sequence[T]], float],
    clusters: Mapping[str, Sequence[T]],
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return a statistic of all items and its t interval, leaving one cluster out at a time.

    For statistics that are not means, such as an entropy. With θᵢ without cluster i of n, the
    variance is (n−1)/n · Σ (θᵢ − θ̄)², on n − 1 degrees of freedom. The interval is of what the
    statistic gives for so many items, not for more. It is NaN below `LEAST` clusters.

    Source: Tukey 1958; Heltshe & Forrester 1983, Biometrics 39, 1-11, for numbers of kinds.
    """
    whole = statistic([item for items in clusters.values() for item in items])
    n = len(clusters)
    if n < LEAST:
        return whole, NAN, NAN
    without = [
        statistic([item for other, items in clusters.items() if other != name for item in items])
        for name in clusters
    ]
    middle = math.fsum(without) / n
    error = math.sqrt((n - 1) / n * math.fsum((value - middle) ** 2 for value in without))
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return whole, whole - reach, whole + reach


def mean_interval(
    totals: Sequence[float],
    weights: Sequence[float],
    clusters: Sequence[str],
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return Σ totals / Σ weights and its t interval, with clusters as the independent units.

    With the sums y and w of each of n clusters and the ratio r, the variance of r is
    n/(n−1) · Σ (y − r·w)² / (Σ w)² (linearisation, Cochran 1977, section 6.3), on n − 1 degrees of
    freedom. The interval is NaN below `LEAST` clusters.
    """
    whole = math.fsum(weights)
    if not whole:
        return NAN, NAN, NAN
    mean, n = math.fsum(totals) / whole, len(set(clusters))
    if n < LEAST or math.isnan(mean):
        return mean, NAN, NAN
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    reach *= math.sqrt(_variance(totals, weights, clusters))
    return mean, mean - reach, mean + reach


def _variance(totals: Sequence[float], weights: Sequence[float], clusters: Sequence[str]) -> float:
    """Of Σ totals / Σ weights, by linearisation."""
    sums: dict[str, tuple[float, float]] = {}
    for total, weight, cluster in zip(totals, weights, clusters, strict=True):
        y, w = sums.get(cluster, (0.0, 0.0))
        sums[cluster] = (y + total, w + weight)
    whole, n = math.fsum(weights), len(sums)
    mean = math.fsum(totals) / whole
    squares = math.fsum((y - mean * w) ** 2 for y, w in sums.values())
    return n / (n - 1) * squares / whole**2 if n > 1 else NAN


def perplexity_of(nll: float) -> float:
    """Exp of a mean NLL in nats, infinite where a float cannot hold it."""
    return math.exp(nll) if nll < 700 or math.isnan(nll) else math.inf


def mean_of_means(
    scores: Sequence[float],
    clusters: Sequence[str],
    parts: Sequence[str],
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return the mean over parts of the mean score in each, and its t interval.

    Scores lie between 0 and 1. Parts are independent of each other, and so are the clusters within
    one: the variance of each mean is that of `mean_interval`, and the degrees of freedom of their
    sum are Satterthwaite's (1946). Where all scores of a part are 0, or all 1, that variance would
    be 0, as if the part were known for certain. So each part's spread is taken with two clusters
    more, one of zeros and one of ones, of average size: what Agresti & Coull (1998) do for a share.

    The interval is NaN where any part has fewer than two clusters. Two are enough here: with those
    that are added their spread has three degrees of freedom, and that of other parts more.

    >>> [round(x, 2) for x in mean_of_means([1, 1, 0, 1, 0, 0], list("abcdef"), list("xxxyyy"))]
    [0.5, 0.0, 1.0]
    """
    by_part: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        by_part.setdefault(part, []).append(index)
    if not by_part:
        return NAN, NAN, NAN
    means: list[float] = []
    variances: list[float] = []
    sizes: list[int] = []
    for rows in by_part.values():
        means.append(math.fsum(scores[row] for row in rows) / len(rows))
        names = [clusters[row] for row in rows]
        count = len(set(names))
        average = len(rows) / count
        more = [*(scores[row] for row in rows), 0.0, average]
        weights = [*([1.0] * len(rows)), average, average]
        spread = _variance(more, weights, [*names, "\0zeros", "\0ones"])
        variances.append(spread * (count + 2) / count)  # the two are not data
        sizes.append(count)
    mean = math.fsum(means) / len(means)
    if min(sizes) < 2 or math.isnan(mean):
        return mean, NAN, NAN
    total = math.fsum(variances)
    freedom = total**2 / math.fsum(v**2 / (n + 1) for v, n in zip(variances, sizes, strict=True))
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(total) / len(means)
    return mean, max(0.0, mean - reach), min(1.0, mean + reach)
