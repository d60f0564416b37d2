"""Which tokens of a text a long context helps with, as an evaluator model finds them.

    LSD(xᵢ) = log p(xᵢ | lᵢ) − log p(xᵢ | sᵢ),   lᵢ = (x₁, …, xᵢ₋₁),   sᵢ = (xᵢ₋ₖ, …, xᵢ₋₁)
    xᵢ is a key token  where  LSD(xᵢ) > α  and  log p(xᵢ | lᵢ) > β

The short contexts of d tokens in a row begin at one place, so that a window of K + d tokens scores
d of them: sᵢ has K to K + d − 1 tokens. Tokens with no more than K before them are no candidates.

Source: Fang et al. 2024, "What is Wrong with Perplexity for Long-context Language Modeling?"
(arXiv:2410.23771), equations 4 and 6, the step d in appendix A.1.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.checkpoint import load
from longctx.core import extend_all
from longctx.errors import DataError, ModelError
from longctx.fingerprint import model_digest, tokenizer_digest
from longctx.model import window
from longctx.patch import patch_of
from longctx.registry import parse_methods
from longctx.scoring.batching import score_batches
from longctx.weights import refuse_small_vocabulary

from ...stats.longppl import is_key
from .sliding import score_last

__all__ = ["Alignment", "Evaluator", "KeyRule", "evaluator_of", "offsets_of"]

Stretch: TypeAlias = tuple[int, int]
"""First character, and the one after the last."""
_Known: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], KeyRule]"


@dataclass(frozen=True, slots=True)
class KeyRule:
    """What makes a token a key."""

    short: int
    """K, tokens of the short context."""
    step: int
    """d, tokens whose short contexts begin at one place."""
    alpha: float
    """α: nats that its log-probability gains from the long context, more than."""
    beta: float
    """β: its log-probability with the long context, more than."""

    def windows(self, tokens: int) -> list[tuple[int, int, int]]:
        """First token, token after the last and tokens scored, of each short window of a text."""
        return [
            (first - self.short, last, last - first)
            for first in range(self.short, tokens, self.step)
            for last in (min(first + self.step, tokens),)
        ]

    def keys(
        self,
        model: PreTrainedModel,
        ids: tuple[int, ...],
        bos: tuple[int, ...],
        nll: Tensor,
        batch_tokens: int,
    ) -> list[int]:
        """Places of the key tokens in a text, ascending.

        Args:
            model: the evaluator.
            ids: the text, [n].
            bos: what stands before every window, the short ones too.
            nll: of each token of the text with all before it, in nats, [n].
            batch_tokens: tokens forwarded at a time.
        """
        places = self.windows(len(ids))
        if not places:
            return []
        windows = [(*bos, *ids[first:last]) for first, last, _ in places]
        scores = score_last(model, windows, [new for *_, new in places], batch_tokens)
        long, short = -nll[self.short :].double(), -scores.nll[0].double()
        chosen = is_key(long, short, self.alpha, self.beta)
        return (chosen.nonzero().flatten() + self.short).tolist()


@dataclass(frozen=True, slots=True, eq=False)
class Evaluator:
    """A model that chooses, with its method in place, and what it has chosen so far."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    """Of model and method."""
    vocabulary: str
    """Digest of the tokenizer."""
    found: dict[tuple[Any, ...], list[int]] = field(
        default_factory=dict[tuple[Any, ...], list[int]]
    )

    @property
    def window(self) -> int | None:
        """Tokens that it claims to read."""
        patch = patch_of(self.model)
        return patch.window if patch else window(self.model)

    def keys(
        self, ids: tuple[int, ...], bos: tuple[int, ...], rule: KeyRule, batch_tokens: int
    ) -> list[int]:
        """Places of the key tokens in a text of its tokens, found once for all methods."""
        known = ids, bos, rule
        if known not in self.found:
            scores = score_batches(
                self.model, torch.tensor([[*bos, *ids]]), start=1, batch_tokens=batch_tokens
            )
            if bool(scores.nll.isnan().any()):
                raise ModelError("the evaluator's logits hold a NaN: take another, or a method.")
            nll = torch.nn.functional.pad(scores.nll[0], (1, 0))[len(bos) :]
            self.found[known] = rule.keys(self.model, ids, bos, nll, batch_tokens)
        return self.found[known]


@lru_cache(maxsize=1)
def evaluator_of(source: str, method: str) -> Evaluator:
    """Load an evaluator and put its method on, "none" for none.

    Raises:
        ModelError: nothing that can be loaded.
        MethodError: a method that is unknown or cannot be put on.
    """
    methods = parse_methods(method)
    model, tokenizer = load(source)
    refuse_small_vocabulary(model, tokenizer)
    extend_all(model, methods)
    return Evaluator(model, tokenizer, model_digest(model), tokenizer_digest(tokenizer))


@lru_cache(maxsize=16)
def offsets_of(
    tokenizer: PreTrainedTokenizerBase, text: str, whose: str
) -> tuple[tuple[int, ...], tuple[Stretch, ...]]:
    """Tokens of a text, without special ones, and the characters that each stands for.

    Raises:
        DataError: a tokenizer that does not say; `whose` it is.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"the evaluator has another tokenizer than the model, and that of the {whose} "
            f"({type(tokenizer).__name__}) does not say which characters a token stands for: take "
            "an evaluator with the model's own tokenizer, or one with a fast tokenizer."
        )
    found: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return tuple(found["input_ids"]), tuple((a, b) for a, b in found["offset_mapping"])


@dataclass(frozen=True, slots=True)
class Alignment:
    """A text in the tokens of two tokenizers."""

    text: str
    evaluator: tuple[Stretch, ...]
    """The characters of each of the evaluator's tokens."""
    model: tuple[Stretch, ...]
    """The characters of each of the model's."""

    def within(self, keys: Sequence[int]) -> list[int]:
        """Places of the model's tokens that lie within key tokens in a row.

        White space at a token's ends does not count, since tokenizers differ in whether a space
        belongs to the word after it. A token that stands for no character is in none.

        Args:
            keys: places of the evaluator's tokens, ascending.

        >>> Alignment("ab cd", ((0, 1), (1, 2), (3, 5)), ((0, 2), (2, 5))).within([0, 2])
        [1]
        """
        stretches: list[Stretch] = []
        for index, place in enumerate(keys):
            start, stop = self.evaluator[place]
            if index and keys[index - 1] == place - 1:
                start = stretches.pop()[0]
            stretches.append((start, stop))
        starts = [start for start, _ in stretches]
        found: list[int] = []
        for place, (start, stop) in enumerate(self.model):
            word = self.text[start:stop]
            if word.strip():
                stop = start + len(word.rstrip())
                start += len(word) - len(word.lstrip())
            before = bisect_right(starts, start) - 1
            if start < stop and before >= 0 and stop <= stretches[before][1]:
                found.append(place)
        return found
