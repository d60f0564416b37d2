"""Llama 3 scaling: by wavelength, slow planes divided by s, fast ones kept, a blend between.

    wavelength λ = 2π/θ
    λ > L / low_freq_factor    θ' = θ/s
    λ < L / high_freq_factor   θ' = θ
    between                    θ' = (1 − t) θ/s + t θ,  t = (L/λ − low) / (high − low)

Source: Llama 3.1's reference code ("apply_scaling"), as `rope_type: llama3` in transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from longctx.errors import MethodError
from longctx.rope import Frequencies, Rope

from ._frequency import FrequencyMethod
from ._scale import check_number

__all__ = ["METHOD", "Llama3"]


@dataclass(frozen=True, slots=True)
class Llama3(FrequencyMethod):
    """Llama 3.1's frequency scaling."""

    low_freq_factor: float = 1.0
    """Turns within the original window below which a plane is divided by s."""
    high_freq_factor: float = 4.0
    """Turns above which it is left alone."""

    name: ClassVar[str] = "llama3"

    def __post_init__(self) -> None:
        super(Llama3, self).__post_init__()
        check_number(self.name, "low_freq_factor", self.low_freq_factor)
        check_number(self.name, "high_freq_factor", self.high_freq_factor)
        if self.high_freq_factor <= self.low_freq_factor:
            raise MethodError(
                f"llama3: high_freq_factor={self.high_freq_factor:g} must be larger than "
                f"low_freq_factor={self.low_freq_factor:g}."
            )

    def frequencies(self, rope: Rope) -> Frequencies:
        """Kept, divided or blended by the turns that a plane makes within the window."""
        own = rope.inv_freq()
        turns = rope.length * own / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return Frequencies((1 - kept) * own / self.scale(rope) + kept * own)

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """`rope_type: llama3`."""
        return rope.parameters(
            "llama3",
            factor=self.scale(rope),
            original_max_position_embeddings=rope.length,
            low_freq_factor=float(self.low_freq_factor),
            high_freq_factor=float(self.high_freq_factor),
        )


METHOD = Llama3
