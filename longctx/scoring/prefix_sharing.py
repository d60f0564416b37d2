"""Scoring many prompts at once while what they share runs once.

    scores = score_prompts(model, prompts, starts, batch_tokens=16_384)

Prompts with a common beginning form a tree (`prefix_tree`), which is walked with one KV cache; the
ends of several prompts after one branch run as a batch. A key at ten depths of one haystack of L
tokens costs about 6·L tokens instead of 10·L.

That is exact where a token's keys do not depend on what follows it, and possible where a cache can
be cropped. Elsewhere, and where the tree would not be cheaper, whole prompts run in batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .batching import is_out_of_memory, score_batches, shrinking
from .prefix_tree import CALL, Node, Walk, by_length, causal_attention, cost_of, grow, obstacle
from .token_scores import score

__all__ = ["PromptScores", "score_prompts"]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Scores of each prompt's tokens from its own start on, on the CPU."""

    nll: tuple[Tensor, ...]
    """float32 [len(prompt) − start] each, in nats; NaN where the logits hold a NaN."""
    argmax: tuple[Tensor, ...]
    """int64 [len(prompt) − start] each; −1 where the logits hold a NaN."""
    tokens: int
    """Forwarded."""
    how: str
    """"shared prefixes", or "whole prompts" with the reason."""


def score_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_tokens: int,
    length_invariant: bool = True,
) -> PromptScores:
    """Score the end of each prompt, given all tokens before it.

    Args:
        model: as in `longctx.scoring.score`.
        prompts: token ids; the same prompt twice is scored twice.
        starts: of each prompt the first position that is scored, at least 1.
        batch_tokens: tokens of the prompts that run at a time, if that is one prompt or more.
        length_invariant: whether a token's logits are the same in a longer input. If not, nothing
            is shared.

    Raises:
        DataError, ModelError: as in `longctx.scoring.score`.
    """
    why = "length-dependent method" if not length_invariant else obstacle(model)
    if why is None and prompts:
        tree = grow(prompts, starts)
        if cost_of(tree, prompts) < _cost_of_whole(prompts, batch_tokens):
            try:
                with causal_attention(model):
                    return _Scoring(model, prompts, starts, batch_tokens).scores(tree)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            why = "no memory for a cache"  # which whole prompts do without
        else:
            why = "cheaper"
    return _whole(model, prompts, starts, batch_tokens, f"whole prompts ({why})")


def _whole(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    starts: Sequence[int],
    batch_tokens: int,
    how: str,
) -> PromptScores:
    nll: list[Tensor] = [torch.empty(0)] * len(prompts)
    argmax = [*nll]
    for rows in by_length(range(len(prompts)), prompts):
        ids = torch.tensor([prompts[row] for row in rows])
        first = min(starts[row] for row in rows)
        scores = score_batches(model, ids, start=first, batch_tokens=batch_tokens)
        for i, row in enumerate(rows):
            nll[row] = scores.nll[i, starts[row] - first :]
            argmax[row] = scores.argmax[i, starts[row] - first :]
    return PromptScores(tuple(nll), tuple(argmax), sum(map(len, prompts)), how)


def _cost_of_whole(prompts: Sequence[Sequence[int]], batch_tokens: int) -> int:
    tokens = sum(map(len, prompts))
    return tokens + CALL * max(1, tokens // batch_tokens)


class _Scoring(Walk):
    """A walk that scores the ends of prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        starts: Sequence[int],
        batch_tokens: int,
    ) -> None:
        super().__init__(model, prompts)
        self._starts, self._batch_tokens = starts, batch_tokens
        self._nll: list[Tensor] = [torch.empty(0)] * len(prompts)
        self._argmax = [*self._nll]

    def scores(self, root: Node) -> PromptScores:
        self.visit(root)
        return PromptScores(tuple(self._nll), tuple(self._argmax), self.tokens, "shared prefixes")

    def end(self, rows: Sequence[int], done: int) -> None:
        """Those of one length in batches."""
        size = max(1, self._batch_tokens // len(self.prompts[rows[0]]))
        shrinking(len(rows), size, lambda a, b: self._score(rows[a:b], done))

    def _score(self, rows: Sequence[int], done: int) -> None:
        ids = torch.tensor([self.prompts[row][done:] for row in rows])
        first = min(self._starts[row] for row in rows)
        scores = score(self.model, ids, past_key_values=self.fork(len(rows)), start=first - done)
        self.tokens += ids.numel()
        for i, row in enumerate(rows):
            self._nll[row] = scores.nll[i, self._starts[row] - first :]
            self._argmax[row] = scores.argmax[i, self._starts[row] - first :]
