"""Scoring many prompts at once while what they share runs once.

    scores = score_prompts(model, prompts, starts, batch_tokens=16_384)

Prompts with a common beginning form a tree. It is walked depth first with one KV cache, which holds
the way from the root to the present branch and is cropped back when a branch is done; the ends of
several prompts after one branch run as a batch. A key at ten depths of one haystack of L tokens
costs about 6·L tokens instead of 10·L.

That is exact where a token's keys do not depend on what follows it, and possible where a cache can
be cropped. Elsewhere, and where the tree would not be cheaper, whole prompts run in batches. The
cache here keeps all keys, also under methods that let others drop some.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..attention.dispatch import LinearBias
from ..attention.hook import ATTRIBUTE, NAME, register
from ..before_transformers_5_24 import cache_argument
from ..errors import ModelError
from ..model import attention_modules, text_config
from .batching import is_out_of_memory, score_batches, shrinking
from .token_scores import prefill, score

__all__ = ["PromptScores", "obstacle", "score_prompts"]

_CALL = 256  # a forward pass costs about as much as so many tokens, whatever it forwards


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
        rows = sorted(range(len(prompts)), key=lambda row: tuple(prompts[row]))
        tree = _grow(prompts, starts, rows, 0)
        if _cost_of_tree(tree, prompts) < _cost_of_whole(prompts, batch_tokens):
            try:
                with _causal_attention(model):
                    return _Walk(model, prompts, starts, batch_tokens).scores(tree)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            why = "no memory for a cache"  # which whole prompts do without
        else:
            why = "cheaper"
    return _whole(model, prompts, starts, batch_tokens, f"whole prompts ({why})")


def obstacle(model: PreTrainedModel) -> str | None:
    """Why this model's cache cannot be cropped back, None if it can."""
    if cache_argument(model.base_model.forward) is None:
        return "recurrent state"
    if getattr(model, "_is_stateful", False):
        return "recurrent state"
    layers = DynamicCache(config=text_config(model)).layers
    others = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    return f"cache of {', '.join(sorted(others))}" if others else None


def _whole(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    starts: Sequence[int],
    batch_tokens: int,
    how: str,
) -> PromptScores:
    nll: list[Tensor] = [torch.empty(0)] * len(prompts)
    argmax = [*nll]
    for rows in _by_length(range(len(prompts)), prompts):
        ids = torch.tensor([prompts[row] for row in rows])
        first = min(starts[row] for row in rows)
        scores = score_batches(model, ids, start=first, batch_tokens=batch_tokens)
        for i, row in enumerate(rows):
            nll[row] = scores.nll[i, starts[row] - first :]
            argmax[row] = scores.argmax[i, starts[row] - first :]
    return PromptScores(tuple(nll), tuple(argmax), sum(map(len, prompts)), how)


