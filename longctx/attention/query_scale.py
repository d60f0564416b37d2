"""Factors on queries that grow with their position, which keep attention sharp over more keys.

Legend: m = position of a query in tokens, from 0; L = window that was trained, in tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LogNScale", "SsmaxScale", "TemperatureScale"]


@dataclass(frozen=True, slots=True)
class LogNScale:
    """max(1, ln(m + 1) / ln L): nothing changes inside the window."""

    length: int
    """L."""

    def __call__(self, positions: Tensor) -> Tensor:
        """Factors [B, S] at positions [B, S]."""
        return (positions.log1p() / math.log(self.length)).clamp(min=1.0)


@dataclass(frozen=True, slots=True)
class SsmaxScale:
    """s · ln(m + 1), as many as the keys that the query sees."""

    s: float

    def __call__(self, positions: Tensor) -> Tensor:
        """Factors [B, S] at positions [B, S]."""
        return self.s * positions.log1p()


@dataclass(frozen=True, slots=True)
class TemperatureScale:
    """1 + β · ln(1 + ⌊(m + counted) / floor⌋)."""

    beta: float
    floor: int
    """Tokens within which nothing changes."""
    counted: int
    """1 where a query counts itself (Llama-4), 0 where it counts those before it (Ministral-3)."""

    def __call__(self, positions: Tensor) -> Tensor:
        """Factors [B, S] at positions [B, S]."""
        return 1 + self.beta * ((positions + self.counted) / self.floor).floor().log1p()
