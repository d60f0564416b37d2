"""What `generate` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Generated", "GenerationEvent"]


@dataclass(frozen=True, slots=True)
class GenerationEvent:
    """Something that happened to a row on the way."""

    row: int
    """Index among the prompts of the call."""
    position: int
    """Generated tokens before it."""
    kind: Literal["loop", "retry", "recovered", "gave up"]
    detail: str


@dataclass(frozen=True, slots=True)
class Generated:
    """Texts that follow prompts, in their order."""

    texts: tuple[str, ...]
    """Without special tokens."""
    token_ids: tuple[tuple[int, ...], ...]
    """Of each row, without padding, without the token that ended it, and without what was cut."""
    finish_reasons: tuple[Literal["eos", "length", "loop"], ...]
    """"eos": a token that ends the text; "length": `max_new_tokens`; "loop": the guard gave up."""
    events: tuple[GenerationEvent, ...]
    """What the guard did, by row and in the order it happened."""
