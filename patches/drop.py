"""DroPE: no positions at all (NoPE), with a factor on the logits beyond the window; needs training.

    θ'ᵢ = 0;  logits × (1 + coefficient · ln s), so cos and sin × √(1 + coefficient · ln s)

Only the causal mask then tells the order of tokens. A model that was trained with RoPE is of no use
so until it is recalibrated: train it under `drop`, without a factor, at lengths up to the original
window L. To read further, take that patch off the trained model and put `drop` with a factor on:
`longctx.patch_of(model).remove()`, then `longctx.extend(model, "drop", factor=4)`.

s is the new window over L, one number for inputs of any length; 1 without `factor` and `target`.
The coefficient 0.103 is the paper's for SmolLM. Where a model rotates only a part of each head, the
factor reaches the logits of that part alone.

When to use it: with training to spend on inputs no longer than L, for windows of several L.

Source: Gelberg et al. 2025, "Extending the Context of Pretrained LLMs by Dropping Their Positional
Embeddings" (arXiv:2512.12167).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from longctx.errors import MethodError
from longctx.patch import Method
from longctx.rope import Frequencies, Rope

from ._frequency import FrequencyMethod

__all__ = ["METHOD", "Drop"]


@dataclass(frozen=True, slots=True)
class Drop(FrequencyMethod):
    """No positional embedding."""

    coefficient: float = 0.103
    """How fast the factor on the logits grows with ln s; 0 leaves them alone."""

    name: ClassVar[str] = "drop"
    needs_extent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super(Drop, self).__post_init__()
        number = isinstance(self.coefficient, int | float) and self.coefficient is not True  # pyright: ignore[reportUnnecessaryIsInstance]
        if not (number and 0 <= self.coefficient <= sys.float_info.max):
            raise MethodError(
                f"drop: coefficient={self.coefficient!r} must be a finite number ≥ 0 (0.103 is "
                "SmolLM's)."
            )

    def frequencies(self, rope: Rope) -> Frequencies:
        """Zeros, with the square root of the factor on the logits."""
        on_logits = 1 + self.coefficient * math.log(self.scale(rope))
        return Frequencies(torch.zeros_like(rope.inv_freq()), math.sqrt(on_logits))

    def neutral(self, rope: Rope) -> Method | None:
        """None: positions are gone under every setting."""
        return None


METHOD = Drop
