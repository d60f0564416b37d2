"""Copies of sentences and texts are found, and a review comes back with its decisions."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from longctx.errors import DataError, RunError
from longctx.generation.postfilter import (
    drop_repeated_sentences,
    mark,
    read_review,
    same_texts,
    write_review,
)

WORDS = (
    *("the", "grass", "is", "green", "while", "rivers", "run", "down"),
    *("from", "every", "mountain", "that", "stands"),
)


def test_near_copies_are_left_out_and_nothing_else() -> None:
    text = "The sky is blue today. A dog barks!\nThe sky is blue, today. Yes. Yes. The cat sleeps."
    found = drop_repeated_sentences(text)
    assert found.dropped == ("The sky is blue, today.",)
    assert found.text == "The sky is blue today. A dog barks!\nYes. Yes. The cat sleeps."


def test_of_500_sentences_the_100_copies_are_found() -> None:
    rng = Random(0)
    own = [" ".join(rng.choices(WORDS, k=9)).capitalize() + f" {n}." for n in range(400)]
    copies = [sentence.replace("s ", " ", 1) for sentence in rng.sample(own, 100)]
    found = drop_repeated_sentences(" ".join(own + copies), threshold=90)
    assert set(found.dropped) >= set(copies)


@pytest.mark.parametrize("text", ["", "no end", "Dr. Who? (Yes!) “So.” Then…\n\n\nLast", "。！？"])
def test_a_text_without_copies_stays_as_it_is(text: str) -> None:
    assert drop_repeated_sentences(text).text == text


def test_sentences_of_scripts_without_spaces_are_compared() -> None:
    found = drop_repeated_sentences("天空是蓝色的。草是绿色的！天空是蓝色的。「好。」他说。")
    assert found.dropped == ("天空是蓝色的。",)
    assert found.text == "天空是蓝色的。草是绿色的！「好。」他说。"


def test_the_same_answer_to_several_prompts() -> None:
    texts = ["I am a model.", "Paris", "i am a model", "", "Rome", " "]
    assert same_texts(texts) == ((0, 2), (3, 5))
    assert same_texts(["one"]) == ()


def test_what_is_marked_and_why() -> None:
    loop = "The same thing again here. " * 4
    marks = mark(["Fine.", loop, "", "Twin answer here", "twin answer, here"])
    assert marks.reasons[0] == ()
    assert marks.reasons[1] == ("repeats itself",)
    assert marks.counts == {
        "repeats itself": 1,
        "empty": 1,
        "the same for several prompts": 2,
    }
    assert marks.unmarked == (0,)


def test_a_review_keeps_its_decisions(tmp_path: Path) -> None:
    path, prompts, texts = (
        tmp_path / "review.jsonl",
        ["a", ["b"], "\u2028c\x85\ud800"],
        ["", "Fine.", " "],
    )
    marks = mark(texts)
    assert write_review(path, prompts, texts, marks) == 2
    with pytest.raises(DataError, match="2 of 2 rows are not decided, the first is row 0"):
        read_review(path, prompts, texts)
    lines = [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    lines[0]["decision"] = "drop"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert write_review(path, prompts, texts, marks) == 1
    path.write_text(path.read_text().replace("null", '"keep"'))
    assert read_review(path, prompts, texts) == (1, 2)
    with pytest.raises(DataError, match="row 0 of other texts"):
        read_review(path, prompts, ["other", *texts[1:]])


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"row": 1}', "3", '{"row": 0, "decision": "perhaps"}']
)
def test_a_damaged_review_is_refused_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "review.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=r"review\.jsonl:1"):
        read_review(path, ["a"], ["b"])


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="threshold=0"):
        same_texts(["a", "b"], threshold=0)
    with pytest.raises(DataError, match="least=0"):
        drop_repeated_sentences("a", least=0)
    with pytest.raises(DataError, match="repeated=2"):
        mark(["a"], repeated=2)
    with pytest.raises(DataError, match="repeated='x'"):
        mark(["a"], repeated="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="expected a list of texts"):
        same_texts("one text")
    with pytest.raises(DataError, match="expected a list of texts"):
        drop_repeated_sentences(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="1 prompts, 2 texts"):
        write_review(tmp_path / "r", ["a"], ["a", "b"], mark(["a", "b"]))
    with pytest.raises(RunError):
        write_review(tmp_path, ["a"], [""], mark([""]))
