"""Up to which length does a model read reliably? A fit with its interval, and three definitions.

The fit: P(correct) falls with log2(length) along a logistic curve, and the effective length is
where it crosses the threshold. What lies outside the tested lengths is given as a bound ("at least
8,192"), never extrapolated. Assumes one falling curve from 1 to 0: an accuracy that levels off
below 1 or dips in between is no such curve, which `misfit_p` tells.

Sources: profile likelihood: Venzon & Moolgavkar 1988; scaled for clusters (ratio of sandwich to
model variance): Rotnitzky & Jewell 1990, Chandler & Bate 2007. RULER: Hsieh et al. 2024
(arXiv:2404.06654), table 3. YaRN: Peng et al. 2023 (arXiv:2309.00071), table 5. Position
Interpolation: Chen et al. 2023 (arXiv:2306.15595), section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

from longctx.errors import DataError

from .intervals import too_few
from .paired_tests import Floats, Indices, check_clusters, check_numbers

__all__ = ["EffectiveLength", "effective_length", "pi_length", "ruler_length", "yarn_length"]

_SATURATED = 60.0  # logits between the two closest lengths: steeper curves give the same figures
_SINGULAR = 1e10  # condition number from which a variance is rounding noise


@dataclass(frozen=True, slots=True)
class EffectiveLength:
    """Where the accuracy falls below a threshold; all lengths in tokens."""

    threshold: float
    """Accuracy, 0 to 1."""
    tokens: int
    """The estimate, or the tested length that bounds it."""
    bound: Literal["at", "at least", "below"]
    """The curve crosses at `tokens`, not before the longest or before the shortest tested."""
    low: int | None
    """Lower end of the interval, at most the longest tested; None: below the shortest tested."""
    high: int | None
    """Upper end, at least the shortest tested; None: beyond the longest tested."""
    interval: str
    """Which interval, over what; "none: …" says why both ends are None."""
    shortest: int
    """Tested."""
    longest: int
    between: tuple[int, int] | None
    """Where every prompt passes up to one length and none from the next: any length between these
    two fits as well as `tokens`, their geometric mean."""
    misfit_p: float
    """Test of the curve against an accuracy of its own at each length (χ² of the likelihood ratio,
    prompts independent); NaN below 3 lengths. A small one: read the accuracies, not the fit."""

    def __str__(self) -> str:
        """Write it as a table does.

        >>> str(effective_length([1024] * 20 + [2048] * 20, [1] * 40))
        '≥ 2,048 tokens (≥ 2,048)'
        """
        sign = {"at": "", "at least": "≥ ", "below": "< "}[self.bound]
        text = f"{sign}{self.tokens:,} tokens"
        if self.interval.startswith("none"):
            return text
        low = f"< {self.shortest:,}" if self.low is None else f"{self.low:,}"
        high = f"≥ {self.longest:,}" if self.high is None else f"{self.high:,}"
        if self.low == self.longest or self.high == self.shortest:
            return f"{text} ({high if self.high is None else low})"
        return f"{text} ({low} to {high})"


def effective_length(
    lengths: ArrayLike,
    correct: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    threshold: float = 0.8,
    confidence: float = 0.95,
) -> EffectiveLength:
    """Fit the length at which the accuracy crosses the threshold.

    The interval holds all lengths whose profile likelihood is close enough to the best; it stays
    finite where all short prompts pass and all long ones fail. Without clusters, prompts count as
    independent (χ² with 1 degree of freedom). With them, the likelihood ratio is divided by the
    factor (at least 1) by which clusters enlarge the variance, and compared with t² on clusters − 1
    degrees of freedom; where that factor cannot be estimated (all pass, a cliff, …) it is the
    mean number of prompts that share a length and a cluster, as if these were copies.

    Args:
        lengths: tokens of each prompt.
        correct: 1 or 0 for each.
        clusters: haystack of each, the same name at every length; None: each is its own.
        threshold: accuracy to hold, 0 to 1; 0.8 is YaRN's.
        confidence: of the interval, 0 to 1.

    Raises:
        DataError: no prompts, unequal numbers, outcomes other than 0 and 1, lengths that are no
            whole numbers above 0, or a threshold or confidence outside 0 to 1.
    """
    y = check_numbers(correct, "correct", binary=True)
    tokens = check_numbers(lengths, "lengths")
    if len(tokens) != len(y):
        raise DataError(f"{len(tokens)} lengths, {len(y)} outcomes: pass one of each per prompt.")
    if (odd := tokens[(tokens < 1) | (tokens % 1 != 0)]).size:
        raise DataError(f"a length of {odd[0]:g}: expected whole tokens, 1 or more.")
    for name, share in (("threshold", threshold), ("confidence", confidence)):
        if not 0 < share < 1:
            raise DataError(f"{name}={share}: expected a share between 0 and 1, such as 0.8.")
    group = None if clusters is None else check_clusters(clusters, len(y))
    tested, which = np.unique(tokens, return_inverse=True)
    hits, n = np.bincount(which, y).astype(float), np.bincount(which).astype(float)
    curve = _Curve(np.log2(tested), hits, n, float(special.logit(threshold)))
    best = curve.fit()
    limit, over = _limit(curve, best, y, which, group, confidence)
    low, high = _ends(curve, best, limit / 2)
    bound = "at least" if best.x > curve.x[-1] else "below" if best.x < curve.x[0] else "at"
    return EffectiveLength(
        threshold=threshold,
        tokens=round(2.0 ** min(max(best.x, curve.x[0]), curve.x[-1])),
        bound=bound,
        low=None if low is None else round(2.0**low),
        high=None if high is None else round(2.0**high),
        interval=over,
        shortest=int(tested[0]),
        longest=int(tested[-1]),
        between=best.between and (round(2.0 ** best.between[0]), round(2.0 ** best.between[1])),
        misfit_p=_misfit(curve, best),
    )


def ruler_length(means: Mapping[int, float], threshold: float = 0.856) -> int | None:
    """Return the longest tested length whose mean score is above the threshold, None if none is.

    The default is RULER's: what Llama-2-7B has at 4k, over its 13 tasks. Shorter ones may fail.

    Args:
        means: mean score (0 to 1) by length in tokens.
        threshold: 0 to 1.

    Raises:
        DataError: no lengths, or a score outside 0 to 1.

    >>> ruler_length({4096: 0.95, 8192: 0.80, 16384: 0.90})
    16384
    """
    return max((k for k, mean in _scores(means) if mean > threshold), default=None)


def yarn_length(means: Mapping[int, float], threshold: float = 0.8) -> int | None:
    """Return the longest tested length with at least 80% of passkeys found. See `ruler_length`."""
    return max((k for k, mean in _scores(means) if mean >= threshold), default=None)


def pi_length(means: Mapping[int, float], threshold: float = 0.2) -> int | None:
    """Return the longest length up to which all tested have at least 20%. See `ruler_length`.

    >>> pi_length({4096: 0.95, 8192: 0.15, 16384: 0.90})
    4096
    """
    longest = None
    for length, mean in _scores(means):
        if mean < threshold:
            break
        longest = length
    return longest


def _scores(means: Mapping[int, float]) -> list[tuple[int, float]]:
    if not means:
        raise DataError("no lengths: pass a mean score for each tested length.")
    for length, mean in means.items():
        if not 0 <= mean <= 1:
            raise DataError(f"a mean score of {mean} at {length} tokens: expected 0 to 1.")
    return sorted(means.items())


@dataclass(frozen=True, slots=True)
class _Fit:
    x: float
    """log2 tokens where the curve crosses the threshold; ±∞ where it does so nowhere."""
    fall: float
    """Logits per doubling, 0 or more."""
    loglik: float
    between: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class _Curve:
    """logit P(correct) = logit threshold + fall · (x0 − x), fall ≥ 0, of counts by length."""

    x: Floats
    """log2 tokens of the tested lengths, ascending."""
    hits: Floats
    n: Floats
    at: float
    """Logit of the threshold."""

    @property
    def steepest(self) -> float:
        return _SATURATED / float(np.diff(self.x).min(initial=1.0))

    def loglik(self, eta: Floats) -> float:
        misses = self.n - self.hits
        return float((self.hits * special.log_expit(eta) + misses * special.log_expit(-eta)).sum())

    def excess(self, eta: Floats) -> Floats:
        """Hits beyond those expected, by length."""
        return self.hits - self.n * special.expit(eta)

    def profile(self, x0: float) -> float:
        """Best log-likelihood of a curve that crosses at x0 (concave in its fall)."""
        apart = x0 - self.x
        fall = _root(lambda u: float(apart @ self.excess(self.at + u * apart)), self.steepest)
        return self.loglik(self.at + fall * apart)

    def fit(self) -> _Fit:
        """Best curve, by its height in the middle for each fall and then by its fall."""
        shares = self.hits / self.n
        if shares.min() == 1 or shares.max() == 0:
            return _Fit(math.copysign(math.inf, shares[0] - 0.5), 0.0, 0.0)
        passed = int((shares == 1).sum())
        if (shares[:passed] == 1).all() and (shares[passed:] == 0).all():
            ends = float(self.x[passed - 1]), float(self.x[passed])
            return _Fit(sum(ends) / 2, self.steepest, 0.0, ends)
        apart = self.x.mean() - self.x

        def height(fall: float) -> float:
            reach = fall * float(np.abs(apart).max()) + 50.0
            return _zero(lambda a: float(self.excess(a + fall * apart).sum()), -reach, reach)

        fall = _root(lambda u: float(apart @ self.excess(height(u) + u * apart)), self.steepest)
        top = height(fall)
        gap = top - self.at
        x = self.x.mean() + gap / fall if fall else math.copysign(math.inf, gap)
        return _Fit(float(x), fall, self.loglik(top + fall * apart))


def _root(slope: Callable[[float], float], most: float) -> float:
    """Where a falling slope passes 0 between 0 and `most`, or the end that is nearest to it."""
    if slope(0.0) <= 0:
        return 0.0
    return most if slope(most) >= 0 else _zero(slope, 0.0, most)


def _zero(function: Callable[[float], float], low: float, high: float) -> float:
    return float(optimize.root_scalar(function, bracket=(low, high), method="brentq").root)


def _ends(curve: _Curve, best: _Fit, drop: float) -> tuple[float | None, float | None]:
    """Where (log2) the profile, which rises up to the best and then falls, is lower by `drop`."""
    first, last = float(curve.x[0]), float(curve.x[-1])

    def above(x0: float) -> float:
        return curve.profile(x0) - best.loglik + drop

    inside = min(max(best.x, first), last)
    low = high = None
    if best.x >= first and above(first) < 0:
        low = last if above(inside) < 0 else _zero(above, first, inside)
    if best.x <= last and above(last) < 0:
        high = first if above(inside) < 0 else _zero(above, inside, last)
    return low, high


def _limit(
    curve: _Curve, best: _Fit, y: Floats, which: Indices, group: Indices | None, confidence: float
) -> tuple[float, str]:
    """What twice the log-likelihood may fall by within the interval, and the interval's name."""
    if group is None:
        return float(stats.chi2.ppf(confidence, 1)), f"profile likelihood, {confidence:.0%}"
    clusters = int(group.max()) + 1
    if few := too_few(clusters):
        return math.inf, few
    factor = len(y) / len(set(zip(which.tolist(), group.tolist(), strict=True)))
    if best.fall and best.between is None and math.isfinite(best.x):
        apart = best.x - curve.x
        p = special.expit(curve.at + best.fall * apart)
        z = np.stack([np.full_like(apart, best.fall), apart])  # d logit / d (x0, fall)
        information = (z * curve.n * p * (1 - p)) @ z.T
        if np.linalg.cond(information) < _SINGULAR:
            bread = np.linalg.inv(information)
            scores = np.stack([np.bincount(group, (y - p[which]) * row[which]) for row in z])
            few = (clusters / (clusters - 1)) ** 2  # Mancl & DeRouen 2001, for equal clusters
            factor = max(1.0, float((bread @ scores @ scores.T @ bread)[0, 0] * few / bread[0, 0]))
    t = float(stats.t.ppf((1 + confidence) / 2, clusters - 1))
    return t**2 * factor, f"profile likelihood scaled for {clusters} clusters, {confidence:.0%}"


def _misfit(curve: _Curve, best: _Fit) -> float:
    if len(curve.x) < 3:
        return math.nan
    shares = curve.hits / curve.n
    free = special.xlogy(curve.hits, shares) + special.xlogy(curve.n - curve.hits, 1 - shares)
    return float(stats.chi2.sf(2 * max(0.0, free.sum() - best.loglik), len(curve.x) - 2))
