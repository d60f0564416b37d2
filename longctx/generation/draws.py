"""Drawing tokens so that a row does not depend on its batch.

The argmax of log p − log E, with E drawn from the exponential distribution for each token, is a
sample from p (Gumbel's trick). Each row has a generator, so `generate` takes the argmax of what
comes from here, and needs no generator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import ModelError
from .decoding import Sampling
from .rows import Row

__all__ = ["BrokenLogitsError", "Draws", "Finite", "seed_of"]


def seed_of(seed: int, row: int) -> int:
    """The number that a row's draws begin with."""
    return Random(f"generate/{seed}/{row}").getrandbits(63)


class BrokenLogitsError(ModelError):
    """A model's logits hold a NaN or an infinity."""


class Finite(LogitsProcessor):
    """Refuses logits of which no token can be taken."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The logits [rows, V] as they are.

        Raises:
            BrokenLogitsError: a row holds a NaN, an infinity, or nothing that is possible.
        """
        if not bool(scores.amax(-1).isfinite().all()):
            raise BrokenLogitsError(
                f"the model's logits after {input_ids.shape[1]} tokens are NaN or infinite: load "
                'it in another precision (dtype="float32"), and look at it with `longctx doctor`.'
            )
        return scores


class Draws(LogitsProcessor):
    """Leaves the logits of greedy rows, and has those of others drawn.

    Args:
        rows: those of the batch, in order; each knows how warm it is at the moment.
        sampling: the decoding's settings.
        min_p: a further bound for rows that are warmer than the decoding.
    """

    def __init__(self, rows: Sequence[Row], sampling: Sampling, min_p: float = 0.0) -> None:
        self._rows = rows
        self._own = sampling
        self._min_p = min_p
        self._cuts = LogitsProcessorList()
        if sampling.top_k:
            self._cuts.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._cuts.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self._cuts.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits [B, V] whose argmax is a draw, where rows draw."""
        warmth = [self._own.temperature + row.warmer for row in self._rows]
        drawn = [
            index for index, each in enumerate(warmth) if each > 0 and not self._rows[index].at_rest
        ]
        if not drawn:
            return scores
        scores = scores.clone()
        for index in drawn:  # one by one: rows may be warm to different degrees
            row = self._rows[index]
            ids, logits = input_ids[index : index + 1], scores[index : index + 1]
            logits = TemperatureLogitsWarper(warmth[index])(ids, logits)  # pyright: ignore[reportArgumentType]
            logits = self._cuts(ids, logits)  # pyright: ignore[reportArgumentType]
            if row.warmer and self._min_p:
                logits = MinPLogitsWarper(self._min_p)(ids, logits)  # pyright: ignore[reportArgumentType]
            draws = torch.empty(scores.shape[-1], dtype=torch.float64)
            draws.exponential_(generator=row.generator)
            scores[index] = (logits[0] - draws.log().to(logits)).to(scores)
        return scores
