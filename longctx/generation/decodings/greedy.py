"""Greedy: the likeliest token, at every step.

When to use it: for short answers that are right or wrong, and for figures that must come out the
same again. Longer texts of small models end in loops: add a guard, or choose `dry` or `sample`.

Source: none; it is the argmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..decoding import Decoding

__all__ = ["DECODING", "Greedy"]


@dataclass(frozen=True, slots=True)
class Greedy(Decoding):
    """The likeliest token."""

    name: ClassVar[str] = "greedy"


DECODING = Greedy
