"""Haystacks in token ids: the breaks, the endless repetition, the places of needles."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longctx.errors import DataError
from longctx.prompts.haystacks import Grass, Straw, Texts, decode, encode, held_out, tokenise


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


BYTES = byte_tokenizer()


def test_breaks_are_where_lines_and_sentences_begin() -> None:
    text = "One, 1.5 of two. Three! four?\nfive\n\nsix. "
    straw = tokenise(BYTES, Texts((text,)))
    before = [text[i - 2 : i] for i in straw.breaks]
    assert before == ["o.", "e!", "r?", "?\n", "e\n", "\n\n", "x."]
    assert [text[i:].split("\n")[0] for i in straw.lines] == [
        "One, 1.5 of two. Three! four?", "five", "", "six. ",
    ]  # fmt: skip


def test_grass_goes_on_as_its_tokenised_repetition() -> None:
    straw = tokenise(BYTES, Grass())
    long = " ".join([Grass().line] * 30)
    for size in (10, 89, 90, 178, 179, 180, 1000):
        assert decode(BYTES, straw.span(0, size)) == long[:size]
    places = straw.places(0, 1000, [i / 40 for i in range(40)])
    assert len(set(places)) == 40
    assert all(p in (0, 1000) or (long[p - 1], long[p]) == (".", " ") for p in places)


def test_places_are_the_nearest_free_ones() -> None:
    straw = Straw(ids=tuple(range(100)), breaks=(10, 40, 90), lines=(0, 40), period=0)
    assert straw.places(0, 100, [0.0, 0.12, 0.8, 0.81, 1.0]) == [0, 10, 90, 100, 40]
    assert straw.places(10, 50, [0.5]) == [30]
    assert [straw.at_line(10, place) for place in (0, 30, 31)] == [True, True, False]
    assert straw.places(11, 20, [0.5, 0.5, 0.5]) == [10, 9, 11]  # no break: any token will do
    with pytest.raises(DataError, match="1 tokens has no places for 3 needles"):
        straw.places(0, 1, [0.1, 0.2, 0.3])


def test_a_text_begins_at_a_line_and_fits() -> None:
    text = "\n".join(f"line {i}" for i in range(300))
    haystack = Texts((text,), name="lines")
    straw = tokenise(BYTES, haystack)
    starts = {straw.start(2000, "lines", seed) for seed in range(100)}
    assert len(starts) > 20
    for start in starts:
        assert text[start:].startswith("line ")
        assert len(straw.span(start, 2000)) == 2000
    assert straw.start(len(text), "lines", 3) == 0
    with pytest.raises(
        DataError, match=f"has {len(text)} tokens, the prompt needs {len(text) + 1}"
    ):
        straw.start(len(text) + 1, "lines", 3)


def test_grass_must_end_in_a_sentence() -> None:
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "bĠ": 3}, merges=[("b", "Ġ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    joining = PreTrainedTokenizerFast(tokenizer_object=core)
    assert encode(joining, "ab ab") == (0, 3, 0, 1)
    with pytest.raises(DataError, match=r"joins the end of 'ab' with its repetition"):
        tokenise(joining, Grass(line="ab"))


def test_held_out_text_is_there() -> None:
    texts = held_out()
    assert len(texts.documents) == 10
    assert sum(map(len, texts.documents)) > 750_000
    assert all(document.strip() and "\x00" not in document for document in texts.documents)
