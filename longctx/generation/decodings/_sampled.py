"""Fields of every decoding that can draw its tokens: 0 as temperature is greedy."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import RunError
from ..checks import check_number, check_whole
from ..decoding import Decoding, Sampling

__all__ = ["Sampled"]

_COLDEST = 1e-3


@dataclass(frozen=True, slots=True)
class Sampled(Decoding):
    """A decoding whose tokens are drawn, or taken greedily."""

    temperature: float = 0.0
    """Divides the logits before a token is drawn; 0 takes the likeliest (greedy)."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Draw among tokens at least this share as likely as the likeliest."""

    def __post_init__(self) -> None:
        check_number(self.name, "temperature", self.temperature, least=0, most=1000)
        if 0 < self.temperature < _COLDEST:
            raise RunError(
                f"{self.name}: temperature={self.temperature!r} is greedy, but for overflow: "
                f"expected 0, or {_COLDEST:g} and more."
            )
        check_whole(self.name, "top_k", self.top_k, least=0)
        check_number(self.name, "top_p", self.top_p, least=0, most=1, above=True)
        check_number(self.name, "min_p", self.min_p, least=0, most=1)
        idle = [
            f"{field}={value!r}"
            for field, value in (
                ("top_k", self.top_k or None),
                ("top_p", self.top_p if self.top_p < 1 else None),
                ("min_p", self.min_p or None),
            )
            if value is not None and not self.temperature
        ]
        if idle:
            raise RunError(
                f"{self.name}: {', '.join(idle)} with temperature=0 has no effect, since greedy "
                "decoding takes the likeliest token: set temperature, or leave it out."
            )

    @property
    def sampling(self) -> Sampling:
        """Its own fields."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)
