"""Sparse attention by a fixed pattern: bands, strides, or blocks.

With query position m, key position n and Δ = m − n, a query sees the keys n ≤ m with

    banded     Δ < window
    strided    Δ < stride, or Δ mod stride = 0
    blocks     of b tokens, B = ⌊m/b⌋ − ⌊n/b⌋: B < local_blocks, or ⌊n/b⌋ < sink_blocks,
               or B mod stride_blocks = 0

Positions stay the model's own. Every second layer may stay dense, as in GPT-3 (`dense_every`). On
a model that was trained dense this loses what it does not see: use it to train with, or with enough
blocks. Cost follows the pattern, not the square of the length.

Source: Child et al. 2019, Generating Long Sequences with Sparse Transformers (arXiv:1904.10509),
section 4.2, one head that sees both parts; Brown et al. 2020 (arXiv:2005.14165), section 2.1, for
alternating layers; Beltagy et al. 2020, Longformer (arXiv:2004.05150), for bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from longctx.attention.layers import AttentionLayer
from longctx.attention.regions import Plan, Region, band, lengths, up_to
from longctx.attention.remapped import Planner, RegionRule
from longctx.errors import MethodError
from longctx.patch import Patch
from longctx.rope import Rope

from ._attention import AttentionMethod
from ._scale import check_tokens

__all__ = ["METHOD", "BlockSparse"]


@dataclass(frozen=True, slots=True)
class BandedPlanner(Planner):
    """The last keys."""

    window: int

    def plan(self, first: int, queries: int, keys: int) -> Plan:
        """One band."""
        del first
        return Plan((*band(slice(0, queries), keys - queries, self.window),))


@dataclass(frozen=True, slots=True)
class StridedPlanner(Planner):
    """The last keys, and every stride-th before them."""

    stride: int

    def plan(self, first: int, queries: int, keys: int) -> Plan:
        """A band, and a causal region for each residue of the stride."""
        del first
        last = keys - queries
        return Plan((*band(slice(0, queries), last, self.stride), *self._strided(queries, last)))

    def _strided(self, queries: int, last: int) -> Iterator[Region]:
        stride = self.stride

        def spread(part: slice, start: int) -> slice:
            return slice(start + part.start * stride, start + (part.stop - 1) * stride + 1, stride)

        for first_key in range(stride):
            first_row = (first_key - last) % stride
            rows = len(range(first_row, queries, stride))
            own = (first_row + last - first_key) // stride
            for region in up_to(slice(0, rows), own - 1):
                keys = spread(region.keys[0], first_key)
                row = spread(region.rows[0], first_row)
                yield Region((row,), (keys,), seen=region.seen)


@dataclass(frozen=True, slots=True)
class BlocksPlanner(Planner):
    """Near blocks, the first ones, and every so many-th."""

    block: int
    local_blocks: int
    sink_blocks: int
    stride_blocks: int

    def plan(self, first: int, queries: int, keys: int) -> Plan:
        """Blocks of one residue of the stride as one causal stretch, and what else each sees."""
        last = keys - queries
        start = first - last  # position of the first key
        rows = [self._part(n, first, queries) for n in self._blocks(first, first + queries)]
        regions: list[Region] = []
        for residue in sorted({n % self.stride_blocks for n, _ in rows if self.stride_blocks}):
            alike = tuple(part for n, part in rows if n % self.stride_blocks == residue)
            own = alike[0].start + last
            earlier = (self._part(n, start, own) for n in self._blocks(start, start + own))
            before = tuple(part for n, part in earlier if n % self.stride_blocks == residue)
            regions += _joined(alike, before, last)
        for own, part in rows:
            if not self.stride_blocks:
                begin = max(0, own * self.block - start)
                regions += up_to(part, last, first_key=begin)
            chosen = [n for n in range(start // self.block, own) if self._sees(own, n)]
            runs = [[n for _, n in run] for _, run in groupby(enumerate(chosen), _lag)]
            seen = tuple(
                slice(max(0, run[0] * self.block - start), (run[-1] + 1) * self.block - start)
                for run in runs
            )
            if seen:
                regions.append(Region((part,), seen))
        return Plan(tuple(regions))

    def _blocks(self, first: int, last: int) -> range:
        """Blocks that hold any of these positions."""
        return range(first // self.block, -(-last // self.block) if last > first else 0)

    def _part(self, number: int, first: int, tokens: int) -> tuple[int, slice]:
        """The number of a block, and which of so many tokens from position `first` on it holds."""
        begin = number * self.block - first
        return number, slice(max(0, begin), min(tokens, begin + self.block))

    def _sees(self, own: int, block: int) -> bool:
        """Whether an earlier block is seen that is not of the own block's residue."""
        back = own - block
        if self.stride_blocks and back % self.stride_blocks == 0:
            return False
        return back < self.local_blocks or block < self.sink_blocks


