"""p-RoPE: the slowest share (1 − p) of the planes does not turn; needs training.

    θ'ᵢ = θᵢ  for i < ⌊p · d/2⌋,  0 for the slower planes after them

θ falls with i, so the planes that stand still are those of the lowest frequencies: they carry what
a token means, whatever its distance. p = 1 is RoPE, p = 0 would be no positions at all (`drop`).
The frequencies that are left are the model's own, not spread anew over fewer planes. `factor` or
`target` only names the new window.

When to use it: with continued pretraining. The authors trained with it from the start; a model that
was trained with plain RoPE has to get used to it.

Saved as `rope_type: proportional`, which computes the same. Its `partial_rotary_factor` is p, so a
model that rotates only a part of each head, and has a `partial_rotary_factor` of its own, is saved
as longrope instead.

Source: Barbero et al. 2024, "Round and Round We Go! What makes Rotary Positional Encodings useful?"
(arXiv:2410.06205), section 6.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from longctx.errors import MethodError
from longctx.patch import Method
from longctx.rope import Frequencies, Rope, as_longrope

from ._frequency import FrequencyMethod
from ._scale import check_number

__all__ = ["METHOD", "PRope"]


@dataclass(frozen=True, slots=True)
class PRope(FrequencyMethod):
    """RoPE without its lowest frequencies."""

    p: float = 0.75
    """Share of the planes that keep turning, the fastest ones; 0 < p ≤ 1."""

    name: ClassVar[str] = "p_rope"
    needs_extent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super(PRope, self).__post_init__()
        check_number(self.name, "p", self.p)
        if self.p > 1:
            raise MethodError(
                f"p_rope: p={self.p!r} must be a share of the planes, 0 < p ≤ 1 (p=0.75 stops the "
                "slowest quarter)."
            )

    def frequencies(self, rope: Rope) -> Frequencies:
        """θ, then zeros.

        Raises:
            MethodError: p is below one plane's share.
        """
        own = rope.inv_freq()
        turning = int(self.p * rope.dim // 2)  # as `rope_type: proportional` rounds
        if turning == 0:
            raise MethodError(
                f"p_rope: p={self.p!r} leaves none of the model's {len(own)} planes turning: "
                f"expected p ≥ {1 / len(own):.4g}. The method without positions is drop."
            )
        return Frequencies(own * (torch.arange(len(own)) < turning))

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """`rope_type: proportional` where its `partial_rotary_factor` is free to mean p."""
        if rope.partial_rotary_factor is not None:
            return as_longrope(rope, self.frequencies(rope), self.scale(rope))
        return rope.parameters("proportional", partial_rotary_factor=float(self.p))

    def neutral(self, rope: Rope) -> Method | None:
        """Every plane turns."""
        return PRope(factor=1.0, p=1.0)


METHOD = PRope
