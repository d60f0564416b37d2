"""Which keys each query sees and how far both are turned, in regions that fused kernels take.

A region is a set of queries and a set of keys between which the distance is a difference of two
turns, one of the query and one of the key. The planners below cut what a query sees into such
regions; every visible pair of query and key lies in exactly one of them.

Legend: S queries, N keys, the last query on the last key; query r stands on key r + N − S.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Plan", "Region", "band", "distances", "lengths", "up_to"]


def lengths(parts: tuple[slice, ...]) -> list[int]:
    """Tokens of each slice."""
    return [len(range(part.start, part.stop, part.step or 1)) for part in parts]


@dataclass(frozen=True, slots=True)
class Region:
    """Queries that see keys, both turned the same way throughout."""

    rows: tuple[slice, ...]
    """Of the queries, one after the other, with a step where they are strided."""
    keys: tuple[slice, ...]
    """Of the keys in the same way."""
    query_turn: int = 0
    """Which of the plan's `query_turns`."""
    key_turn: int = 0
    """Which of the plan's `key_turns`."""
    seen: Literal["all", "causal", "band"] = "all"
    """Row i of the region sees all its keys; keys 0 … i (as many keys as rows); or keys
    i … i + window − 1 (as many keys as rows and window − 1 more)."""
    window: int = 0
    """Keys that a row sees, for a band."""

    @property
    def empty(self) -> bool:
        """Whether it holds no query or no key."""
        return 0 in (sum(lengths(self.rows)), sum(lengths(self.keys)))

    def visible(self) -> Tensor:
        """Bool [rows, keys] of the region."""
        seen = torch.ones(sum(lengths(self.rows)), sum(lengths(self.keys)), dtype=torch.bool)
        if self.seen == "causal":
            return seen.tril()
        return seen.triu().tril(self.window - 1) if self.seen == "band" else seen


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one span of a batch sees."""

    regions: tuple[Region, ...]
    query_turns: tuple[Tensor | None, ...] = (None,)
    """By how many positions queries are turned further, float64 [S]; None for not at all."""
    key_turns: tuple[Tensor | None, ...] = (None,)
    """The same of the keys, float64 [N]."""


def up_to(
    rows: slice,
    last: int,
    *,
    first_key: int = 0,
    query_turn: int = 0,
    key_turn: int = 0,
) -> Iterator[Region]:
    """Regions in which query r sees the keys `first_key` … r + last.

    Args:
        rows: of the queries; those that see nothing are left out.
        last: the last key that query 0 sees, which may lie before 0.
        first_key: the first key that all of them see.
        query_turn: as in `Region`, as is the next.
        key_turn: see above.
    """
    start = max(rows.start, first_key - last)
    if start >= rows.stop:
        return
    own = start + last
    region = partial(Region, query_turn=query_turn, key_turn=key_turn)
    if rows.stop - start == 1:
        yield region((slice(start, rows.stop),), (slice(first_key, own + 1),))
        return
    if own > first_key:
        yield region((slice(start, rows.stop),), (slice(first_key, own),))
    square = slice(own, rows.stop + last)
    yield region((slice(start, rows.stop),), (square,), seen="causal")


def band(
    rows: slice, last: int, window: int, *, query_turn: int = 0, key_turn: int = 0
) -> Iterator[Region]:
    """Regions in which query r sees the `window` keys up to r + last; arguments as in `up_to`."""
    region = partial(Region, query_turn=query_turn, key_turn=key_turn)
    full = min(max(rows.start, window - 1 - last), rows.stop)
    before = slice(rows.start, full)
    yield from up_to(before, last, query_turn=query_turn, key_turn=key_turn)
    if full < rows.stop:
        keys = slice(full + last - window + 1, rows.stop + last)
        kind = "all" if rows.stop - full == 1 else "band"
        yield region((slice(full, rows.stop),), (keys,), seen=kind, window=window)


def distances(plan: Plan, frame_of_queries: Tensor, frame_of_keys: Tensor) -> Tensor:
    """The distance at which each query sees each key, float64 [S, N]; NaN where it does not.

    For tests and explanations: what the kernels compute without ever writing it down.

    Args:
        plan: as a rule makes it.
        frame_of_queries: the positions by which queries are turned already, float64 [S].
        frame_of_keys: those of the keys, float64 [N].

    Raises:
        ValueError: a pair lies in two regions.
    """
    found = torch.full((len(frame_of_queries), len(frame_of_keys)), torch.nan, dtype=torch.float64)
    for region in plan.regions:
        query, key = frame_of_queries.clone(), frame_of_keys.clone()
        for where, turn in (
            (query, plan.query_turns[region.query_turn]),
            (key, plan.key_turns[region.key_turn]),
        ):
            where += 0 if turn is None else turn.cpu()
        columns = torch.cat([torch.arange(len(key))[part] for part in region.keys])
        rows = torch.cat([torch.arange(len(query))[part] for part in region.rows])
        visible = region.visible()
        if bool((visible & ~found[rows[:, None], columns].isnan()).any()):
            raise ValueError(f"{region} holds pairs that another region holds too.")
        value = torch.where(visible, query[rows, None] - key[columns], torch.nan)
        found[rows[:, None], columns] = torch.where(visible, value, found[rows[:, None], columns])
    return found
