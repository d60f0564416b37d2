"""Synthetic conversations: answerable by looking back, disjoint from evaluation, reproducible."""

from __future__ import annotations

import json
import lzma
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import DataError
from longctx.prompts.passkey_prompts import split_of
from longctx.train.data.synthetic import Synthetic, Write, conversations

TOPIC = r"the [a-z ]+? of [a-z ]+?"


def exchanges(record: dict[str, Any]) -> list[tuple[str, str]]:
    said = record["conversations"]
    assert [turn["from"] for turn in said] == ["human", "gpt"] * (len(said) // 2)
    return [(said[i]["value"], said[i + 1]["value"]) for i in range(0, len(said), 2)]


def test_lines_answer_from_the_list() -> None:
    for record in conversations(20, seed=3, settings=Synthetic(kinds=("lines",))):
        first, *more = exchanges(record)
        lines = dict(re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d{5})>$", first[0], re.M))
        assert len(lines) == first[0].count("\nline ")
        for question, answer in [(first[0].splitlines()[-1], first[1]), *more]:
            (name,) = re.findall(r"in line (\S+)\?", question)
            assert answer == f"The REGISTER_CONTENT in line {name} is <{lines[name]}>."
        assert {split_of(word) for pair in lines.items() for word in pair} == {"train"}


def test_topics_answer_from_what_was_discussed() -> None:
    kinds: set[str] = set()
    for record in conversations(20, seed=4, settings=Synthetic(kinds=("topics",), questions=4)):
        said = exchanges(record)
        topics = [re.search(rf"({TOPIC})[.?]", asked) for asked, _ in said[:-4]]
        names = [found.group(1) for found in topics if found]
        assert len(names) == len(set(names)) == len(said) - 4
        assert {split_of(name) for name in names} == {"train"}
        for question, answer in said[-4:]:
            if "first" in question:
                assert answer == f"The first topic was {names[0]}."
                kinds.add("first")
                continue
            (before,) = re.findall(rf"directly after ({TOPIC})\?", question)
            after = names[names.index(before) + 1]
            assert answer == f"After {before} we discussed {after}."
            kinds.add("after")
    assert kinds == {"first", "after"}


def test_the_splits_share_no_answer() -> None:
    found: dict[str, set[str]] = {}
    for split in ("train", "eval"):
        settings = Synthetic(split=split, longest=9_000)
        text = json.dumps(list(conversations(40, settings=settings)))
        found[split] = set(re.findall(r"<\d{5}>|line \S+-\S+:", text))
        found[split] |= set(re.findall(rf"discussed ({TOPIC})\.", text))
    assert min(len(names) for names in found.values()) > 100
    assert not found["train"] & found["eval"]


def test_lengths_are_as_measured() -> None:
    def tokens(text: str) -> int:
        return len(text.split())

    settings = Synthetic(shortest=300, longest=1_500)
    lengths = [
        sum(tokens(turn["value"]) for turn in record["conversations"])
        for record in conversations(60, settings=settings, measure=tokens)
    ]
    assert max(lengths) <= 1_500
    assert min(lengths) >= 150  # the last exchange that does not fit is left out
    assert max(lengths) > 1_000


def test_seeds_and_counts() -> None:
    ten = list(conversations(10, seed=5))
    assert ten == list(conversations(20, seed=5))[:10]
    assert ten != list(conversations(10, seed=6))
    assert [record["id"] for record in ten[:3]] == ["topics-5-0", "lines-5-1", "topics-5-2"]


def test_the_sample_set_is_what_its_command_writes(tmp_path: Path) -> None:
    shipped = (files("longctx.train") / "sample.jsonl.xz").read_bytes()
    assert len(shipped) < 150_000
    # python -m longctx.train.data.synthetic train/sample.jsonl.xz --count 200 --shortest 1500 …
    out = tmp_path / "sample.jsonl"
    Write(out, count=200, settings=Synthetic(shortest=1_500, longest=24_000)).run()
    assert out.read_bytes() == lzma.decompress(shipped)
    Write(tmp_path / "a.jsonl.xz", count=2).run()
    assert len(lzma.decompress((tmp_path / "a.jsonl.xz").read_bytes()).splitlines()) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ("topic",)}, "kinds=.*pass some of topics, lines"),
        ({"shortest": 9, "longest": 8}, "shortest=9, longest=8"),
        ({"questions": 0}, "questions=0"),
        ({"split": "test"}, "split='test' is not a key space"),
        ({"shortest": 200, "longest": 300}, "holds no two topics"),
        ({"kinds": ("lines",), "shortest": 500, "longest": 600}, "holds no two lines"),
        ({"kinds": ("lines",), "shortest": 10**6, "longest": 10**6}, "more lines than the"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(conversations(1, settings=Synthetic(**settings)))
