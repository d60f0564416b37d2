"""Resonance RoPE: every wavelength rounded to a whole number of tokens.

    θ'ᵢ = 2π / round(2π / θᵢ)   over the frequencies of another rotary method

A plane whose wavelength is whole repeats exactly, so positions beyond the window show it only
angles it was trained on. Applied over YaRN by default, as in the paper.

Source: Wang et al. 2024, "Resonance RoPE" (arXiv:2403.00071), section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from longctx.errors import MethodError
from longctx.patch import Method
from longctx.registry import method_class
from longctx.rope import Frequencies, Rope

from ._frequency import FrequencyMethod

__all__ = ["METHOD", "Resonance"]


@dataclass(frozen=True, slots=True)
class Resonance(FrequencyMethod):
    """Whole wavelengths over another frequency method."""

    over: str = "yarn"
    """The method whose frequencies are rounded, at the same factor and its own defaults."""

    name: ClassVar[str] = "resonance"

    def __post_init__(self) -> None:
        super(Resonance, self).__post_init__()
        inner = method_class(self.over)
        if not issubclass(inner, FrequencyMethod) or inner is Resonance:
            raise MethodError(
                f"resonance: over={self.over!r} must be a method of static frequencies "
                "(linear, ntk, ntk_by_parts, yarn, llama3, abf)."
            )

    def frequencies(self, rope: Rope) -> Frequencies:
        """The other method's frequencies with whole wavelengths."""
        inner = method_class(self.over)(factor=self.factor, target=self.target)
        base: Frequencies = inner.frequencies(rope)
        wavelength = (2 * math.pi / base.inv_freq).round()
        return Frequencies(2 * math.pi / wavelength, base.attention_scaling)

    def neutral(self, rope: Rope) -> Method | None:
        """None: rounding always changes something."""
        return None


METHOD = Resonance
