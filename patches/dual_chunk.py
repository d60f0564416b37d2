"""Dual chunk attention: distances within a chunk as they are, to earlier chunks as the window fits.

With chunk length c, local window w, stride s = c − w, query position m and key position n,

    same chunk  (⌊m/s⌋ = ⌊n/s⌋)        Δ' = m mod s − n mod s
    chunk before                       Δ' = min(m mod s + s, cap) − n mod s
    older chunks                       Δ' = cap − n mod s

so that no distance is beyond `cap` ≤ L, while the w keys before a chunk keep their own. Keys are
cached turned to n mod s, which serves all three. Inside the first chunk nothing changes. Order is
kept within the chunk and the one before; among older chunks only the place inside a chunk is known.

`cap` is c in the reference code (ChunkLlama) and c − 1 in the paper. The code also lengthens
queries beyond the window by a constant temperature; here `log_n` is the way to do that.

Source: An et al. 2024, Training-Free Long-Context Scaling (arXiv:2402.17463), equations 3 to 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longctx.attention.regions import Plan, Region, up_to
from longctx.attention.remapped import Planner
from longctx.errors import MethodError
from longctx.patch import Method
from longctx.rope import Rope

from ._remapped import RemappedMethod
from ._scale import check_flag, check_tokens

__all__ = ["METHOD", "DualChunk"]


@dataclass(frozen=True, slots=True)
class DualChunkPlanner(Planner):
    """Own chunk, the chunk before, and older ones."""

    stride: int
    cap: int

    framed: ClassVar[bool] = True

    def frame(self, positions: Tensor) -> Tensor:
        """The place inside a chunk, n mod s."""
        return positions % self.stride

    def furthest(self, tokens: int) -> float:
        """Cut off at the cap."""
        return min(tokens - 1, self.cap)

    def plan(self, first: int, queries: int, keys: int) -> Plan:
        """Three regions for each chunk of queries."""
        stride = self.stride
        place = torch.arange(first, first + queries, dtype=torch.float64) % stride
        to_before = (place + stride).clamp(max=self.cap) - place
        start = first + queries - keys  # position of the first key
        regions: list[Region] = []
        row = 0
        while row < queries:
            chunk = (first + row) // stride
            end = min(queries, (chunk + 1) * stride - first)
            rows = slice(row, end)
            own, before = (max(0, (chunk - back) * stride - start) for back in (0, 1))
            regions += up_to(rows, keys - queries, first_key=own)
            if own > before:
                regions.append(Region((rows,), (slice(before, own),), query_turn=1))
            if before:
                regions.append(Region((rows,), (slice(0, before),), query_turn=2))
            row = end
        return Plan(tuple(regions), (None, to_before, self.cap - place))


@dataclass(frozen=True, slots=True)
class DualChunk(RemappedMethod):
    """Dual chunk attention in every layer of full attention."""

    chunk: int | None = None
    """Tokens c of a chunk and of the largest distance; three quarters of the window by default."""
    local: int | None = None
    """Tokens w of the chunk before that keep their distance; an eighth of the window by default."""
    cap_below_chunk: bool = False
    """Let the largest distance be c − 1, as the paper has it, in place of the code's c."""

    name: ClassVar[str] = "dual_chunk"

    def __post_init__(self) -> None:
        super(DualChunk, self).__post_init__()
        check_flag(self.name, "cap_below_chunk", self.cap_below_chunk)
        for field in ("chunk", "local"):
            if getattr(self, field) is not None:
                check_tokens(self.name, field, getattr(self, field))
        if self.chunk is not None and self.local is not None and self.chunk <= self.local:
            raise MethodError(
                f"{self.name}: chunk={self.chunk} must be longer than local={self.local}."
            )

    @classmethod
    def example(cls, rope: Rope) -> Method:
        """The defaults, for four windows."""
        del rope
        return cls(factor=4.0)

    def planner(self, length: int) -> DualChunkPlanner:
        """Chunk and local window in tokens for a window of `length`."""
        chunk = length * 3 // 4 if self.chunk is None else self.chunk
        local = max(1, length // 8) if self.local is None else self.local
        if chunk > length or chunk <= local:
            raise MethodError(
                f"{self.name}: chunk={chunk}, local={local}: expected local < chunk ≤ {length}, "
                "the model's window."
            )
        return DualChunkPlanner(chunk - local, chunk - 1 if self.cap_below_chunk else chunk)


METHOD = DualChunk
