"""Which positions a document's tokens stand on: full length, growing, skipped (PoSE) or random.

    PoSE(window=2048, target=16_384).place(2048, numpy.random.default_rng(0))     # int64 [2048]

A policy places one document at a time, from a generator that the collator derives from the
document itself: packed or alone, in this run or in a resumed one, a document stands where it stood.

transformers takes positions that jump, in a call without a mask, for packed documents and hides
every document from the next (logits off by 4.7). A batch with such positions must carry
`document_ids`, from which the mask is made; `collate.check_batch` refuses it otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longctx.errors import DataError, RunError

__all__ = ["FullLength", "LengthSchedule", "PoSE", "Positions", "RandomPositions"]


class Positions(Protocol):
    """What the collator and the trainer ask of a policy."""

    def tokens(self, step: int) -> int | None:
        """Most tokens of a document at a step (from 0), None where the policy sets no limit."""
        ...

    def place(self, length: int, rng: np.random.Generator) -> Tensor:
        """Positions of a document of `length` tokens, increasing, int64 [length].

        Raises:
            DataError: the document is longer than the policy takes.
        """
        ...


@dataclass(frozen=True, slots=True)
class FullLength:
    """Positions 0, 1, 2, …: training at the whole length."""

    def tokens(self, step: int) -> int | None:
        """None: any length."""
        return None

    def place(self, length: int, rng: np.random.Generator) -> Tensor:
        """Return 0 … length−1."""
        return torch.arange(length)


@dataclass(frozen=True, slots=True)
class LengthSchedule:
    """Short documents first, doubling up to the whole length.

    tokens(step) = min(full, start · 2^⌊(step − hold) · d / (steps − hold)⌋) from step `hold` on,
    with d = ⌈log₂(full / start)⌉ doublings, so `full` from step `steps` on.

    With several chunks, shorter documents stand on positions of the whole length as under `PoSE`:
    every distance is learnt from the first step on, and by the end on text that is as long.

    Source: ours. On an earlier embedded model (rope_theta 100, linear ×8, 64 → 2,048 tokens)
    retrieval was learnt this way, and not at a fixed 2,048 in the same time.
    """

    start: int
    """Tokens at step 0."""
    full: int
    """Tokens at the end."""
    steps: int
    """Step from which on the length is `full`."""
    hold: int = 0
    """Steps at `start` before the length begins to grow."""
    chunks: int = 1
    """Into which a document shorter than `full` is cut; 1 leaves positions consecutive."""

    def __post_init__(self) -> None:
        if not 2 <= self.start <= self.full or not 0 <= self.hold < self.steps:
            raise RunError(f"{self}: expected 2 ≤ start ≤ full tokens and 0 ≤ hold < steps.")
        if not 1 <= self.chunks <= self.start:
            raise RunError(f"{self}: expected 1 ≤ chunks ≤ start.")

    def tokens(self, step: int) -> int | None:
        """Most tokens of a document at this step."""
        if step >= self.steps:
            return self.full
        doublings = (-(-self.full // self.start) - 1).bit_length()
        grown = max(step - self.hold, 0) * doublings // (self.steps - self.hold)
        return min(self.full, self.start << grown)

    def place(self, length: int, rng: np.random.Generator) -> Tensor:
        """Return 0 … length−1, or the positions of the chunks, moved."""
        _refuse_longer(length, self.full, f"{self}")
        return _skipped(length, self.chunks, self.full, rng)


@dataclass(frozen=True, slots=True)
class PoSE:
    """Positional skip-wise training: a window of text on positions from all of the target length.

    A document of n tokens is cut into N chunks at random places. Chunk i is moved by uᵢ tokens:
    u₀ = 0 and uᵢ drawn uniformly from {uᵢ₋₁, …, target − n}, so that positions stay in order and
    below the target. The text itself stays contiguous: nothing of it is skipped.

    Source: Zhu et al. 2023, PoSE (arXiv:2309.10400), section 3.2.
    """

    window: int
    """Most tokens of a document: what a step costs."""
    target: int
    """Positions to be learnt: 0 … target−1."""
    chunks: int = 2
    """N."""

    def __post_init__(self) -> None:
        if not 2 <= self.chunks <= self.window <= self.target:
            raise RunError(f"{self}: expected 2 ≤ chunks ≤ window ≤ target, in tokens.")

    def tokens(self, step: int) -> int | None:
        """The window."""
        return self.window

    def place(self, length: int, rng: np.random.Generator) -> Tensor:
        """Return the positions of the chunks, moved."""
        _refuse_longer(length, self.window, f"{self}")
        return _skipped(length, self.chunks, self.target, rng)


@dataclass(frozen=True, slots=True)
class RandomPositions:
    """A sorted random subset of the target's positions.

    For a document of n tokens, n of {0, …, target−1} drawn without replacement, in order.

    Source: Ruoss et al. 2023, Randomized Positional Encodings (arXiv:2305.16843), section 3.
    """

    window: int
    """Most tokens of a document."""
    target: int
    """Positions to be learnt: 0 … target−1."""

    def __post_init__(self) -> None:
        if not 2 <= self.window <= self.target:
            raise RunError(f"{self}: expected 2 ≤ window ≤ target, in tokens.")

    def tokens(self, step: int) -> int | None:
        """The window."""
        return self.window

    def place(self, length: int, rng: np.random.Generator) -> Tensor:
        """Return a sorted random subset."""
        _refuse_longer(length, self.window, f"{self}")
        return torch.from_numpy(np.sort(rng.choice(self.target, length, replace=False)))


def _skipped(length: int, chunks: int, target: int, rng: np.random.Generator) -> Tensor:
    """Positions of chunks cut at random places and moved apart, all below the target."""
    chunks = min(chunks, length)
    cuts = 1 + np.sort(rng.choice(length - 1, chunks - 1, replace=False)) if chunks > 1 else []
    positions = np.arange(length)
    skip = 0
    for first, last in pairwise([*cuts, length]):
        skip = int(rng.integers(skip, target - length, endpoint=True))
        positions[first:last] += skip
    return torch.from_numpy(positions)


def _refuse_longer(length: int, limit: int, policy: str) -> None:
    if length > limit:
        raise DataError(
            f"a document of {length:,} tokens under {policy}, which takes {limit:,}: prepare the "
            f"data with max_length={limit}, or raise the policy's limit."
        )
