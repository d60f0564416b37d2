"""What was answered, by which piece, and how surely."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Answer", "PieceAnswer"]


@dataclass(frozen=True, slots=True)
class PieceAnswer:
    """A piece of the document, and what was read in it alone."""

    start: int
    """Its first character in the document."""
    stop: int
    """The character after its last."""
    tokens: int
    """Its length."""
    text: str = ""
    """What the model answers from this piece; nothing where pieces are read together."""
    surety: float | None = None
    """map: mean log-probability of the answer's tokens, in nats. nbce: share of the answer's tokens
    for which this piece was the one that was listened to. None where nothing tells pieces apart."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer about a document that was read in pieces."""

    text: str
    token_ids: tuple[int, ...]
    """Of the text, without the token that ended it."""
    place: tuple[int, int] | None
    """Characters of the document that it comes from: [first, after the last). None where nothing
    tells."""
    literal: bool
    """Whether the answer stands there word for word; else `place` is a whole piece."""
    combine: str
    pieces: tuple[PieceAnswer, ...]
