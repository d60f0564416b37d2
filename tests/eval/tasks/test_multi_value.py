"""One key with several values, all asked for in the order of the text."""

from __future__ import annotations

import re
from typing import Any

import pytest

from longctx.errors import DataError
from longctx.eval import MultiValue
from longctx.prompts.passkey_prompts import split_of

from ..retrieval_tasks import check_properties, check_too_short, prompts_of, text_of


def test_properties(texts: tuple[str, ...]) -> None:
    task = MultiValue(samples=4, depths=2, text=texts)
    check_properties(task, 1500)
    check_too_short(task)


@pytest.mark.parametrize(
    ("length", "golden"),
    [(1500, "4169461, 4580389, and 4705163"), (800, "1596084, 1705615, and 8081351")],
)
def test_values_are_asked_for_in_the_order_of_the_text(length: int, golden: str) -> None:
    prompts = prompts_of(MultiValue(samples=10, haystack="grass", values=3), length)
    assert prompts[0].key == golden, "golden: recorded results hang on it"
    for prompt in prompts:
        text = text_of(prompt)
        hidden = re.findall(r"\nOne of the special magic numbers for [a-z-]+ is: (\d+)\.\n", text)
        assert prompt.key == f"{hidden[0]}, {hidden[1]}, and {hidden[2]}"
        assert list(prompt.needle_starts) == sorted(prompt.needle_starts)
        assert {split_of(value) for value in hidden} == {"eval"}
        assert text.endswith(f", in order, are {prompt.key}")
    assert prompts[0].depth == 0
    assert prompts[-1].depth > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"values": 1}, "values=1: pass 2 to 100"), ({"digits": 4}, "digits=4: pass 5 to 18")],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MultiValue(**settings)
