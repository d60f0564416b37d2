"""Pieces hold all of a document, no more tokens than asked for, and share what they should."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longctx
from longctx.errors import DataError
from longctx.prompts.haystacks import encode
from longctx.reading.pieces import split

TEXT = "One two three. Four five six seven!\n\nEight nine ten eleven twelve. Thirteen." * 20


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return longctx.load("demo")[1]


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.integers(12, 60), st.floats(0, 0.9))
def test_pieces_hold_all_of_any_text(tokenizer: Any, text: str, chunk: int, share: float) -> None:
    pieces = split(tokenizer, text, chunk, int(chunk * share))
    held = {place for piece in pieces for place in range(piece.start, piece.stop)}
    assert all(place in held or not text[place].strip() for place in range(len(text)))
    for piece in pieces:
        assert piece.ids == encode(tokenizer, text[piece.start : piece.stop])
        assert 0 < len(piece.ids) <= chunk


def test_what_is_no_longer_than_the_overlap_stands_whole_in_a_piece(tokenizer: Any) -> None:
    pieces = split(tokenizer, TEXT, 60, 20)
    for start in range(len(TEXT)):
        stop = start
        while stop < len(TEXT) and len(encode(tokenizer, TEXT[start : stop + 1])) <= 14:
            stop += 1  # below the overlap: a stretch cut out by itself may have fewer tokens
        sought = TEXT[start:stop].strip()
        assert any(sought in TEXT[piece.start : piece.stop] for piece in pieces)


def test_cuts_are_at_ends_of_sentences(tokenizer: Any) -> None:
    for piece in split(tokenizer, TEXT, 90, 0):
        assert TEXT[piece.start : piece.stop][-1] in ".!"


def test_a_short_document_is_one_piece(tokenizer: Any) -> None:
    (piece,) = split(tokenizer, "  One two.\n", 50, 10)
    assert (piece.start, piece.stop) == (2, 10)


@pytest.mark.parametrize(
    ("document", "chunk", "overlap", "found"),
    [
        (" \n", 10, 2, "empty"),
        ("One two", 10, 10, "overlap=10, chunk=10"),
        ("One two", 10, -1, "overlap=-1"),
        ("𒐫" * 9, 1, 0, "too small"),
    ],
)
def test_bad_input(tokenizer: Any, document: str, chunk: int, overlap: int, found: str) -> None:
    with pytest.raises(DataError, match=found):
        split(tokenizer, document, chunk, overlap)