def _by_length(rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    found: defaultdict[int, list[int]] = defaultdict(list)
    for row in rows:
        found[len(prompts[row])].append(row)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class _Node:
    """Tokens `begin` … `end` − 1 that several prompts share, and how these go on."""

    row: int
    """One of the prompts."""
    begin: int
    end: int
    branches: tuple[_Node, ...]
    leaves: tuple[int, ...]
    """Prompts that share nothing further."""


def _grow(
    prompts: Sequence[Sequence[int]], starts: Sequence[int], rows: Sequence[int], begin: int
) -> _Node:
    """The tree of `rows`, which are sorted by their tokens and share the first `begin`."""
    # A leaf must run the token before its first target itself.
    end = min(starts[row] for row in rows) - 1
    first, last = prompts[rows[0]], prompts[rows[-1]]
    end = next((i for i in range(begin, end) if first[i] != last[i]), end)
    leaves = [row for row in rows if starts[row] - 1 == end]
    branches: list[_Node] = []
    going_on = [row for row in rows if starts[row] - 1 > end]
    for _, group in groupby(going_on, key=lambda row: prompts[row][end]):
        some = list(group)
        if len(some) > 1:
            branches.append(_grow(prompts, starts, some, end))
        else:
            leaves += some
    return _Node(rows[0], begin, end, tuple(branches), tuple(leaves))


def _cost_of_tree(node: _Node, prompts: Sequence[Sequence[int]]) -> int:
    """Tokens to forward, calls counted in."""
    own = node.end - node.begin + _CALL * (node.end > node.begin)
    for rows in _by_length(node.leaves, prompts):
        own += _CALL + sum(len(prompts[row]) - node.end for row in rows)
    return own + sum(_cost_of_tree(branch, prompts) for branch in node.branches)


def _cost_of_whole(prompts: Sequence[Sequence[int]], batch_tokens: int) -> int:
    tokens = sum(map(len, prompts))
    return tokens + _CALL * max(1, tokens // batch_tokens)


class _FullCache(DynamicCache):
    """Keeps all keys, since methods drop some from a plain DynamicCache only."""


class _Walk:
    """A walk through the tree with one cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        starts: Sequence[int],
        batch_tokens: int,
    ) -> None:
        self._model, self._prompts, self._starts = model, prompts, starts
        self._batch_tokens = batch_tokens
        self._cache = _FullCache(config=text_config(model))
        self._nll: list[Tensor] = [torch.empty(0)] * len(prompts)
        self._argmax = [*self._nll]
        self._tokens = 0

    def scores(self, root: _Node) -> PromptScores:
        self._visit(root)
        return PromptScores(tuple(self._nll), tuple(self._argmax), self._tokens, "shared prefixes")

    def _visit(self, node: _Node) -> None:
        own = node.end - node.begin
        if own:
            ids = torch.tensor([self._prompts[node.row][node.begin : node.end]])
            prefill(self._model, ids, self._cache)
            self._tokens += own
        for rows in _by_length(node.leaves, self._prompts):
            size = max(1, self._batch_tokens // len(self._prompts[rows[0]]))
            shrinking(len(rows), size, lambda a, b, rows=rows: self._end(rows[a:b], node.end))
        for branch in node.branches:
            self._visit(branch)
        if own:
            self._cache.crop(-own)

    def _end(self, rows: Sequence[int], done: int) -> None:
        """Run what prompts of one length have after their first `done` tokens."""
        ids = torch.tensor([self._prompts[row][done:] for row in rows])
        first = min(self._starts[row] for row in rows)
        cache = self._fork(len(rows))
        scores = score(self._model, ids, past_key_values=cache, start=first - done)
        self._tokens += ids.numel()
        for i, row in enumerate(rows):
            self._nll[row] = scores.nll[i, self._starts[row] - first :]
            self._argmax[row] = scores.argmax[i, self._starts[row] - first :]

    def _fork(self, count: int) -> DynamicCache:
        """The same cache for `count` continuations; its tensors are views until they grow."""
        fork = _FullCache(config=text_config(self._model))
        for old, new in zip(self._cache.layers, fork.layers, strict=True):
            if (
                isinstance(old, DynamicLayer)
                and isinstance(new, DynamicLayer)
                and old.keys is not None
            ):
                assert old.values is not None
                new.lazy_initialization(old.keys, old.values)
                new.keys, new.values = (
                    x.expand(count, *x.shape[1:]) for x in (old.keys, old.values)
                )
        return fork


@contextmanager
def _causal_attention(model: PreTrainedModel) -> Generator[None]:
    """Spare transformers' SDPA the [S, N] mask that it makes for tokens after cached ones."""
    config: Any = text_config(model)
    try:
        modules = [module for _, module, _ in attention_modules(model)]
    except ModelError:  # another kind of model: the mask it is
        modules = []
    soft_capped = getattr(config, "attn_logit_softcapping", None) is not None
    if getattr(config, "_attn_implementation", None) != "sdpa" or not modules or soft_capped:
        yield
        return
    register()
    rule = LinearBias((0.0,) * int(config.num_attention_heads))
    try:
        config._attn_implementation_internal = NAME
        for module in modules:
            setattr(module, ATTRIBUTE, rule)
        yield
    finally:
        config._attn_implementation_internal = "sdpa"
        for module in modules:
            delattr(module, ATTRIBUTE)
