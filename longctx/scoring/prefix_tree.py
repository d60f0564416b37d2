"""Prompts with a common beginning as a tree, and a walk through it with one KV cache.

The tree is walked depth first. The cache holds the way from the root to the present branch and is
cropped back when a branch is done. It keeps all keys, also under methods that let others drop some.
What is done at the end of a prompt is the business of who walks (`Walk.end`): scoring an answer
(`prefix_sharing`) or generating one (`continuations`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..attention.dispatch import LinearBias
from ..attention.hook import ATTRIBUTE, NAME, register
from ..before_transformers_5_24 import cache_argument
from ..errors import ModelError
from ..model import attention_modules, text_config
from .token_scores import prefill

__all__ = ["CALL", "Node", "Walk", "by_length", "causal_attention", "cost_of", "grow", "obstacle"]

CALL = 256
"""A forward pass costs about as much as so many tokens, whatever it forwards."""


@dataclass(frozen=True, slots=True)
class Node:
    """Tokens `begin` … `end` − 1 that several prompts share, and how these go on."""

    row: int
    """One of the prompts."""
    begin: int
    end: int
    branches: tuple[Node, ...]
    leaves: tuple[int, ...]
    """Prompts that share nothing further."""

    @property
    def rows(self) -> Iterator[int]:
        """All prompts that it is a beginning of."""
        yield from self.leaves
        for branch in self.branches:
            yield from branch.rows


def obstacle(model: PreTrainedModel) -> str | None:
    """Why this model's cache cannot be cropped back, None if it can."""
    if cache_argument(model.base_model.forward) is None:
        return "recurrent state"
    if getattr(model, "_is_stateful", False):
        return "recurrent state"
    layers = DynamicCache(config=text_config(model)).layers
    others = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    return f"cache of {', '.join(sorted(others))}" if others else None


def by_length(rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows in groups of prompts that have the same number of tokens."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for row in rows:
        found[len(prompts[row])].append(row)
    return list(found.values())


def grow(prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> Node:
    """The tree of prompts, of each of which the tokens before its start may be shared."""
    rows = sorted(range(len(prompts)), key=lambda row: tuple(prompts[row]))
    return _grow(prompts, starts, rows, 0)


def _grow(
    prompts: Sequence[Sequence[int]], starts: Sequence[int], rows: Sequence[int], begin: int
) -> Node:
    """The tree of `rows`, which are sorted by their tokens and share the first `begin`."""
    # A leaf must run the token before its first target itself.
    end = min(starts[row] for row in rows) - 1
    first, last = prompts[rows[0]], prompts[rows[-1]]
    end = next((i for i in range(begin, end) if first[i] != last[i]), end)
    leaves = [row for row in rows if starts[row] - 1 == end]
    branches: list[Node] = []
    going_on = [row for row in rows if starts[row] - 1 > end]
    for _, group in groupby(going_on, key=lambda row: prompts[row][end]):
        some = list(group)
        if len(some) > 1:
            branches.append(_grow(prompts, starts, some, end))
        else:
            leaves += some
    return Node(rows[0], begin, end, tuple(branches), tuple(leaves))


def cost_of(node: Node, prompts: Sequence[Sequence[int]]) -> int:
    """Tokens to forward, calls counted in."""
    own = node.end - node.begin + CALL * (node.end > node.begin)
    for rows in by_length(node.leaves, prompts):
        own += CALL + sum(len(prompts[row]) - node.end for row in rows)
    return own + sum(cost_of(branch, prompts) for branch in node.branches)


class _FullCache(DynamicCache):
    """Keeps all keys, since methods drop some from a plain DynamicCache only."""


class Walk(ABC):
    """A walk through the tree with one cache.

    It may be taken up where an earlier one was cut off: what leads to the prompts that are left is
    then run again, in the same pieces, so that all scores are those of one walk.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        finished: AbstractSet[int] = frozenset(),
    ) -> None:
        self.model, self.prompts, self.finished = model, prompts, finished
        self.tokens = 0
        """Forwarded, without what an earlier walk had forwarded already."""
        self._cache = _FullCache(config=text_config(model))

    @abstractmethod
    def end(self, rows: Sequence[int], done: int) -> None:
        """Run what prompts of one length have after their first `done` tokens, which they share."""

    def visit(self, node: Node) -> None:
        """Run a node and all below it that is not finished."""
        rows = set(node.rows)
        if rows <= self.finished:
            return
        own = node.end - node.begin
        if own:
            ids = torch.tensor([self.prompts[node.row][node.begin : node.end]])
            prefill(self.model, ids, self._cache)
            if rows.isdisjoint(self.finished):
                self.tokens += own
        for rows in by_length(node.leaves, self.prompts):
            self.end(rows, node.end)
        for branch in node.branches:
            self.visit(branch)
        if own:
            self._cache.crop(-own)

    def fork(self, count: int = 1) -> DynamicCache:
        """The same cache for `count` continuations; its tensors are views until they grow."""
        fork = _FullCache(config=text_config(self.model))
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
def causal_attention(model: PreTrainedModel) -> Generator[None]:
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
