"""Reading on over a compressed cache: what a context leaves behind is all that later tokens see.

    reader = CacheReader(model, context_ids, Quantized(bits=4))
    logits = reader.read(question_ids)         # float32 [vocab], after the question's last token

As transformers' `generate` would: the context is prefilled in one pass, what follows it runs over
the cache in another, and each token of an answer in one of its own. So a score by teacher forcing
is what decoding step by step gives, also where a cache slides or is quantized anew on the way.
Positions are those of the text, whatever the cache kept.

Each prompt is prefilled by itself. Two contexts with a common beginning are not compressed to a
common beginning: scales are taken over all tokens, and a press ranks all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..errors import DataError, LongctxError, RunError
from ..model import text_config
from .batching import is_out_of_memory
from .compressed_caches import CompressedCache, Press
from .token_scores import next_logits, prefill, score_logits

__all__ = [
    "CacheAnswer",
    "CacheReader",
    "CacheScores",
    "bytes_of",
    "full_cache_bytes",
    "say_over_cache",
    "score_over_cache",
]


@dataclass(frozen=True, slots=True)
class CacheScores:
    """Scores of a prompt's last tokens, on the CPU."""

    nll: Tensor
    """float32 [tokens], in nats; NaN where the logits hold a NaN."""
    argmax: Tensor
    """int64 [tokens]; −1 where the logits hold a NaN."""
    tokens: int
    """Forwarded."""
    cache_bytes: int
    """Held by the cache at the end."""


class CacheReader:
    """A context in a compressed cache, and what is read after it.

    Args:
        model: a causal language model of transformers, patched or not.
        context: token ids, at least one.
        kind: how they are kept.

    Raises:
        ModelError: as in `longctx.scoring.token_scores.prefill`, or no such cache for this model.
        RunError: the press fails on this context.
    """

    def __init__(
        self, model: PreTrainedModel, context: Sequence[int], kind: CompressedCache
    ) -> None:
        self.model, self.kind = model, kind
        self.cache = kind.new_cache(model)
        self.tokens = len(context)
        """Read so far."""
        ids = torch.tensor([list(context)])
        with self._failing(f"a context of {len(context)} tokens"):
            prefill(
                model,
                ids,
                self.cache,
                arguments=kind.arguments(len(context), model.device),
                inside=kind.compressing(model),
            )

    @contextmanager
    def _failing(self, where: str) -> Generator[None]:
        """A press asserts what it needs of a context, in words and types of its own."""
        try:
            yield
        except Exception as error:
            known = isinstance(error, LongctxError) or is_out_of_memory(error)
            if known or not isinstance(self.kind, Press):
                raise
            raise RunError(
                f"{self.kind} fails on {where} ({type(error).__name__}: {error}): ask for longer "
                "prompts, or another press."
            ) from error

    def read(self, ids: Sequence[int]) -> Tensor:
        """Read tokens in one pass; returns the logits after the last of them, float32 [vocab]."""
        tokens = torch.tensor([list(ids)])
        with self._failing(f"what is read after a context, at token {self.tokens}"):
            logits = next_logits(self.model, tokens, self.cache, first=self.tokens)
        self.tokens += len(ids)
        return logits

    @property
    def cache_bytes(self) -> int:
        """Bytes of all that the cache holds now."""
        return bytes_of(self.cache)


def score_over_cache(
    model: PreTrainedModel,
    prompt: Sequence[int],
    kind: CompressedCache,
    *,
    context_end: int,
    start: int,
) -> CacheScores:
    """Score the end of a prompt over what its context leaves in a compressed cache.

    Args:
        model: as `CacheReader` takes it.
        prompt: token ids, the scored ones included.
        kind: how the context is kept.
        context_end: tokens of the context, at least 1; those up to `start` are read in one pass.
        start: first token that is scored, after `context_end`.

    Raises:
        DataError: places that do not follow each other.
        ModelError, RunError: as `CacheReader`.
    """
    if not 0 < context_end < start < len(prompt):
        raise DataError(
            f"a context of {context_end} tokens, scored from token {start} of {len(prompt)}: "
            "expected a context, something read after it, and something scored after that."
        )
    reader = CacheReader(model, prompt[:context_end], kind)
    rows = [reader.read(prompt[context_end:start])]
    rows += [reader.read([token]) for token in prompt[start:-1]]
    logits = torch.stack(rows)
    targets = torch.tensor([*prompt[start:]], device=logits.device)
    nll, argmax = score_logits(logits, targets, model.dtype)
    return CacheScores(nll.cpu(), argmax.cpu(), reader.tokens, reader.cache_bytes)


