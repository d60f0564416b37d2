"""Windows that slide over a text, of which each scores its last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from transformers import PreTrainedModel

from longctx.scoring.batching import score_batches
from longctx.scoring.token_scores import TokenScores

__all__ = ["score_last"]


def score_last(
    model: PreTrainedModel,
    windows: Sequence[tuple[int, ...]],
    new: Sequence[int],
    batch_tokens: int,
) -> TokenScores:
    """Scores [1, Σ new] of the last `new` tokens of each window; equal ones run as a batch."""
    parts: list[TokenScores] = []
    for (length, count), same in groupby(
        zip(windows, new, strict=True), key=lambda pair: (len(pair[0]), pair[1])
    ):
        ids = torch.tensor([window for window, _ in same])
        start = length - count
        parts.append(score_batches(model, ids, start=start, batch_tokens=batch_tokens))
    return TokenScores(
        targets=torch.cat([part.targets.flatten() for part in parts])[None],
        nll=torch.cat([part.nll.flatten() for part in parts])[None],
        argmax=torch.cat([part.argmax.flatten() for part in parts])[None],
        valid=torch.cat([part.valid.flatten() for part in parts])[None],
    )
