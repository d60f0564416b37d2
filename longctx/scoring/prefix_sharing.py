"""Scoring many prompts at once while what they share runs once.

    scores = score_prompts(model, prompts, starts, batch_tokens=16_384)

Prompts with a common beginning form a tree (`prefix_tree`), which is walked with one KV cache; the
ends of several prompts after one branch run as a batch. A key at ten depths of one haystack of L
tokens costs about 6·L tokens instead of 10·L.

That is exact where a token's keys do not depend on what follows it, and possible where a cache can
be cropped. Elsewhere, and where the tree would not be cheaper, whole prompts run in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .batching import is_out_of_memory, shrinking
from .prefix_tree import CALL, Walk, by_length, causal_attention, cost_of, grow, obstacle
from .token_scores import TokenScores, score

__all__ = ["Finished", "PromptScores", "score_prompts"]

Finished: TypeAlias = Callable[[Sequence[int], Sequence[Tensor], Sequence[Tensor], int], None]
"""Told of prompts that ran together: their numbers, the nll and argmax of each as `PromptScores`
has them, and the tokens that were forwarded since it was last told."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Scores of each prompt's tokens from its own start on, on the CPU."""

    nll: tuple[Tensor, ...]
    """float32 [len(prompt) − start] each, in nats; NaN where the logits hold a NaN. Of a prompt
    that was passed over [0]."""
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
    known: Iterable[int] = (),
    finished: Finished | None = None,
) -> PromptScores:
    """Score the end of each prompt, given all tokens before it.

    Args:
        model: as in `longctx.scoring.score`.
        prompts: token ids; the same prompt twice is scored twice.
        starts: of each prompt the first position that is scored, at least 1.
        batch_tokens: tokens of the prompts that run at a time, if that is one prompt or more.
        length_invariant: whether a token's logits are the same in a longer input. If not, nothing
            is shared.
        known: numbers of prompts that an earlier call with the same arguments was `finished` with,
            and that are passed over. The others get the scores that it would have given them.
        finished: called as prompts come to their end.

    Raises:
        DataError, ModelError: as in `longctx.scoring.score`.
    """
    sheet = _Sheet(starts, set(known), finished)
    why = "length-dependent method" if not length_invariant else obstacle(model)
    if why is None and prompts:
        tree = grow(prompts, starts)
        if cost_of(tree, prompts) < _cost_of_whole(prompts, batch_tokens):
            try:
                with causal_attention(model):
                    _Scoring(model, prompts, batch_tokens, sheet).visit(tree)
                return sheet.scores("shared prefixes")
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            why = "no memory for a cache"  # which whole prompts do without
        else:
            why = "cheaper"
    _whole(model, prompts, batch_tokens, sheet)
    return sheet.scores(f"whole prompts ({why})")


class _Sheet:
    """The scores of all prompts as they come."""

    def __init__(self, starts: Sequence[int], done: set[int], finished: Finished | None) -> None:
        self.starts, self.done, self._finished = starts, done, finished
        self._nll: list[Tensor] = [torch.empty(0)] * len(starts)
        self._argmax = [*self._nll]
        self._tokens = 0

    def first(self, rows: Sequence[int]) -> int:
        """The first position that any of these prompts is scored at."""
        return min(self.starts[row] for row in rows)

    def put(self, rows: Sequence[int], scores: TokenScores, tokens: int) -> None:
        """Take the scores of prompts that ran together, from the first position of any on."""
        first = self.first(rows)
        for i, row in enumerate(rows):
            self._nll[row] = scores.nll[i, self.starts[row] - first :]
            self._argmax[row] = scores.argmax[i, self.starts[row] - first :]
        self.done.update(rows)
        self._tokens += tokens
        if self._finished is not None:
            nll, argmax = ([kept[row] for row in rows] for kept in (self._nll, self._argmax))
            self._finished(rows, nll, argmax, tokens)

    def scores(self, how: str) -> PromptScores:
        return PromptScores(tuple(self._nll), tuple(self._argmax), self._tokens, how)


def _whole(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], batch_tokens: int, sheet: _Sheet
) -> None:
    for rows in by_length(range(len(prompts)), prompts):
        ids = torch.tensor([prompts[row] for row in rows])

        def run(a: int, b: int, rows: Sequence[int] = rows, ids: Tensor = ids) -> None:
            if not sheet.done.issuperset(some := rows[a:b]):
                scores = score(model, ids[a:b], start=sheet.first(some))
                sheet.put(some, scores, ids[a:b].numel())

        shrinking(len(rows), max(1, batch_tokens // ids.shape[1]), run)


def _cost_of_whole(prompts: Sequence[Sequence[int]], batch_tokens: int) -> int:
    tokens = sum(map(len, prompts))
    return tokens + CALL * max(1, tokens // batch_tokens)


class _Scoring(Walk):
    """A walk that scores the ends of prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        batch_tokens: int,
        sheet: _Sheet,
    ) -> None:
        super().__init__(model, prompts, sheet.done)
        self._batch_tokens, self._sheet, self._told = batch_tokens, sheet, 0

    def end(self, rows: Sequence[int], done: int) -> None:
        """Those of one length in batches."""
        size = max(1, self._batch_tokens // len(self.prompts[rows[0]]))
        shrinking(len(rows), size, lambda a, b: self._score(rows[a:b], done))

    def _score(self, rows: Sequence[int], done: int) -> None:
        if self._sheet.done.issuperset(rows):
            return
        ids = torch.tensor([self.prompts[row][done:] for row in rows])
        first = self._sheet.first(rows)
        scores = score(self.model, ids, past_key_values=self.fork(len(rows)), start=first - done)
        self.tokens += ids.numel()
        tokens, self._told = self.tokens - self._told, self.tokens
        self._sheet.put(rows, scores, tokens)
