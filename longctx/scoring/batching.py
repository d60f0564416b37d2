"""Scoring many prompts of one length in batches that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .token_scores import TokenScores, score

__all__ = ["is_out_of_memory", "score_batches", "shrinking"]

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is memory running out, on a GPU or in the process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    # The CPU allocator and some CUDA libraries raise a bare RuntimeError.
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text or "alloc_failed" in text
    )


def shrinking(n: int, size: int, run: Callable[[int, int], T]) -> list[T]:
    """Call `run(first, last)` over 0 … n in steps of `size`, halved where memory runs out.

    Raises:
        Exception: what ran out of memory at a size of 1, unchanged.
    """
    done: list[T] = []
    first = 0
    while first < n:
        try:
            result = run(first, min(first + size, n))
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = max(1, min(size, n - first) // 2)
        else:
            done.append(result)
            first += size
            continue
        # Outside the handler: the traceback would keep the failed batch alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return done


def score_batches(
    model: PreTrainedModel, input_ids: Tensor, *, start: int, batch_tokens: int
) -> TokenScores:
    """Score [N, S] prompts from `start` on, at most `batch_tokens` tokens at a time."""
    size = max(1, batch_tokens // input_ids.shape[1])
    parts = shrinking(len(input_ids), size, lambda a, b: score(model, input_ids[a:b], start=start))
    return TokenScores(
        targets=torch.cat([part.targets for part in parts]),
        nll=torch.cat([part.nll for part in parts]),
        argmax=torch.cat([part.argmax for part in parts]),
        valid=torch.cat([part.valid for part in parts]),
    )
