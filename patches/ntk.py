"""NTK-aware scaling: a larger base keeps the fastest plane and interpolates the slowest by s.

    b' = b · s^(d/(d−2))

Works without fine-tuning up to a part of the nominal window (the last planes reach s, those before
them less), so choose s larger than the length you need.

Source: bloc97 2023 ("NTK-aware scaled RoPE"); Peng et al. 2023, YaRN (arXiv:2309.00071), eq. 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from longctx.rope import Frequencies, Rope

from ._frequency import FrequencyMethod

__all__ = ["METHOD", "Ntk"]


@dataclass(frozen=True, slots=True)
class Ntk(FrequencyMethod):
    """NTK-aware base change."""

    name: ClassVar[str] = "ntk"

    def theta(self, rope: Rope) -> float:
        """The new base b'."""
        return rope.theta * self.scale(rope) ** (rope.dim / (rope.dim - 2))

    def frequencies(self, rope: Rope) -> Frequencies:
        """b'^(−2i/d)."""
        return Frequencies(rope.inv_freq(self.theta(rope)))

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """Plain RoPE with another `rope_theta`."""
        return rope.parameters("default") | {"rope_theta": self.theta(rope)}


METHOD = Ntk
