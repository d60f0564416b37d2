"""Attention that sees distances of its own making: spans, their plans, and the kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .hook import ATTRIBUTE
from .merged import Turned, merged_attention
from .once import Once
from .regions import Plan
from .spans import Span, spans_of
from .turning import Rotation

__all__ = ["Planner", "RegionRule", "needs_consecutive_positions"]

_Turns = tuple[tuple[Tensor, Tensor] | None, ...]


def needs_consecutive_positions(model: nn.Module) -> bool:
    """Whether a method on the model counts distances from tokens that follow each other."""
    return any(isinstance(getattr(x, ATTRIBUTE, None), RegionRule) for x in model.modules())


@dataclass(frozen=True, slots=True)
class Planner(ABC):
    """The formula of a method: which keys a query sees and at which distance."""

    framed: ClassVar[bool] = False
    """Whether keys are cached elsewhere than at their positions."""
    hides: ClassVar[bool] = False
    """Whether some keys are not seen at all, in layers without a rotary either."""

    def frame(self, positions: Tensor) -> Tensor:
        """Where the keys at these positions are cached, float64 both, any shape."""
        return positions

    @abstractmethod
    def plan(self, first: int, queries: int, keys: int) -> Plan:
        """What `queries` tokens from position `first` on see of `keys`, themselves the last."""


@dataclass(frozen=True, slots=True)
class RegionRule:
    """An `AttentionRule` that follows a planner; the layers of a model share one."""

    planner: Planner
    rotation: Rotation | None = field(default=None, compare=False, repr=False)
    """Turns queries and keys where the plan says so; None for plans without turns."""
    _once: Once[list[tuple[Span, Plan, _Turns, _Turns]]] = field(
        default_factory=Once, compare=False, repr=False
    )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        positions: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """Attend; q [B, H, S, D], k and v [B, K, N, D]. What padding gets is 0.

        Raises:
            ModelError: as in `spans_of`, or no positions at all.
        """
        if positions is None:
            raise ModelError("this model hands its attention no position_ids: nothing to count by.")
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast only v has been cast
        if mask is not None:
            k, v = k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]]
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        where = positions
        planned = self._once.get(
            lambda: self._planned(spans_of(mask, where, batch, queries, keys), q.device),
            *(where, mask, batch, queries, keys),
        )
        if len(planned) == 1 and planned[0][0].queries == slice(0, queries):
            span, *rest = planned[0]
            if len(span.rows) == batch:
                return self._attend(q, k[:, :, span.keys], v[:, :, span.keys], *rest, scaling)
        out = torch.zeros_like(q)
        for span, *rest in planned:
            rows = list(span.rows)
            part = self._attend(
                q[rows, :, span.queries],
                k[rows, :, span.keys],
                v[rows, :, span.keys],
                *rest,
                scaling,
            )
            index = torch.arange(queries, device=q.device)[span.queries]
            place = torch.tensor(rows, device=q.device)[:, None], index
            out = out.transpose(1, 2).index_put(place, part.transpose(1, 2)).transpose(1, 2)
        return out

    def _planned(
        self, spans: list[Span], device: torch.device
    ) -> list[tuple[Span, Plan, _Turns, _Turns]]:
        found: list[tuple[Span, Plan, _Turns, _Turns]] = []
        for span in spans:
            queries = span.queries.stop - span.queries.start
            keys = span.keys.stop - span.keys.start
            plan = self.planner.plan(span.first_position, queries, keys)
            turns = [self._turns(turns, device) for turns in (plan.query_turns, plan.key_turns)]
            found.append((span, plan, *turns))
        return found

    def _turns(self, positions: tuple[Tensor | None, ...], device: torch.device) -> _Turns:
        if self.rotation is None:
            return tuple(None for _ in positions)
        turn = self.rotation.cos_sin
        return tuple(None if x is None else turn(x.to(device)) for x in positions)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        query_turns: _Turns,
        key_turns: _Turns,
        scaling: float,
    ) -> Tensor:
        used_rows: list[list[slice]] = [[] for _ in query_turns]
        used_keys: list[list[slice]] = [[] for _ in key_turns]
        for region in plan.regions:
            used_rows[region.query_turn].append(region.rows)
            used_keys[region.key_turn].extend(region.keys)
        queries = [self._turned(q, *pair) for pair in zip(query_turns, used_rows, strict=True)]
        keys = [self._turned(k, *pair) for pair in zip(key_turns, used_keys, strict=True)]
        return merged_attention(queries, keys, v, plan.regions, scaling, q.shape[2])

    def _turned(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, used: list[slice]) -> Turned:
        """Turn the tokens that any region uses, and no others."""
        if turn is None or self.rotation is None:
            return Turned(x)
        if not used:
            return Turned(x[:, :, :0])
        first, last = min(part.start for part in used), max(part.stop for part in used)
        cos, sin = (part[first:last] for part in turn)
        return Turned(self.rotation.turn(x[:, :, first:last], cos, sin), first)
