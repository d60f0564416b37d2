"""No repeat: an n-gram that was generated before is not generated again.

It looks at generated tokens alone. transformers' `no_repeat_ngram_size` looks at the prompt too,
and so forbids the answer of a retrieval prompt.

When to use it: for retrieval and summaries, with n of 3 or more. With n = 2 a key whose digits
repeat cannot be said. Long texts need some n-grams again (names): take 4 or more there.

Source: Paulus et al. 2017 (arXiv:1705.04304), section 2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..checks import check_whole
from ..decoding import Call
from ._sampled import Sampled

__all__ = ["DECODING", "NoRepeat"]


@dataclass(frozen=True, slots=True)
class NoRepeat(Sampled):
    """No n-gram of generated tokens twice."""

    ngram: int = 4
    """n, in tokens."""

    name: ClassVar[str] = "no_repeat"

    def __post_init__(self) -> None:
        super(NoRepeat, self).__post_init__()
        check_whole(self.name, "ngram", self.ngram, least=1)

    def processors(self, call: Call) -> Sequence[LogitsProcessor]:
        """The ban."""
        return (_NoRepeat(call, self.ngram),)


class _NoRepeat(LogitsProcessor):
    def __init__(self, call: Call, ngram: int) -> None:
        self._call = call
        self._ngram = ngram

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if input_ids.shape[1] < self._ngram:
            return scores
        grams = input_ids.unfold(1, self._ngram, 1)  # [B, n, ngram]
        tail = input_ids[:, input_ids.shape[1] - self._ngram + 1 :]
        places = torch.arange(grams.shape[1], device=input_ids.device)
        again = (grams[..., :-1] == tail[:, None]).all(-1)
        again &= places >= self._call.begin(input_ids)
        counts = torch.zeros_like(scores).scatter_add(1, grams[..., -1], again.to(scores))
        return scores.masked_fill(counts > 0, -torch.inf)


DECODING = NoRepeat
