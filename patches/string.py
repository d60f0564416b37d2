"""STRING: far distances are shifted down, so that the least trained ones are never used.

    Δ' = Δ                  for Δ < S
    Δ' = Δ − S + W          beyond, with S the shift and W ≪ S the window that keeps apart

Large distances inside the window are rare in training and poorly learnt: with S = L/3 and W = 128
no key stands further than 2L/3 + 128. Order is kept on both sides; W to S − 1 are used twice.

Source: An et al. 2024, Why Does the Effective Context Length of LLMs Fall Short?
(arXiv:2410.18745), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from longctx.attention.regions import Plan, band, up_to
from longctx.attention.remapped import Planner
from longctx.errors import MethodError
from longctx.patch import Method
from longctx.rope import Rope

from ._remapped import RemappedMethod
from ._scale import check_tokens

__all__ = ["METHOD", "String"]


@dataclass(frozen=True, slots=True)
class StringPlanner(Planner):
    """The last S keys, and those before them, shifted."""

    shift: int
    window: int

    def furthest(self, tokens: int) -> float:
        """That of the first token, or of the last one before the shift."""
        if tokens <= self.shift:
            return tokens - 1
        return max(self.shift - 1, tokens - 1 - self.shift + self.window)

    def plan(self, first: int, queries: int, keys: int) -> Plan:
        """Two regions: distances below the shift, and those from it on."""
        del first
        rows, last = slice(0, queries), keys - queries
        near = band(rows, last, self.shift)
        far = up_to(rows, last - self.shift, query_turn=1)
        back = torch.full((queries,), float(self.window - self.shift), dtype=torch.float64)
        return Plan((*near, *far), (None, back))


@dataclass(frozen=True, slots=True)
class String(RemappedMethod):
    """Shifted far distances in every layer of full attention."""

    shift: int | None = None
    """Distance S in tokens from which on keys are shifted; a third of the window by default."""
    window: int | None = None
    """The distance W in tokens that S becomes; 128, or a sixteenth of a shorter window than 2,048,
    by default."""

    name: ClassVar[str] = "string"
    needs_extent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super(String, self).__post_init__()
        for field in ("shift", "window"):
            if getattr(self, field) is not None:
                check_tokens(self.name, field, getattr(self, field))

    @classmethod
    def example(cls, rope: Rope) -> Method:
        """The defaults: it serves the window there is."""
        del rope
        return cls()

    def planner(self, length: int) -> StringPlanner:
        """Shift and window in tokens for a window of `length`."""
        shift = max(2, length // 3) if self.shift is None else self.shift
        window = min(128, max(1, length // 16)) if self.window is None else self.window
        if not window < shift < length:
            raise MethodError(
                f"{self.name}: shift={shift}, window={window}: expected window < shift < {length}, "
                "the model's window."
            )
        return StringPlanner(shift, window)


METHOD = String
