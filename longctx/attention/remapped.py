"""Attention that sees distances of its own making: spans, their plans, and the kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from .hook import ATTRIBUTE, text_positions
from .merged import Turned, merged_attention
from .once import Once
from .regions import Plan
from .spans import Span, spans_of
from .turning import Phases, Rotation

__all__ = ["Planner", "RegionRule", "needs_consecutive_positions"]


@dataclass(frozen=True, slots=True, eq=False)
class _Turning:
    """Turns of tokens from `first` to `last` − 1, which are all that any region uses."""

    phases: Phases
    first: int
    last: int


@dataclass(frozen=True, slots=True, eq=False)
class _Planned:
    """A span, its plan, and the phases of its turns, which all layers share."""

    span: Span
    plan: Plan
    query_turns: tuple[_Turning | None, ...]
    key_turns: tuple[_Turning | None, ...]


def needs_consecutive_positions(model: nn.Module) -> bool:
    """Whether a method on the model counts distances from tokens that follow each other."""
    return any(isinstance(getattr(x, ATTRIBUTE, None), RegionRule) for x in model.modules())


def _put_together(pieces: list[tuple[int, Tensor]], q: Tensor) -> Tensor:
    """A row [H, S, D] of its spans, each with its first query; 0 where there is none."""
    parts: list[Tensor] = []
    done = 0
    for first, piece in sorted(pieces, key=lambda pair: pair[0]):
        parts += [q.new_zeros(q.shape[1], first - done, q.shape[3]), piece]
        done = first + piece.shape[1]
    return torch.cat([*parts, q.new_zeros(q.shape[1], q.shape[2] - done, q.shape[3])], dim=1)


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

    def furthest(self, tokens: int) -> float:
        """The largest distance at which a text of so many tokens sees a key."""
        return tokens - 1

    @abstractmethod
    def plan(self, first: int, queries: int, keys: int) -> Plan:
        """What `queries` tokens see of `keys`, themselves the last.

        Args:
            first: position of the first query, as keys are framed; without a frame its place,
                counted from the first token of the text.
            queries: S.
            keys: N.
        """


@dataclass(frozen=True, slots=True)
class RegionRule:
    """An `AttentionRule` that follows a planner; the layers of a model share one."""

    planner: Planner
    rotation: Rotation | None = field(default=None, compare=False, repr=False)
    """Turns queries and keys where the plan says so; None for plans without turns."""
    _once: Once[list[_Planned]] = field(default_factory=Once, compare=False, repr=False)

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
        where = text_positions(positions)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast only v has been cast
        if mask is not None:
            k, v = k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]]
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        planned = self._once.get(
            lambda: self._planned(spans_of(mask, where, batch, queries, keys), q.device),
            *(where, mask, batch, queries, keys),
        )
        if len(planned) == 1 and planned[0].span.queries == slice(0, queries):
            only = planned[0]
            keys_seen = only.span.keys
            if len(only.span.rows) == batch:
                return self._attend(q, k[:, :, keys_seen], v[:, :, keys_seen], only, scaling)
        pieces: list[list[tuple[int, Tensor]]] = [[] for _ in range(batch)]
        for part in planned:
            span, rows = part.span, list(part.span.rows)
            found = self._attend(
                q[rows, :, span.queries],
                k[rows, :, span.keys],
                v[rows, :, span.keys],
                part,
                scaling,
            )
            for row, piece in zip(rows, found, strict=True):
                pieces[row].append((span.queries.start, piece))
        return torch.stack([_put_together(row, q) for row in pieces])

    def _planned(self, spans: list[Span], device: torch.device) -> list[_Planned]:
        found: list[_Planned] = []
        for span in spans:
            queries = span.queries.stop - span.queries.start
            keys = span.keys.stop - span.keys.start
            first = span.first_position if self.planner.framed else span.first_index
            plan = self.planner.plan(first, queries, keys)
            rows: list[list[slice]] = [[] for _ in plan.query_turns]
            seen: list[list[slice]] = [[] for _ in plan.key_turns]
            for region in plan.regions:
                rows[region.query_turn].extend(region.rows)
                seen[region.key_turn].extend(region.keys)
            found.append(
                _Planned(
                    span,
                    plan,
                    tuple(map(partial(self._turning, device), plan.query_turns, rows)),
                    tuple(map(partial(self._turning, device), plan.key_turns, seen)),
                )
            )
        return found

    def _turning(
        self, device: torch.device, by: Tensor | None, used: list[slice]
    ) -> _Turning | None:
        """The phases of the tokens that any region uses, and no others."""
        if by is None or self.rotation is None:
            return None
        first = min((part.start for part in used), default=0)
        last = max((part.stop for part in used), default=0)
        return _Turning(self.rotation.phases(by[first:last].to(device)), first, last)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, part: _Planned, scaling: float) -> Tensor:
        queries = [self._turned(q, turning) for turning in part.query_turns]
        keys = [self._turned(k, turning) for turning in part.key_turns]
        return merged_attention(queries, keys, v, part.plan.regions, scaling, q.shape[2])

    def _turned(self, x: Tensor, turning: _Turning | None) -> Turned:
        if turning is None or self.rotation is None:
            return Turned(x)
        part = x[:, :, turning.first : turning.last]
        return Turned(self.rotation.turn(part, turning.phases), turning.first)
