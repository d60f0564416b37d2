"""What a decoding is, and what it is told of a call of `generate`.

Legend: B rows, S padded tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Call", "Decoding", "Sampling", "same_start"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn; the fields are those of `decodings/_sampled.py`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the model's `generate`: prompts padded on the left."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    firsts: Tensor
    """Index of each row's first real token, int64 [B]."""
    starts: Tensor
    """Index of the first token that was generated or will be, int64 [B]: a row that is retried
    has some already."""
    seeds: tuple[int, ...]
    """A number of each row, for what it draws."""

    def begin(self, ids: Tensor, *, prompt: bool = False) -> Tensor:
        """Where the tokens that count begin, int64 [rows, 1], for ids [rows, S].

        Beams multiply rows: each row's beams stand together.

        Args:
            ids: what a logits processor is given.
            prompt: whether the prompt counts.
        """
        places = (self.firsts if prompt else self.starts).to(ids.device)
        return places.repeat_interleave(len(ids) // len(places))[:, None]


@runtime_checkable
class Decoding(Protocol):
    """A frozen dataclass in a file of `decodings/`, or your own; greedy unless it says otherwise.

    Derive from it, or from `Sampled` in `decodings/_sampled.py`, which brings temperature, top-k,
    top-p and min-p.
    """

    __slots__ = ()

    name: ClassVar[str]
    """The name of its file."""
    keeps_keys: ClassVar[bool] = True
    """Whether, at its defaults, keys of a prompt are found as by greedy decoding."""
    beams: ClassVar[bool] = False
    """Whether it keeps several continuations a row: their text is known at the end only."""

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn from the logits."""
        return Sampling()

    @property
    def draws(self) -> bool:
        """Whether two continuations of one prompt can differ."""
        return self.sampling.temperature > 0

    def settings(self) -> dict[str, Any]:
        """Fields of transformers' GenerationConfig."""
        return {}

    def processors(self, call: Call) -> Sequence[LogitsProcessor]:
        """What changes the logits [B, V] before a token is taken from them."""
        del call
        return ()

    def loop(self, call: Call) -> Callable[..., Tensor] | None:
        """A loop in place of transformers' own, as its `custom_generate=` takes it."""
        del call
        return None

    def around(self, call: Call) -> AbstractContextManager[object]:
        """What is in place while tokens are generated."""
        del call
        return nullcontext()

    def refuse(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model or tokenizer that it does not work with, before anything is read.

        Raises:
            LongctxError: it does not.
        """
        del model, tokenizer


def same_start(before: Tensor | None, ids: Tensor) -> bool:
    """Whether ids [rows, S] are those seen before, and one token more."""
    return (
        before is not None
        and before.shape == (ids.shape[0], ids.shape[1] - 1)
        and torch.equal(before, ids[:, :-1])
    )
