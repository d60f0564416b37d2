"""CoPE: a cosine taper of the last planes' frequencies, down to 0 for the slowest plane.

    θ'ᵢ = θᵢ · ½(1 + cos t),  t = π · k / (n − 1)  for the last n planes, k = 0 … n − 1

t begins at 0 on the fastest of the n planes, which therefore keeps its frequency, and ends at π on
the slowest plane of all, which does not turn. Planes before them are left alone. This is the
project's reading, and what the reference implementation computes.

A plane that never turned once within the original window meets new angles beyond it; slowed down,
it meets them later or never. By default n counts those planes: 2π/θᵢ > L. That is the project's
choice: it gives 29 of Llama-3-8B's 64 planes, where the reference implementation has n=20. `factor`
or `target` only names the new window.

When to use it: with fine-tuning, as the authors did (an 8k model to 64k). Measure before you rely
on it without.

Source: "CoPE: Clipped RoPE as A Scalable Free Lunch for Long Context LLMs" 2026 (arXiv:2602.05258),
and its reference implementation (github.com/hrlics/CoPE, modeling_cope.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from longctx.errors import MethodError
from longctx.patch import Method
from longctx.rope import Frequencies, Rope

from ._frequency import FrequencyMethod

__all__ = ["METHOD", "Cope"]


@dataclass(frozen=True, slots=True)
class Cope(FrequencyMethod):
    """Low frequencies that fade out."""

    n: int | None = None
    """Planes that are tapered, counted from the slowest; 0 for none, None for those whose
    wavelength is longer than the original window."""

    name: ClassVar[str] = "cope"

    def __post_init__(self) -> None:
        super(Cope, self).__post_init__()
        whole = isinstance(self.n, int) and not isinstance(self.n, bool)
        if self.n is not None and (not whole or self.n < 0 or self.n == 1):
            raise MethodError(
                f"cope: n={self.n!r} must be a whole number of planes, 0 or ≥ 2 (a taper of one "
                "plane would keep its frequency)."
            )

    def frequencies(self, rope: Rope) -> Frequencies:
        """θ · ½(1 + cos t) for the last planes.

        Raises:
            MethodError: n is more than the model has planes, or no two planes need a taper.
        """
        own = rope.inv_freq()
        n = self._tapered(rope)
        t = torch.linspace(0, math.pi, n, dtype=torch.float64)
        kept = torch.ones_like(own)
        kept[len(own) - n :] = (1 + t.cos()) / 2
        return Frequencies(own * kept)

    def _tapered(self, rope: Rope) -> int:
        """How many planes are tapered."""
        own = rope.inv_freq()
        if self.n is None:
            found = int((2 * math.pi / own > rope.length).sum())
            if found < 2:
                raise MethodError(
                    f"cope: {found} of the model's {len(own)} planes have a wavelength beyond the "
                    f"original window of {rope.length} tokens, too few to taper: pass n=, from 2 "
                    f"to {len(own)}."
                )
            return found
        if self.n > len(own):
            raise MethodError(
                f"cope: n={self.n} is more than the model's {len(own)} planes; expected n ≤ "
                f"{len(own)}, or none, which tapers those that outlast the window."
            )
        return self.n

    def neutral(self, rope: Rope) -> Method | None:
        """No plane is tapered."""
        return Cope(factor=1.0, n=0)


METHOD = Cope