@dataclass(frozen=True, slots=True)
class CacheAnswer:
    """What was said after a prompt."""

    token_ids: tuple[int, ...] | None
    """Without the token that ended it; None where the logits held a NaN."""
    tokens: int
    """Forwarded."""
    cache_bytes: int
    """Held by the cache at the end."""


def say_over_cache(
    model: PreTrainedModel,
    prompt: Sequence[int],
    kind: CompressedCache,
    *,
    context_end: int,
    new_tokens: int,
    stop: Container[int],
    settled: Callable[[Sequence[int]], bool],
) -> CacheAnswer:
    """Say what greedy decoding says over what a context leaves in a compressed cache.

    Args:
        model: as `CacheReader` takes it.
        prompt: token ids.
        kind: how the context is kept.
        context_end: tokens of the context, at least 1; the others are read in one pass.
        new_tokens: to be said at most, at least 1.
        stop: tokens that end an answer and are not part of it.
        settled: asked for what was said so far; True ends the answer there.

    Raises:
        DataError: no context, or nothing after it.
        ModelError, RunError: as `CacheReader`.
    """
    if not 0 < context_end < len(prompt):
        raise DataError(
            f"a context of {context_end} tokens in a prompt of {len(prompt)}: expected a context, "
            "and something read after it."
        )
    reader = CacheReader(model, prompt[:context_end], kind)
    logits = reader.read(prompt[context_end:])
    said: list[int] = []
    while not bool(logits.isnan().any()):
        guess = int(logits.to(model.dtype).argmax())
        if guess not in stop:
            said.append(guess)
        if guess in stop or len(said) == new_tokens or settled(said):
            return CacheAnswer(tuple(said), reader.tokens, reader.cache_bytes)
        logits = reader.read([guess])
    return CacheAnswer(None, reader.tokens, reader.cache_bytes)


def bytes_of(cache: Cache) -> int:
    """Bytes of the tensors in a cache, not of larger ones that they may be views of."""
    return sum(
        _bytes_in(value)
        for layer in cache.layers
        for name, value in vars(layer).items()
        if "key" in name or "value" in name  # a layer's bookkeeping is no part of it
    )


def _bytes_in(value: Any) -> int:
    if isinstance(value, Tensor):
        flatten: Any = getattr(value, "__tensor_flatten__", None)
        if flatten is not None and type(value) is not Tensor:  # quanto: numbers, scales, shifts
            return sum(_bytes_in(getattr(value, name)) for name in flatten()[0])
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes_in, value.values()))
    return sum(map(_bytes_in, value)) if isinstance(value, list | tuple) else 0


def full_cache_bytes(model: PreTrainedModel, tokens: int) -> int | None:
    """Bytes of the model's own cache after so many tokens; None if it keeps something else.

    A method in place that bounds the cache counts. One token is read to see what a layer keeps.

    Args:
        model: patched or not.
        tokens: of one prompt.
    """
    cache = DynamicCache(config=text_config(model))
    try:
        prefill(model, torch.zeros(1, 1, dtype=torch.int64), cache)
        layers: list[Any] = cache.layers
        sizes = [(_bytes_in([x.keys, x.values]), _most(x)) for x in layers]
    except (AttributeError, TypeError):  # a recurrent state, which is no sum over tokens
        return None
    return sum(size * (tokens if most is None else min(tokens, most)) for size, most in sizes)


def _most(layer: Any) -> int | None:
    """Tokens that a layer keeps at most."""
    window: int | None = getattr(layer, "sliding_window", None) or getattr(layer, "window", None)
    return None if window is None else int(getattr(layer, "sinks", 0)) + window - 1
