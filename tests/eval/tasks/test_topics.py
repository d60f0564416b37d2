"""LongEval's topics: generated ones."""

from __future__ import annotations

import re

import pytest

from longctx.errors import DataError
from longctx.eval import Topics
from longctx.prompts.passkey_prompts import split_of

from ..retrieval_tasks import check_properties, check_too_short, prompts_of, text_of


def test_properties() -> None:
    check_properties(Topics(samples=4), 2500)
    check_too_short(Topics())


def test_a_reader_can_answer() -> None:
    prompts = prompts_of(Topics(samples=4), 6000)
    assert len({prompt.key for prompt in prompts}) == 4
    for prompt in prompts:
        record, _, question = text_of(prompt).partition("\n\nNow the record ends.")
        topics = re.findall(r"^USER: I would like to discuss the topic of (.*)\.$", record, re.M)
        assert topics[0] == prompt.key
        assert len(topics) > 3
        assert len(set(topics)) == len(topics)
        assert {split_of(topic) for topic in topics} == {"eval"}
        turns = record.split("\n")[1:]
        assert [turn.split()[0] for turn in turns[::2]] == ["USER:"] * (len(turns) // 2)
        assert all(turn.endswith((".", "?")) for turn in turns), "no turn is cut"
        assert question.endswith(f"'I would like to discuss the topic of {prompt.key}")
        assert prompt.depth == 0


@pytest.mark.parametrize("length", range(1700, 1760, 7))
def test_any_length(length: int) -> None:
    assert {len(p.input_ids) for p in prompts_of(Topics(samples=2), length)} == {length}


def test_more_topics_than_there_are() -> None:
    with pytest.raises(DataError, match=r"asks for more than the \d+ topics there are"):
        prompts_of(Topics(samples=1), 2 * 10**6)


def test_the_rule_is_said() -> None:
    for task in (Topics(), Topics(file="cases.jsonl")):
        assert "a prefix that LongEval itself does not give" in task.estimand
        assert "another model judges a free answer" in task.estimand
    assert "published prompts" in Topics(file="cases.jsonl").estimand
