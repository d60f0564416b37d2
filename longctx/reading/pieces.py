"""A document cut into overlapping pieces of so many tokens, at ends of sentences where it can be.

    for piece in split(tokenizer, document, chunk=180, overlap=48):
        document[piece.start : piece.stop], piece.ids

Cuts are those of `semantic-text-splitter`: paragraphs, then sentences, then words, then characters,
the largest that fit. All but the white space between two pieces is in one of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from semantic_text_splitter import TextSplitter
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..prompts.haystacks import encode

__all__ = ["Piece", "split"]


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
        overlap: tokens that a piece may share with the one before it, at most: whole sentences,
            so fewer than that where they are long. What is sought must fit into it, or a cut can go
            through it.

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
    found = _splitter(tokenizer, chunk, overlap).chunk_indices(document)
    pieces = tuple(
        Piece(start, start + len(text), encode(tokenizer, text)) for start, text in found
    )
    longest = max(len(piece.ids) for piece in pieces)
    if longest > chunk:
        raise DataError(
            f"chunk={chunk} tokens is too small: a single character takes up to {longest} tokens "
            "of this tokenizer. Pass a larger chunk."
        )
    return pieces


def _splitter(tokenizer: PreTrainedTokenizerBase, chunk: int, overlap: int) -> TextSplitter:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python

        def count(text: str) -> int:
            return len(encode(tokenizer, text))

        return TextSplitter.from_callback(count, chunk, overlap)
    counting = copy.deepcopy(backend)
    counting.no_truncation()
    counting.no_padding()
    return TextSplitter.from_huggingface_tokenizer(counting, chunk, overlap)
