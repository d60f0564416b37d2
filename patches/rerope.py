"""ReRoPE: distances are cut off at a window w, or grow k times slower beyond it (leaky).

    Δ' = Δ            for Δ < w
    Δ' = w            beyond (rerope)
    Δ' = w + (Δ − w)/k   beyond (leaky, k > 1)

Keys are cached unturned (leaky: turned by n/k), which serves what lies beyond w; the last w keys
are turned again for what lies within. Beyond w rerope knows no order: it sees what, not where.
The reference code also scales queries by max(1, ln(m + 1)/ln L): `log_n`.

Source: Su 2023, Rectified RoPE (ReRoPE) and Leaky ReRoPE, https://kexue.fm/archives/9708 and its
code (bojone/rerope).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longctx.attention.regions import Plan, band, up_to
from longctx.attention.remapped import Planner
from longctx.errors import MethodError
from longctx.patch import Method
from longctx.rope import Rope

from ._remapped import RemappedMethod
from ._scale import check_number, check_tokens

__all__ = ["METHOD", "ReRope"]


@dataclass(frozen=True, slots=True)
class ReRopePlanner(Planner):
    """A near window at its distances, and all before it."""

    window: int
    leak: float | None

    framed: ClassVar[bool] = True

    def frame(self, positions: Tensor) -> Tensor:
        """0, or n/k where it leaks."""
        return positions * (0.0 if self.leak is None else 1 / self.leak)

    def furthest(self, tokens: int) -> float:
        """Cut off at the window, or growing slowly from there."""
        beyond = max(0, tokens - 1 - self.window)
        return min(tokens - 1, self.window) + (0.0 if self.leak is None else beyond / self.leak)

    def plan(self, first: int, queries: int, keys: int) -> Plan:
        """Two regions: the last w keys, and those before them."""
        own = torch.arange(first, first + queries, dtype=torch.float64)
        there = torch.arange(first + queries - keys, first + queries, dtype=torch.float64)
        beyond = float(self.window)
        if self.leak is not None:
            beyond -= self.window / self.leak
        rows, last = slice(0, queries), keys - queries
        near = band(rows, last, self.window)
        far = up_to(rows, last - self.window, query_turn=1, key_turn=1)
        return Plan(
            (*near, *far),
            (own - self.frame(own), torch.full_like(own, beyond)),
            (there - self.frame(there), None),
        )


@dataclass(frozen=True, slots=True)
class ReRope(RemappedMethod):
    """Rectified RoPE in every layer of full attention."""

    window: int | None = None
    """Tokens w that keep their distance; half of the model's window by default."""
    leak: float | None = None
    """How many times slower distances grow beyond, k; None for not at all."""

    name: ClassVar[str] = "rerope"

    def __post_init__(self) -> None:
        super(ReRope, self).__post_init__()
        if self.window is not None:
            check_tokens(self.name, "window", self.window)
        if self.leak is not None:
            check_number(self.name, "leak", self.leak, minimum=1.0)

    @classmethod
    def example(cls, rope: Rope) -> Method:
        """A quarter of the window near."""
        return cls(factor=4.0, window=max(1, rope.length // 4))

    def planner(self, length: int) -> ReRopePlanner:
        """The near window in tokens for a window of `length`."""
        window = max(1, length // 2) if self.window is None else self.window
        if window >= length:
            raise MethodError(
                f"{self.name}: window={window}: expected fewer tokens than the model's window of "
                f"{length}, since the distance {window} must have been trained."
            )
        return ReRopePlanner(window, self.leak)


METHOD = ReRope
