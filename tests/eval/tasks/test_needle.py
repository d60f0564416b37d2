"""Needles of the user in real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longctx.errors import DataError
from longctx.eval import Needle

from ..conftest import byte_tokenizer
from ..retrieval_tasks import check_properties, check_too_short, prompts_of, shared, text_of

CODES: dict[str, Any] = {
    "needle": ("The code of the safe is 7-2-9.", "Nobody knows where the key is."),
    "question": ("What is the code of the safe?", "Where is the key?"),
    "answer": ("7-2-9", "unknown"),
}


def test_properties(texts: tuple[str, ...]) -> None:
    task = Needle(samples=4, depths=2, text=texts)
    check_properties(task, 900)
    check_too_short(task)


def test_a_reader_can_answer(texts: tuple[str, ...]) -> None:
    first, *_, last = prompts_of(Needle(samples=3, text=texts), 900)
    text = text_of(first)
    assert text.startswith("Read the following text carefully.")
    assert text.count("The best thing to do in San Francisco is eat a sandwich and") == 2
    assert text.endswith(
        "\nWhat is the best thing to do in San Francisco? The best thing to do in San Francisco is "
        "eat a sandwich and sit in Dolores Park on a sunny day"
    )
    assert (first.depth, last.depth) == (0, 1)
    assert shared(first, last) == first.needle_starts[0]


def test_needles_take_turns_and_each_comes_to_each_depth(texts: tuple[str, ...]) -> None:
    task = Needle(samples=8, depths=2, text=texts, **CODES)
    prompts = prompts_of(task, 700)
    assert {(p.key, round(p.depth)) for p in prompts} == {
        ("7-2-9", 0),
        ("7-2-9", 1),
        ("unknown", 0),
        ("unknown", 1),
    }
    for prompt in prompts:
        prefix = "The code of the safe is" if prompt.key == "7-2-9" else "The answer is"
        assert text_of(prompt).endswith(f"? {prefix} {prompt.key}")
    (note,) = task.plan(byte_tokenizer(), (700,), length_invariant=True).notes
    assert note.startswith("needle: the answer 'unknown' is not part of its needle 'Nobody knows")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"haystack": "grass"}, "haystack='grass': this task's needles are hidden in real text"),
        ({"answer": ()}, "1 needles, 1 questions and 0 answers: expected one question and one"),
        ({"needle": (), "question": (), "answer": ()}, "0 needles"),
        ({"answer": (" a ",)}, "answer=' a ': expected a line of text without spaces around"),
        ({"question": ("",)}, "question='': expected a line of text"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Needle(**settings)


def test_haystacks_that_do_not_fit(tmp_path: Path, texts: tuple[str, ...]) -> None:
    def plan(path: Path, lengths: tuple[int, ...] = (900,), **settings: Any) -> None:
        task = Needle(text=(str(path),), **settings)
        task.plan(byte_tokenizer(), lengths, length_invariant=True)

    (tmp_path / "empty").write_text(" ")
    with pytest.raises(DataError, match="is empty"):
        plan(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"a\0b")
    with pytest.raises(DataError, match="is binary"):
        plan(tmp_path / "binary")
    (tmp_path / "short").write_text("A line.\n")
    with pytest.raises(DataError, match="has 8 tokens, the prompt needs"):
        plan(tmp_path / "short")
    long: dict[str, Any] = {"needle": ("x" * 2000,), "question": ("What?",), "answer": ("y",)}
    with pytest.raises(DataError, match="length=900 is too short"):
        plan(Path(texts[0]), **long)
