"""Schemas, roles, and what is left of a conversation once it is tidied."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest

from longctx.errors import DataError
from longctx.train.data.conversations import (
    REASONS,
    Turn,
    parse,
    read_record,
    schema_of,
    tidy,
)
from longctx.train.data.turns import BadRecordError

NAMES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def said(letters: str) -> list[Turn]:
    """A turn for each letter; a capital one is blank, a "!" makes the turn before it special."""
    found: list[Turn] = []
    for letter in letters:
        if letter == "!":
            found[-1] = Turn(found[-1].role, "before <|end|> after")
        else:
            role: Any = NAMES[letter.lower()]
            found.append(Turn(role, " \n" if letter.isupper() else f"{letter}{len(found)}"))
    return found


@pytest.mark.parametrize(
    ("record", "roles"),
    [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            ["user", "assistant"],
        ),
        (
            {
                "id": 7,
                "conversations": [{"from": w, "value": "a"} for w in ("user", "bing", "Bard")],
            },
            ["user", "assistant", "assistant"],
        ),
        (
            {"conversations": [{"from": w, "value": "a"} for w in ("system", "Human", "chatgpt")]},
            ["system", "user", "assistant"],
        ),
        (
            {"messages": [{"role": w, "content": "a"} for w in ("system", "user", "assistant")]},
            ["system", "user", "assistant"],
        ),
        ({"conversations": [{"role": "user", "content": "a"}], "text": "also"}, ["user"]),
        ({"text": "once upon a time"}, ["document"]),
    ],
)
def test_schemas_and_spellings(record: dict[str, Any], roles: list[str]) -> None:
    schema = schema_of(record, "r")
    assert schema
    assert [turn.role for turn in parse(record, schema, "r")] == roles


def test_more_schemas_and_what_they_leave_unused() -> None:
    def read(**record: Any) -> tuple[list[tuple[str, str, bool]], tuple[str, ...]]:
        schema = schema_of(record, "r")
        assert schema
        found = read_record(record, schema, "r")
        return [(turn.role[0], turn.text, turn.learnt) for turn in found.turns], found.unused

    ask, say = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    exchange = [("u", "q", False), ("a", "a", True)]
    assert read(prompt="q", completion="a", id=3) == (exchange, ("id",))
    assert read(prompt=[ask], completion=[say]) == (exchange, ())
    earlier = [("u", "q", False), ("a", "a", False)]
    assert read(prompt=[ask, say, ask], completion="a") == (earlier + exchange, ())
    whole = [("u", "q", True), ("a", "a", True)]
    assert read(prompt="q", chosen=[ask, say], rejected=[ask]) == (whole, ("rejected",))
    assert read(instruction="q", input="about", output="a", text="x", history=[["q", "a"]]) == (
        [*whole, ("u", "q\nabout", False), ("a", "a", True)],
        ("text",),
    )
    assert read(instruction="q", input="", output="a", system="s") == (
        [("s", "s", True), *exchange],
        (),
    )
    assert read(messages=[ask, say], system="s", tools=None)[0] == [("s", "s", True), *whole]
    spoken = {"role": "system", "content": "own"}
    assert read(messages=[spoken, ask, say], system="s")[1] == ("system",)
    assert read(messages=[ask, say], weight=0)[0] == [(r, t, False) for r, t, _ in whole]
    assert read(messages=[ask, say], weight=0.3, mask="User") == (whole, ("weight",))
    assert read(contents=[{"role": "user", "parts": [{"text": "q"}]}])[0] == whole[:1]


def test_tools_and_settings_of_the_template() -> None:
    tool = {"name": "f"}
    turns = {"messages": [{"role": "user", "content": "a"}]}

    def variables(**fields: Any) -> Any:
        record = {**turns, **fields}
        schema = schema_of(record, "r")
        assert schema
        return json.loads(read_record(record, schema, "r").variables or "null")

    assert variables(tools=[tool]) == variables(tools='[{"name": "f"}]') == {"tools": [tool]}
    assert variables(functions=[tool]) == {"tools": [{"type": "function", "function": tool}]}
    kept = {"enable_thinking": False}
    assert variables(chat_template_kwargs=kept) == kept
    assert variables(tools=[]) is None
    for fields in (
        {"tools": "nonsense"},
        {"chat_template_kwargs": {"tokenize": True}},
        {"images": ["a.png"]},
        {"mask": 3},
        {"tools": [{"a": float("nan")}]},
    ):
        with pytest.raises(BadRecordError, match=f"r has .*{next(iter(fields))}|r has fields"):
            variables(**fields)


def test_an_empty_list_tells_no_schema() -> None:
    assert schema_of({"conversations": []}, "r") is None


SHAREGPT = {"conversations": [{"from": "human", "value": "a"}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "one file, one schema"),
        (
            {"conversations": [{"role": "user", "content": "a"}]},
            "turn 1 is .* one file, one schema",
        ),
        ({"prompt": "a"}, "has the fields 'prompt': expected 'conversations'"),
        ({"conversations": "a"}, "is 'a', expected a list of turns"),
        ({"conversations": [{"from": "asistant", "value": "a"}]}, "did you mean 'assistant'"),
        (
            {"conversations": [{"from": "judge", "value": "a"}]},
            "role 'judge', known are human, user",
        ),
        ({"conversations": [{"from": "gpt", "value": None}]}, "turn 1 is None, expected text"),
        ({"conversations": [{"from": "gpt", "value": "x\ud83d"}]}, "half a surrogate pair"),
    ],
)
def test_refusals_name_the_record(record: dict[str, Any], message: str) -> None:
    schema = schema_of(SHAREGPT, "r")
    assert schema
    with pytest.raises(DataError, match=f"^chats.json, record 3.*{message}"):
        parse(record, schema, "chats.json, record 3")


def test_an_unknown_record_is_refused() -> None:
    with pytest.raises(DataError, match="record 1 has the fields 'data'"):
        schema_of({"data": []}, "record 1")


@pytest.mark.parametrize(
    ("letters", "kept", "left_out"),
    [
        ("uaua", [0, 1, 2, 3], {}),
        ("suaua", [0, 1, 2, 3, 4], {}),
        ("aua", [1, 2], {"leading": [0]}),
        ("aaua", [2, 3], {"leading": [0, 1]}),
        ("uau", [0, 1], {"unanswered": [2]}),
        ("uuaua", [1, 2, 3, 4], {"unanswered": [0]}),
        ("uaaua", [0, 1, 3, 4], {"out_of_order": [2]}),
        ("uasua", [0, 1, 3, 4], {"misplaced_system": [2]}),
        ("ususa", [], {"unanswered": [0, 2], "misplaced_system": [1, 3], "out_of_order": [4]}),
        ("Uaua", [2, 3], {"blank": [0, 1]}),
        ("uAua", [2, 3], {"blank": [0, 1]}),
        ("Sua", [1, 2], {"blank": [0]}),
        ("ua!ua", [2, 3], {"special": [0, 1]}),
        ("u!aua", [2, 3], {"special": [0, 1]}),
        ("uta", [], {"unanswered": [0], "stray_tool": [1], "out_of_order": [2]}),
        ("uatata", [0, 1, 2, 3, 4, 5], {}),
        ("uatt", [0, 1], {"stray_tool": [2, 3]}),
        ("uata" + "ua", [0, 1, 2, 3, 4, 5], {}),
        ("tua", [1, 2], {"stray_tool": [0]}),
        ("uaTa", [0, 1, 2, 3], {}),
        ("uatA", [], {"blank": [0, 1, 2, 3]}),
        ("s", [], {}),
        ("uu", [], {"unanswered": [0, 1]}),
        ("a", [], {"leading": [0]}),
        ("", [], {}),
    ],
)
def test_tidy(letters: str, kept: list[int], left_out: dict[str, list[int]]) -> None:
    turns = said(letters)
    tidied = tidy(turns, special=re.compile(r"<\|end\|>"))
    assert list(tidied.turns) == [turns[index] for index in kept]
    found: dict[str, list[int]] = {}
    for reason, index in tidied.left_out:
        found.setdefault(reason, []).append(index)
    assert found == left_out
    assert found.keys() <= REASONS.keys()


def test_every_answer_follows_its_question_and_every_turn_is_accounted_for() -> None:
    rng = Random(0)
    for _ in range(500):
        turns = said("".join(rng.choice("suaUA") for _ in range(rng.randrange(9))))
        tidied = tidy(turns)
        answers = [
            i for i, turn in enumerate(turns) if turn in tidied.turns and turn.role[0] == "a"
        ]
        assert all(turns[i - 1].role == "user" and turns[i - 1] in tidied.turns for i in answers)
        left = {index for _, index in tidied.left_out}
        if tidied.turns:
            assert len(left) + len(tidied.turns) == len(turns)
            roles = [turn.role for turn in tidied.turns if turn.role != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