def _joined(rows: tuple[slice, ...], before: tuple[slice, ...], last: int) -> Iterator[Region]:
    """Rows that see keys before the first of them, and those of each other up to their own."""
    square = tuple(slice(part.start + last, part.stop + last) for part in rows)
    if sum(lengths(rows)) == 1:
        yield Region(rows, (*before, *square))
        return
    if before:
        yield Region(rows, before)
    yield Region(rows, square, seen="causal")


def _lag(numbered: tuple[int, int]) -> int:
    """The same for neighbours in a run of consecutive numbers."""
    index, number = numbered
    return number - index


@dataclass(frozen=True, slots=True)
class BlockSparse(AttentionMethod):
    """A fixed sparse pattern in layers of full attention."""

    pattern: Literal["blocks", "banded", "strided"] = "blocks"
    """Which keys are seen."""
    window: int | None = None
    """Keys of a band in tokens; half of the model's window by default."""
    stride: int | None = None
    """Stride in tokens; by default the root of the model's window."""
    block: int | None = None
    """Tokens of a block; an eighth of the model's window by default."""
    local_blocks: int = 2
    """Blocks that are seen up to the query's own, itself included."""
    sink_blocks: int = 1
    """First blocks that are always seen."""
    stride_blocks: int = 4
    """Every so many-th block is seen, counted back from the query's; 0 for none."""
    dense_every: int = 0
    """Every so many-th layer, from the first on, stays dense; 0 for none."""

    name: ClassVar[str] = "block_sparse"
    unbounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.pattern not in ("blocks", "banded", "strided"):
            raise MethodError(
                f"{self.name}: pattern={self.pattern!r}: expected blocks, banded or strided."
            )
        for field in ("window", "stride", "block"):
            if getattr(self, field) is not None:
                check_tokens(self.name, field, getattr(self, field))
        for field, least in (
            ("local_blocks", 1),
            ("sink_blocks", 0),
            ("stride_blocks", 0),
            ("dense_every", 0),
        ):
            check_tokens(self.name, field, getattr(self, field), least=least)
        if self.dense_every == 1:
            raise MethodError(
                f"{self.name}: dense_every=1 leaves every layer dense: expected 0, or 2 or more."
            )

    def planner(self, length: int) -> Planner:
        """The pattern for a window of `length` tokens."""
        if self.pattern == "banded":
            return BandedPlanner(max(1, length // 2) if self.window is None else self.window)
        if self.pattern == "strided":
            return StridedPlanner(math.isqrt(length) if self.stride is None else self.stride)
        return BlocksPlanner(
            max(1, length // 8) if self.block is None else self.block,
            self.local_blocks,
            self.sink_blocks,
            self.stride_blocks,
        )

    def rule(self, model: PreTrainedModel, layer: AttentionLayer, patch: Patch) -> RegionRule:
        """The pattern, the same in every layer that has it."""
        del model, layer
        return RegionRule(self.planner(patch.window_below))

    def takes(self, layer: AttentionLayer, rope: Rope) -> bool:
        """Layers that see everything, but those that stay dense."""
        del rope
        return layer.full and (self.dense_every == 0 or layer.index % self.dense_every != 0)


METHOD = BlockSparse
