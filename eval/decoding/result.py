"""What a decode bench found, as it is written to decodings.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .settings import BenchSettings

__all__ = ["INTERVALS", "TEXT", "DecodeBench", "Figure", "LoopExample"]

TEXT = "the text itself"
"""The row of what really follows the prompts."""
INTERVALS = (
    "95%, documents as clusters: t for means, Wilson with the design effect for loops, the "
    "jackknife for entropy and uniq-seq; Wilson for keys, as if their prompts were independent"
)
"""How the interval of each figure comes about."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A value with its 95% interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, slots=True)
class LoopExample:
    """A continuation whose tail is three copies of the same tokens, or more."""

    document: str
    prompt: str
    """The text that it continues."""
    before: str
    """What was said before the loop."""
    loop: str
    """All copies."""


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """What was found for one model."""

    model: str
    """Its name."""
    settings: BenchSettings
    prompts: int
    """Windows that there were."""
    documents: int
    model_block: dict[str, Figure]
    """Of the model alone, on real text."""
    decoding_block: dict[str, dict[str, Figure]]
    """For each decoding, as the command line writes it, and for the text itself."""
    identity: dict[str, str] = field(default_factory=dict[str, str])
    """Digests of model, tokenizer and chat template, and the attention implementation's name."""
    examples: dict[str, tuple[LoopExample, ...]] = field(
        default_factory=dict[str, tuple[LoopExample, ...]]
    )
    """Continuations that end in a loop, a few of each decoding that has some."""
