"""Beam search: the continuation whose tokens are likeliest together, of those that were kept.

    score = Σ log p / tokens^length_penalty, over num_beams continuations kept at every step

When to use it: for translation and other tasks whose answer is nearly fixed. Open text gets more
repetitive than by greedy decoding. A row's text is known at its end only, so that is when a stream
gets it.

Source: Wu et al. 2016 (arXiv:1609.08144), section 7; the search is that of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..checks import check_number, check_whole
from ..decoding import Decoding

__all__ = ["DECODING", "Beam"]


@dataclass(frozen=True, slots=True)
class Beam(Decoding):
    """The likeliest of several continuations, without draws."""

    num_beams: int = 4
    """Continuations that are kept at every step."""
    length_penalty: float = 1.0
    """Exponent of the length that a score is divided by: above 0 favours longer texts."""

    name: ClassVar[str] = "beam"
    beams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole(self.name, "num_beams", self.num_beams, least=2)
        check_number(self.name, "length_penalty", self.length_penalty, least=-100, most=100)

    def settings(self) -> dict[str, Any]:
        """Its fields."""
        return {"num_beams": self.num_beams, "length_penalty": float(self.length_penalty)}


DECODING = Beam
