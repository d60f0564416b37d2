"""Self-Extend: near keys at their distance, far keys at the distance of groups of tokens.

With groups of G tokens and a near window of W,

    Δ' = m − n                                  for m − n < W
    Δ' = ⌊m/G⌋ + W − ⌊W/G⌋ − ⌊n/G⌋              beyond

which reaches (L − W)·G + W tokens with distances below L. Keys are cached turned to ⌊n/G⌋; the last
W are turned again. The floors are those of the reference code's decoding; its fused prefill
shifts by W/G.

Source: Jin et al. 2024, LLM Maybe LongLM (arXiv:2401.01325), section 3.2 and its code.
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
from ._scale import check_tokens

__all__ = ["METHOD", "SelfExtend"]


@dataclass(frozen=True, slots=True)
class SelfExtendPlanner(Planner):
    """A near window at its distances, and groups before it."""

    window: int
    group: int

    framed: ClassVar[bool] = True

    def frame(self, positions: Tensor) -> Tensor:
        """The number of the group, ⌊n/G⌋."""
        return (positions / self.group).floor()

    def furthest(self, tokens: int) -> float:
        """That of the first token's group."""
        if tokens <= self.window:
            return tokens - 1
        group = self.group
        return (tokens - 1) // group + self.window - self.window // group

    def plan(self, first: int, queries: int, keys: int) -> Plan:
        """Two regions: the last W keys, and those before them."""
        own = torch.arange(first, first + queries, dtype=torch.float64)
        there = torch.arange(first + queries - keys, first + queries, dtype=torch.float64)
        rows, last = slice(0, queries), keys - queries
        near = band(rows, last, self.window)
        far = up_to(rows, last - self.window, query_turn=1, key_turn=1)
        shift = float(self.window - self.window // self.group)
        return Plan(
            (*near, *far),
            (own - self.frame(own), torch.full_like(own, shift)),
            (there - self.frame(there), None),
        )


@dataclass(frozen=True, slots=True)
class SelfExtend(RemappedMethod):
    """Grouped far attention in every layer of full attention."""

    group: int | None = None
    """Tokens G of a group; by default as few as reach what `factor` or `target` names."""
    window: int | None = None
    """Tokens W that keep their distance; a quarter of the model's window by default."""

    name: ClassVar[str] = "self_extend"

    def __post_init__(self) -> None:
        super(SelfExtend, self).__post_init__()
        for field in ("group", "window"):
            if getattr(self, field) is not None:
                check_tokens(self.name, field, getattr(self, field))

    @classmethod
    def example(cls, rope: Rope) -> Method:
        """Four windows."""
        del rope
        return cls(factor=4.0)

    def planner(self, length: int) -> SelfExtendPlanner:
        """Group and near window in tokens for a window of `length`.

        Raises:
            MethodError: no group and no window to reach, or a group that does not reach it.
        """
        window = max(1, length // 4) if self.window is None else self.window
        if window >= length:
            raise MethodError(
                f"{self.name}: window={window}: expected fewer tokens than the model's window of "
                f"{length}."
            )
        wanted = self._window(length)
        least = -(-(wanted - window) // (length - window))
        group = least if self.group is None else self.group
        if self.group is None and self.factor is None and self.target is None:
            raise MethodError(
                f"{self.name} needs factor=, target= or group=: how far it shall reach."
            )
        if group < least:
            raise MethodError(
                f"{self.name}: group={group} with window={window} reaches "
                f"{(length - window) * group + window} tokens: expected group ≥ {least} to reach "
                f"{wanted}."
            )
        return SelfExtendPlanner(window, group)


METHOD = SelfExtend
