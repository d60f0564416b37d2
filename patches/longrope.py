"""LongRoPE: a divisor of its own for every plane, found by search.

    θ'ᵢ = θᵢ / λᵢ;  cos and sin × √(1 + ln s / ln L)

λ comes from a search (Phi-3 ships one); it should be ≥ 1 and never fall with i. The same λ serves
every length, so the method is length-invariant; switching to other divisors for short inputs, as
Phi-3 does at its original window, cannot be cached across the switch and is not offered.

Source: Ding et al. 2024, LongRoPE (arXiv:2402.13753), section 3; the scaling from Phi-3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from longctx.errors import MethodError
from longctx.patch import Method
from longctx.rope import Frequencies, Rope, as_longrope

from ._frequency import FrequencyMethod
from ._scale import check_number

__all__ = ["METHOD", "LongRope"]


@dataclass(frozen=True, slots=True)
class LongRope(FrequencyMethod):
    """Given divisors of the inverse frequencies."""

    divisors: Sequence[float] = ()
    """λ, one per plane (d/2 of them), never falling."""
    attention_factor: float | None = None
    """Factor on cos and sin; None for √(1 + ln s / ln L)."""

    name: ClassVar[str] = "longrope"

    def __post_init__(self) -> None:
        super(LongRope, self).__post_init__()
        if isinstance(self.divisors, str | bytes) or not isinstance(self.divisors, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MethodError(f"longrope: divisors={self.divisors!r} must be a list of numbers.")
        object.__setattr__(self, "divisors", tuple(self.divisors))
        for index, divisor in enumerate(self.divisors):
            check_number(self.name, f"divisors[{index}]", divisor)
            if index and divisor < self.divisors[index - 1]:
                raise MethodError(
                    f"longrope: divisors[{index}]={divisor:g} is below the one before it "
                    f"({self.divisors[index - 1]:g}); λ must not fall with the plane's index."
                )
        if self.attention_factor is not None:
            check_number(self.name, "attention_factor", self.attention_factor)

    @classmethod
    def example(cls, rope: Rope) -> Method:
        """Four-fold, with divisors that rise evenly from 1 to 4."""
        return cls(factor=4.0, divisors=torch.linspace(1, 4, rope.dim // 2).tolist())

    def frequencies(self, rope: Rope) -> Frequencies:
        """θ / λ with the attention scaling.

        Raises:
            MethodError: λ has another length than the model has planes.
        """
        if len(self.divisors) != rope.dim // 2:
            raise MethodError(
                f"longrope needs divisors=, one for each of the model's {rope.dim // 2} planes; "
                f"got {len(self.divisors)}."
            )
        scaling = self.attention_factor
        if scaling is None:
            scaling = math.sqrt(1 + math.log(self.scale(rope)) / math.log(rope.length))
        divisors = torch.tensor(self.divisors, dtype=torch.float64)
        return Frequencies(rope.inv_freq() / divisors, float(scaling))

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """`rope_type: longrope`, the given λ to the last bit."""
        parameters = as_longrope(rope, self.frequencies(rope), self.scale(rope))
        divisors = [float(divisor) for divisor in self.divisors]
        return parameters | {"short_factor": divisors, "long_factor": divisors}

    def neutral(self, rope: Rope) -> Method | None:
        """λ = 1 and factor 1."""
        return LongRope(factor=1.0, divisors=(1.0,) * (rope.dim // 2))


METHOD = LongRope
