"""Roles, texts and weights as data sets write them."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from longctx.train.data.turns import BadRecordError, Turn, read_text, read_turn


def read(**fields: Any) -> Turn:
    return read_turn({"role": "assistant", "content": "Hi"} | fields, "role", "content", "turn 1")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("developer", "system"),
        ("model", "assistant"),
        ("ipython", "tool"),
        ("function", "tool"),
        ("observation", "tool"),
        ("Tool", "tool"),
    ],
)
def test_roles(name: str, role: str) -> None:
    assert read(role=name).role == role


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_weight"])
def test_weights_say_what_is_learnt(key: str) -> None:
    for value, learnt in ((0, False), (False, False), (0.0, False), (1, True), (True, True)):
        assert read(**{key: value}) == Turn("assistant", "Hi", learnt)
    assert read(**{key: None}).learnt
    for value in (0.5, "no", float("nan"), [1]):
        with pytest.raises(BadRecordError, match=f"has '{key}' of .*expected 0 or 1"):
            read(**{key: value})


def test_a_question_that_is_to_be_learnt_is_told_of() -> None:
    assert read(role="user", weight=1).extra == {"weight": 1}
    assert read(role="user", weight=0).extra == {}


@pytest.mark.parametrize("key", ["train_detail", "mask"])
def test_what_marks_parts_is_refused_by_name(key: str) -> None:
    with pytest.raises(BadRecordError, match=f"has '{key}', which marks parts"):
        read(**{key: [{"begin_offset": 0}]})


def test_what_a_template_may_use_is_kept() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turn = read(
        content=None, tool_calls=[call], name="", reasoning_content="Hm", extra=float("nan")
    )
    decoded = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert turn.message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [decoded],
        "reasoning_content": "Hm",
    }
    old = read(content=None, function_call={"name": "f", "arguments": '{"a": 1}'})
    spoken = read_turn(
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": 1}})},
        "from", "value", "",
    )  # fmt: skip
    assert old.extra == spoken.extra == {"tool_calls": [decoded]}
    assert spoken.text == ""


def test_texts_of_content_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_text(parts, "") == "ab"
    for part in ({"type": "image_url", "image_url": "x"}, {"type": "image"}, "a"):
        with pytest.raises(BadRecordError, match="and only text is learnt"):
            read_text([part], "turn 1")
    with pytest.raises(BadRecordError, match="has 'images', and only text"):
        read(images=["a.png"])


@pytest.mark.parametrize(
    "value",
    [float("nan"), 9**999, "\ud800", [[[]]] * 2, {"a": {"b": {"c": {"d": "e" * 99}}}}, 0.5],
    ids=["nan", "huge", "surrogate", "lists", "objects", "half"],
)
@pytest.mark.parametrize("field", ["role", "content", "weight", "loss"])
def test_any_value_in_any_place_is_a_short_message(field: str, value: Any) -> None:
    with pytest.raises(BadRecordError) as raised:
        read(**{field: value})
    assert len(str(raised.value)) < 500


def test_fields_too_deep_or_without_text_are_refused() -> None:
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(BadRecordError, match="nested more than 100 deep"):
        read(meta=deep)
    with pytest.raises(BadRecordError, match="cannot be written as JSON text"):
        read(meta="\ud800")


def test_the_error_comes_back_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(BadRecordError("message", "reason")))
    assert (str(error), error.reason) == ("message", "reason")
