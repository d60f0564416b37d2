"""A document cut into overlapping pieces of so many tokens, at ends of sentences where it can be.

    for piece in split(tokenizer, document, chunk=180, overlap=48):
        document[piece.start : piece.stop], piece.ids

Units are cut by `semantic-text-splitter`: paragraphs, then sentences, then words, then characters,
the largest that fit into a third of what a piece goes on by. A piece is as many units as fit. Any
stretch of no more tokens than the overlap stands whole in one of the pieces, and every character
but white space in at least one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from semantic_text_splitter import TextSplitter
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..prompts.haystacks import encode

__all__ = ["Piece", "split"]

_UNITS = 3  # in what a piece goes on by
_Unit: TypeAlias = tuple[int, int, int]
"""First character, the one after the last, and tokens."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document."""

    start: int
    """Its first character in the document."""
    stop: int
    """The character after its last."""
    ids: tuple[int, ...]
    """Its tokens, read by itself."""


def split(
    tokenizer: PreTrainedTokenizerBase, document: str, chunk: int, overlap: int = 0
) -> tuple[Piece, ...]:
    """Cut a document into pieces, in their order.

    Args:
        tokenizer: the model's, which counts the tokens.
        document: any text.
        chunk: tokens of a piece, at most.
        overlap: tokens that a piece shares with the one before it, at least. What is sought must
            fit into it, or a cut can go through it.

    Raises:
        DataError: no text, an overlap that is not below the chunk, or a chunk that a single
            character does not fit into.
    """
    if not document.strip():
        raise DataError("the document is empty: there is nothing to read.")
    if not 0 <= overlap < chunk:
        raise DataError(
            f"overlap={overlap}, chunk={chunk}: expected an overlap of 0 or more that is smaller "
            "than the chunk."
        )
    size = max(1, (chunk - overlap) // _UNITS)
    units = [
        (start, start + len(text), len(encode(tokenizer, text)))
        for start, text in _splitter(tokenizer, size).chunk_indices(document)
        if text.strip()
    ]
    pieces: list[Piece] = []
    first = 0
    while True:
        piece, last = _packed(tokenizer, document, units, first, chunk)
        pieces.append(piece)
        if last == len(units):
            return tuple(pieces)
        following, shared = last, 0
        while following > first + 1 and shared < overlap:
            following -= 1
            shared += units[following][2]
        first = following


def _packed(
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    units: Sequence[_Unit],
    first: int,
    chunk: int,
) -> tuple[Piece, int]:
    """The piece of as many units as fit, from `first` on, and the number of the next one."""
    last, taken = first, 0
    while last < len(units) and (last == first or taken + units[last][2] <= chunk):
        taken += units[last][2]
        last += 1
    while True:  # tokens of a whole may be more than those of its parts
        text = document[units[first][0] : units[last - 1][1]]
        start = units[first][0] + len(text) - len(text.lstrip())
        text = text.strip()
        ids = encode(tokenizer, text)
        if len(ids) <= chunk:
            return Piece(start, start + len(text), ids), last
        if last == first + 1:
            raise DataError(
                f"chunk={chunk} tokens is too small: a single character takes {len(ids)} tokens "
                "of this tokenizer. Pass a larger chunk."
            )
        last -= 1


def _splitter(tokenizer: PreTrainedTokenizerBase, size: int) -> TextSplitter:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python

        def count(text: str) -> int:
            return len(encode(tokenizer, text))

        return TextSplitter.from_callback(count, size, trim=False)
    counting = copy.deepcopy(backend)
    counting.no_truncation()
    counting.no_padding()
    return TextSplitter.from_huggingface_tokenizer(counting, size, trim=False)
