"""What a server's numbers say: the same as ours, what it computes instead, or neither for sure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

__all__ = ["SAME", "Limit", "diagnosis", "largest", "limits_of", "same", "undecided"]

SAME = 1e-3
"""Largest difference of a log-probability between two float32 computations of one model."""
_SPREAD = 3.0
"""How many times our own rounding two computations in half precision may lie apart."""
_SURE = 1e-3
"""Chance below which a server's numbers are not as near another model's as ours."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Up to where two computations count as one."""

    largest: float
    median: float


def limits_of(ours: list[Tensor], rounded: list[Tensor]) -> list[Limit]:
    """What our own rounding is worth, prompt by prompt."""
    return [
        Limit(
            max(SAME, _SPREAD * largest(mine - half)),
            max(SAME, _SPREAD * float((mine - half).abs().median())),
        )
        for mine, half in zip(ours, rounded, strict=True)
    ]


def largest(difference: Tensor) -> float:
    """The largest absolute value."""
    return float(difference.abs().max())


def same(answers: list[Tensor], other: list[Tensor], limits: list[Limit]) -> bool:
    """Whether two computations of all prompts, [N] each, count as one."""
    return all(
        largest(a - b) <= limit.largest and float((a - b).abs().median()) <= limit.median
        for a, b, limit in zip(answers, other, limits, strict=True)
    )


def diagnosis(
    answers: list[Tensor],
    ours: list[Tensor],
    limits: list[Limit],
    plain: list[Tensor] | None,
    others: dict[str, list[Tensor]],
    rounding: list[Limit] | None,
) -> str:
    """What the server computes instead, as far as one of our own runs shows it."""
    if plain is not None and same(answers, plain, limits):
        return "the scaling was dropped: the server computes the unextended model"
    for what, run in others.items():
        if same(answers, run, limits):
            return f"wrong temperature: the server computes these frequencies with {what}"
    off = max(largest(a - b) for a, b in zip(answers, ours, strict=True))
    if rounding is not None and same(answers, ours, rounding):
        return (
            f"differences up to {off:.1e} are of the size of half precision's rounding: serve it "
            "in float32, or check with --dtype bfloat16 or float16"
        )
    return (
        f"another model: log-probabilities differ by up to {off:.1e}, and neither the unextended "
        "model nor another temperature nor rounding explains it"
    )


def undecided(
    answers: list[Tensor],
    ours: list[Tensor],
    limits: list[Limit],
    others: dict[str, list[Tensor]],
) -> Iterator[str]:
    """Models that the server may compute instead of ours, as far as its numbers tell.

    Those within the limits count, unless more tokens are nearer to ours than chance gives.
    """
    for what, other in others.items():
        if not same(answers, other, limits):
            continue
        found, own, its = torch.cat(answers), torch.cat(ours), torch.cat(other)
        differ = (own - its).abs() > SAME / 10  # by more than float32 rounds
        nearer = int(((found - own).abs() < (found - its).abs())[differ].sum())
        count = int(differ.sum())
        if not count or binomtest(nearer, count, alternative="greater").pvalue >= _SURE:
            yield (
                f"undecided: the server's numbers fit {what} as well (of {count} tokens where "
                f"that differs, {nearer} are nearer to ours): ask for more positions, longer "
                "lengths, or a server in float32"
            )
