"""Position interpolation: positions are squeezed by s, so that all lie inside the trained window.

    θ'ᵢ = θᵢ / s

The same thing as LongChat's condensed positions (position / ratio, ratio 8 for 2k → 16k) and as
`rope_type: linear`. Attention between neighbours is blurred, so it needs fine-tuning (about 1,000
steps in the paper); then it is the most predictable of the methods.

Sources: Chen et al. 2023, "Extending Context Window of Large Language Models via Positional
Interpolation" (arXiv:2306.15595), eq. 4; LongChat (lmsys.org, June 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from longctx.rope import Frequencies, Rope

from ._frequency import FrequencyMethod

__all__ = ["METHOD", "Linear"]


@dataclass(frozen=True, slots=True)
class Linear(FrequencyMethod):
    """Interpolated positions (PI, LongChat condense)."""

    name: ClassVar[str] = "linear"

    def frequencies(self, rope: Rope) -> Frequencies:
        """θᵢ / s."""
        return Frequencies(rope.inv_freq() / self.scale(rope))

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """`rope_type: linear`."""
        return rope.parameters("linear", factor=self.scale(rope))


METHOD = Linear
