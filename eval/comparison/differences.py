"""How much two sweeps differ on the same prompts or the same target tokens.

Differences are second − first. A share of answers within one cell: exact McNemar test and the
interval of Bonett & Price. Pooled over cells, of which each haystack may have several prompts (at
several lengths too where these share them), the clusters of prompts change sign together and the
interval is t over clusters. NLL, and shares that each prompt has of its own: t over documents for
both p-value and interval.

Every interval can be a bootstrap of whole haystacks or documents instead, which takes no
distribution for granted. It is not the default, since from the some ten documents of a sweep it is
too narrow (`paired_tests.cluster_bootstrap`), and from many both agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from scipy import stats

from longctx.errors import RunError

from ..stats.intervals import mean_interval, too_few
from ..stats.paired_tests import mcnemar, paired_bootstrap, sign_flip
from ..tasks.shared.protocol import Observation

__all__ = [
    "Difference",
    "Interval",
    "Pair",
    "answers_in_a_cell",
    "bonett_price",
    "check_interval",
    "nll",
    "pair",
    "pooled_answers",
    "shares",
]

Pair: TypeAlias = tuple[Observation, Observation]
Interval = Literal["t", "bootstrap"]
"""Of a difference: by a t distribution (answers in a cell: Bonett & Price's), or by BCa bootstrap
of whole haystacks or documents."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Second − first with its 95% interval; NaN where there is none."""

    value: float
    """Of a share (−1 to 1), or NLL per target token in nats."""
    low: float
    high: float
    interval: str
    """Which interval, over what; "none: …" says why there is none."""
    p_value: float
    """Two-sided."""
    test: str
    pairs: int
    clusters: int
    """Haystacks or documents."""
    smallest_p: float = 0.0
    """No figures in clusters so few could give less."""


def pair(first: Mapping[str, Observation], second: Mapping[str, Observation]) -> list[Pair]:
    """Put together what two sweeps found on the same items of one cell.

    Raises:
        RunError: an item is another prompt in either, although tokenizer and settings agree.
    """
    pairs = [(first[item], second[item]) for item in first if item in second]
    for a, b in pairs:
        scored = a.targets and b.targets  # an answer read in pieces is not scored by tokens
        if a.cluster != b.cluster or (scored and a.targets != b.targets):
            raise RunError(
                f"item {a.item!r} at {a.length:,} tokens is not the same input in both runs "
                f"({a.targets} targets in {a.cluster!r} against {b.targets} in {b.cluster!r}): "
                "sweep both anew with this release and, if lengths share haystacks, to the same "
                "longest length."
            )
    return pairs


def check_interval(interval: str) -> None:
    """Refuse an unknown kind of interval (RunError)."""
    if interval not in get_args(Interval):
        raise RunError(f"interval={interval!r}: expected {' or '.join(get_args(Interval))}.")


def answers_in_a_cell(pairs: Sequence[Pair], interval: Interval = "t") -> Difference:
    """Share of right answers in one cell; the test takes its prompts for independent."""
    before, after = [_right(a) for a, _ in pairs], [_right(b) for _, b in pairs]
    found = mcnemar(before, after)
    low, high = bonett_price(found.only_first, found.only_second, len(pairs))
    name = "Bonett–Price 95%"
    if interval == "bootstrap":
        low, high, name = _bootstrap(before, after, [1] * len(pairs), _names(pairs))
    return Difference(
        value=found.difference,
        low=low,
        high=high,
        interval=name,
        p_value=found.p_value,
        test=f"exact McNemar, {found.only_first + found.only_second} prompts differ",
        pairs=len(pairs),
        clusters=_clusters(pairs),
    )


def pooled_answers(pairs: Sequence[Pair], interval: Interval = "t") -> Difference:
    """Share of right answers over several cells, every prompt counting alike."""
    before, after = [_right(a) for a, _ in pairs], [_right(b) for _, b in pairs]
    clusters, weights = _names(pairs), [1] * len(pairs)
    found = sign_flip(before, after, clusters)
    if interval == "bootstrap":
        low, high, name = _bootstrap(before, after, weights, clusters)
    else:
        changes = [b - a for a, b in zip(before, after, strict=True)]
        low, high, name, _ = _t(changes, weights, clusters, "clusters")
    low, high = max(low, -1.0), min(high, 1.0)  # NaN, coming first, stays
    return Difference(
        value=found.difference,
        low=low,
        high=high,
        interval=name,
        p_value=found.p_value,
        test=f"sign flips of {found.clusters} clusters, {found.informative} of which differ",
        pairs=found.pairs,
        clusters=found.clusters,
        smallest_p=found.smallest_p,
    )


def nll(pairs: Sequence[Pair], interval: Interval = "t") -> Difference:
    """Mean NLL per target token, every token counting alike; exp of it is a perplexity ratio."""
    before, after = [a.nll for a, _ in pairs], [b.nll for _, b in pairs]
    return _over_documents(pairs, before, after, [a.targets for a, _ in pairs], interval)


def shares(pairs: Sequence[Pair], figure: str, interval: Interval = "t") -> Difference:
    """Mean of the share in each prompt's details (`Task.figure`), every prompt counting alike."""
    before, after = ([o.detail[figure] for o in side] for side in zip(*pairs, strict=True))
    return _over_documents(pairs, before, after, [1] * len(pairs), interval)


def _over_documents(
    pairs: Sequence[Pair],
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[float],
    interval: Interval,
) -> Difference:
    names = _names(pairs)
    changes = [b - a for a, b in zip(before, after, strict=True)]
    low, high, name, p = _t(changes, weights, names, "documents")
    if interval == "bootstrap":
        low, high, name = _bootstrap(before, after, weights, names)
    return Difference(
        value=math.fsum(changes) / sum(weights),
        low=low,
        high=high,
        interval=name,
        p_value=p,
        test=f"t over {_clusters(pairs)} documents",
        pairs=len(pairs),
        clusters=_clusters(pairs),
    )


def bonett_price(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Return the 95% interval of the difference of two shares on the same `n` prompts.

    A Wald interval after adding half a prompt to each cell of the table: not empty where no prompt
    differs. It is clipped to −1 and 1.

    Source: Bonett & Price 2012; recommended by Fagerland, Lydersen & Laake 2014.

    >>> [round(x, 3) for x in bonett_price(1, 5, 20)]
    [-0.058, 0.422]
    """
    lost, won = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    middle = won - lost
    reach = float(stats.norm.ppf(0.975)) * math.sqrt((won + lost - middle**2) / (n + 2))
    return max(-1.0, middle - reach), min(1.0, middle + reach)


def _t(
    changes: Sequence[float], weights: Sequence[float], clusters: Sequence[str], what: str
) -> tuple[float, float, str, float]:
    """Interval of Σ changes / Σ weights by t over clusters, its name, and the p-value of 0."""
    if not any(changes):
        return math.nan, math.nan, "none: no pair differs", 1.0
    mean, low, high = mean_interval(changes, weights, clusters)
    n = len(set(clusters))
    if few := too_few(n, what.removesuffix("s")):
        return math.nan, math.nan, few, math.nan
    error = (high - low) / 2 / float(stats.t.ppf(0.975, n - 1))
    if error <= 1e-12 * abs(mean):
        return math.nan, math.nan, f"none: all {n} {what} differ alike", math.nan
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return low, high, f"t over {n} {what}, 95%", p


def _bootstrap(
    before: Sequence[float], after: Sequence[float], weights: Sequence[float], names: Sequence[str]
) -> tuple[float, float, str]:
    """Interval of the weighted mean change, and its name."""
    found = paired_bootstrap(before, after, names, weights=weights)
    return found.low, found.high, found.interval


def _right(observation: Observation) -> int:
    assert observation.correct is not None, "cells with NaN are reported as failed, not compared"
    return int(observation.correct)


def _names(pairs: Iterable[Pair]) -> list[str]:
    return [a.cluster for a, _ in pairs]


def _clusters(pairs: Iterable[Pair]) -> int:
    return len(set(_names(pairs)))
