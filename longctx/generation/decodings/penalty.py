"""Penalty: tokens that were generated before are made less likely.

    logit / penalty where it is positive, logit · penalty where it is negative

It looks at generated tokens alone. transformers' `repetition_penalty` looks at the prompt too, and
so makes unlikely what a retrieval prompt asks for.

When to use it: seldom. Even so it punishes every digit that a key has twice, and every common word.
`dry` and `no_repeat` keep keys.

Source: Keskar et al. 2019, CTRL (arXiv:1909.05858), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..checks import check_number
from ..decoding import Call
from ._sampled import Sampled

__all__ = ["DECODING", "Penalty"]


@dataclass(frozen=True, slots=True)
class Penalty(Sampled):
    """CTRL's repetition penalty on generated tokens."""

    penalty: float = 1.2
    """Divides positive logits and multiplies negative ones; 1 changes nothing."""

    name: ClassVar[str] = "penalty"
    keeps_keys: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super(Penalty, self).__post_init__()
        check_number(self.name, "penalty", self.penalty, least=1, most=1000)

    def processors(self, call: Call) -> Sequence[LogitsProcessor]:
        """The penalty."""
        return (_Penalty(call, self.penalty),)


class _Penalty(LogitsProcessor):
    def __init__(self, call: Call, penalty: float) -> None:
        self._call = call
        self._penalty = penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = torch.arange(input_ids.shape[1], device=input_ids.device) >= self._call.begin(
            input_ids
        )
        counts = torch.zeros_like(scores).scatter_add(1, input_ids, own.to(scores))
        lowered = torch.where(scores > 0, scores / self._penalty, scores * self._penalty)
        return torch.where(counts > 0, lowered, scores)


DECODING = Penalty
