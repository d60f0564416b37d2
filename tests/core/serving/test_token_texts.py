"""Texts of single tokens, and where a text that comes in pieces is held back."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import decoders

from longctx.generation.detokenize import TextStream
from longctx.serving.stops import Stops
from longctx.serving.token_texts import TokenTexts

from .small_tokenizers import small_tokenizer


def test_a_token_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = TokenTexts(small_tokenizer("llama"))
    first = [(texts.name(token), texts.size(token)) for token in range(9)]
    monkeypatch.setattr(texts, "_tokenizer", None)
    assert [(texts.name(token), texts.size(token)) for token in range(9)] == first


def test_tokens_of_sentencepiece_keep_their_spaces() -> None:
    tokenizer = _llama_2()
    texts = TokenTexts(tokenizer)
    ids: Any = tokenizer("in the ☃")["input_ids"]
    assert b"".join(map(texts.bytes_of, ids[1:])) == " in the ☃".encode()
    assert texts.name(ids[-1]) == "bytes:\\x83"
    assert texts.size(ids[0]) == 0


def _llama_2() -> Any:
    """SentencePiece whose decoder strips the first space, as Llama-2's and Mistral's do."""
    tokenizer: Any = small_tokenizer("llama")
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(content=" ", left=1)
    steps = [replace, decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer._tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def test_a_continuation_goes_on_with_the_space_that_belongs_there() -> None:
    tokenizer = _llama_2()
    ids: Any = tokenizer("in the ☃")["input_ids"]
    for cut, wanted in ((2, " the ☃"), (len(ids) - 1, "\ufffd")):  # the second inside a character
        pieces: list[str] = []
        stream = TextStream(tokenizer, pieces.append, behind=ids[:cut])
        for count in range(1, len(ids) - cut + 1):
            stream.show(ids[cut : cut + count], last=cut + count == len(ids))
        assert "".join(pieces) == wanted


def test_stops_hold_back_what_may_begin_one() -> None:
    stops = Stops(["END", "DO"])
    assert [stops.add(text) for text in ("one E", "N", "ED D", "x")] == ["one ", "", "ENED ", "Dx"]
    assert [stops.add("a D"), stops.rest(), stops.add("O")] == ["a ", "D", ""]
    plain = Stops(())
    assert plain.add("all") == "all"
    assert plain.rest() == ""
