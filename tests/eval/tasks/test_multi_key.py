"""Several keys, of which one is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from longctx.errors import DataError
from longctx.eval import MultiKey
from longctx.prompts.passkey_prompts import split_of

from ..retrieval_tasks import check_properties, check_too_short, prompts_of, shared, text_of


@pytest.mark.parametrize("values", ["numbers", "words"])
def test_properties(values: Any, texts: tuple[str, ...]) -> None:
    task = MultiKey(samples=4, depths=2, values=values, text=texts)
    check_properties(task, 1500)
    check_too_short(task)


def test_a_reader_can_answer() -> None:
    first, last = prompts_of(MultiKey(samples=2, haystack="grass", keys=3), 1500)
    assert (first.key, last.key) == ("6413127", "3782806"), "golden: recorded results hang on it"
    for prompt in (first, last):
        text = text_of(prompt)
        asked = text.partition("What is the special magic number for ")[2].partition(" ")[0]
        assert f"\nOne of the special magic numbers for {asked} is: {prompt.key}.\n" in text
        assert text.endswith(f"One of the special magic numbers for {asked} is: {prompt.key}")
        assert text.count("One of the special magic numbers for ") == 3 + 1
        assert split_of(asked) == split_of(prompt.key) == "eval"
    assert (first.depth, last.depth) == pytest.approx((0.25, 0.75), abs=0.02)


def test_one_haystack_has_the_same_other_keys() -> None:
    middle, last = prompts_of(MultiKey(samples=10, haystack="grass"), 2000)[2::5]
    first_other = min(middle.needle_starts)
    assert first_other < middle.needle_starts[0]
    assert shared(middle, last) > first_other + 60, "its sentence is the same too"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keys": 1}, "keys=1: pass 2 to 1000"),
        ({"digits": 4}, "digits=4: pass 5 to 18"),
        ({"values": "uuids"}, "values='uuids': expected 'numbers' or 'words'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MultiKey(**settings)
