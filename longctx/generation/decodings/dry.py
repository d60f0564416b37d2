"""DRY: a token that would continue a repeat is made less likely, the more the longer the repeat.

    logit − multiplier · base^(n − allowed)   for a repeat of n ≥ allowed tokens before it

A repeat does not reach back over a breaker, such as the end of a line. The longest repeat that ends
in the last token is carried from step to step for every place i at once,

    m'[i] = (x[i] = t) · (m[i − 1] + 1),

so that a step costs O(n) whatever repeats. Unless `include_prompt`, only generated tokens count:
what stands in the prompt may be said again.

When to use it: for long texts and for retrieval. A long quotation that must be said twice is made
unlikely.

Source: p-e-w 2024, oobabooga/text-generation-webui, pull request 5677.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import DataError, RunError
from ..checks import check_flag, check_number, check_whole
from ..decoding import Call, same_start
from ._sampled import Sampled

__all__ = ["DECODING", "Dry", "DryProcessor", "breaker_tokens"]

_MOST = 1e30  # what a long repeat takes off at most: finite, so that no NaN comes of it


@dataclass(frozen=True, slots=True)
class Dry(Sampled):
    """Repeats of generated tokens made unlikely by their length."""

    multiplier: float = 0.8
    """What a repeat of `allowed` tokens takes off the next logit; 0 changes nothing."""
    base: float = 1.75
    """Factor of what is taken off, for each further token."""
    allowed: int = 2
    """Tokens of the shortest repeat that counts."""
    breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Texts, of one token or several, that no repeat reaches back over; those of one token are
    never made less likely."""
    include_prompt: bool = False
    """Whether a repeat of the prompt counts."""

    name: ClassVar[str] = "dry"

    def __post_init__(self) -> None:
        super(Dry, self).__post_init__()
        check_number(self.name, "multiplier", self.multiplier, least=0)
        check_number(self.name, "base", self.base, least=1)
        check_whole(self.name, "allowed", self.allowed, least=1)
        check_flag(self.name, "include_prompt", self.include_prompt)
        given: Any = self.breakers
        if not isinstance(given, tuple) or not all(isinstance(text, str) for text in given):
            raise RunError(
                f"dry: breakers={given!r}: expected a tuple of texts, as ('\\n', ':'), or () for "
                "none."
            )
        if "" in given:
            raise RunError(
                "dry: breakers hold an empty text, which stands everywhere: leave it out."
            )

    def processors(self, call: Call) -> Sequence[LogitsProcessor]:
        """The penalty."""
        return (DryProcessor(self, call),)

    def refuse(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse breakers that the tokenizer cannot write.

        Raises:
            DataError: one has no tokens, or only unknown ones.
        """
        del model
        breaker_tokens(tokenizer, self.breakers)


def breaker_tokens(
    tokenizer: PreTrainedTokenizerBase, breakers: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """The token sequences of each breaker, by itself and after a letter.

    Raises:
        DataError: one has no tokens, or unknown ones.
    """
    found: set[tuple[int, ...]] = set()
    before = _encoded(tokenizer, "a")
    for text in breakers:
        alone, after = _encoded(tokenizer, text), _encoded(tokenizer, f"a{text}")
        unknown: Any = tokenizer.unk_token_id
        if not alone or (unknown is not None and unknown in alone):
            raise DataError(
                f"dry: the breaker {text!r} has no tokens of its own in this tokenizer: leave it "
                "out of breakers, or name another."
            )
        found.add(alone)
        if after[: len(before)] == before and len(after) > len(before):
            found.add(after[len(before) :])
    return tuple(sorted(found))


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    ids: Any = tokenizer.encode(text, add_special_tokens=False)
    return tuple(ids)


class DryProcessor(LogitsProcessor):
    """The penalty with what it carries from step to step.

    It begins anew if the tokens are not those seen before and one more: beams change places, and
    rows may be cut back.
    """

    def __init__(self, settings: Dry, call: Call) -> None:
        self._settings = settings
        self._call = call
        self._breakers = breaker_tokens(call.tokenizer, settings.breakers)
        self._single = [ids[0] for ids in self._breakers if len(ids) == 1]
        self._seen: Tensor | None = None
        self._runs: Tensor | None = None  # float32 [rows, S]: tokens that repeat, ending at i

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits [rows, V] after tokens [rows, S]."""
        begin = self._call.begin(input_ids, prompt=self._settings.include_prompt)
        if self._runs is not None and same_start(self._seen, input_ids):
            self._runs = self._step(self._runs, input_ids, begin)
        else:
            self._runs = self._anew(input_ids, begin)
        self._seen = input_ids
        return self._lowered(input_ids, scores, self._runs)

    def _step(self, runs: Tensor, ids: Tensor, begin: Tensor) -> Tensor:
        """Runs [rows, n − 1] of the tokens before the last, to those [rows, n] of all."""
        size = ids.shape[1]
        same = ids[:, :-1] == ids[:, -1:]
        same &= torch.arange(size - 1, device=ids.device) >= begin
        longer = (pad(runs[:, :-1], (1, 0)) + 1) * same
        for breaker in self._breakers:
            longer = longer.masked_fill(self._ends(ids, breaker, begin), 0)
        return pad(longer, (0, 1))

    def _anew(self, ids: Tensor, begin: Tensor) -> Tensor:
        """The runs [rows, n] of tokens [rows, n] that were not seen before."""
        rows, size = ids.shape
        counted = torch.arange(size, device=ids.device) >= begin
        alive = counted.clone()
        alive[:, -1] = False
        runs = torch.zeros((rows, size), device=ids.device)
        for back in range(size):  # compare x[i − back] with x[n − 1 − back]
            kept = ids[:, : size - back]
            for breaker in self._breakers:
                alive &= ~self._ends(kept, breaker, begin)
            alive &= pad((kept == kept[:, -1:]) & counted[:, : size - back], (back, 0))
            if not bool(alive.any()):
                break
            runs += alive
        return runs

    @staticmethod
    def _ends(ids: Tensor, breaker: tuple[int, ...], begin: Tensor) -> Tensor:
        """Whether the last of the tokens [rows, n] end a breaker, bool [rows, 1]."""
        first = ids.shape[1] - len(breaker)
        if first < 0:
            return torch.zeros_like(begin, dtype=torch.bool)
        tail = ids[:, first:] == torch.tensor(breaker, device=ids.device)
        return tail.all(1, keepdim=True) & (begin <= first)

    def _lowered(self, ids: Tensor, scores: Tensor, runs: Tensor) -> Tensor:
        settings = self._settings
        lengths = runs[:, :-1]
        grown = settings.base ** (lengths - settings.allowed)
        taken = (settings.multiplier * grown).clamp(max=_MOST)
        taken = taken * (lengths >= settings.allowed)
        off = torch.zeros_like(scores).scatter_reduce(1, ids[:, 1:], taken.to(scores), "amax")
        off[:, [token for token in self._single if token < off.shape[1]]] = 0
        return scores - off


DECODING = Dry
