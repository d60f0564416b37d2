"""Sample: tokens drawn from the model's probabilities, cut to the likely ones.

    p ∝ exp(logits / temperature), among the tokens that top-k, top-p and min-p leave

The draws of a row follow from the seed and the row's index alone, not from the batch around it.

When to use it: for chat and stories. Keys and figures are said wrongly now and then: choose greedy
for those.

Source: Fan et al. 2018 (arXiv:1805.04833), top-k; Holtzman et al. 2020 (arXiv:1904.09751), top-p;
Nguyen et al. 2024 (arXiv:2407.01082), min-p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import RunError
from ._sampled import Sampled

__all__ = ["DECODING", "Sample"]


@dataclass(frozen=True, slots=True)
class Sample(Sampled):
    """Tokens drawn from the likely ones."""

    temperature: float = 1.0
    """Divides the logits before a token is drawn."""

    name: ClassVar[str] = "sample"
    keeps_keys: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super(Sample, self).__post_init__()
        if not self.temperature:
            raise RunError("sample: temperature=0 draws nothing: choose greedy, or more than 0.")


DECODING = Sample
