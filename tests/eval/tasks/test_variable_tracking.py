"""Variables that get their value from one another."""

from __future__ import annotations

import re
from typing import Any

import pytest

from longctx.errors import DataError
from longctx.eval import VariableTracking
from longctx.prompts.passkey_prompts import split_of

from ..retrieval_tasks import check_properties, check_too_short, prompts_of, text_of


def test_properties(texts: tuple[str, ...]) -> None:
    task = VariableTracking(samples=4, depths=2, hops=3, text=texts)
    check_properties(task, 1200)
    check_too_short(task)


@pytest.mark.parametrize("chains", [1, 2])
def test_a_reader_can_follow(chains: int) -> None:
    task = VariableTracking(samples=6, haystack="grass", hops=3, chains=chains)
    prompts = prompts_of(task, 1300)
    assert prompts[0].key.startswith("FBHGU, VAR OKNLH, VAR LOSBZ"), (
        "golden: recorded results hang on it"
    )
    for prompt in prompts:
        text = text_of(prompt)
        value = text.partition("that are assigned the value ")[2].partition(" ")[0]
        held: list[str] = []
        for name, content in re.findall(r"\nVAR ([A-Z]{5}) = (?:VAR )?(\w+)\n", text):
            if content == value or content in held:
                held.append(name)
        assert re.findall("[A-Z]{5}", prompt.key) == held, "one reading, from the top, finds all"
        assert len(held) == 4
        assert text.endswith(f"VAR {held[0]}, VAR {held[1]}, VAR {held[2]}, and VAR {held[3]}")
        assert {split_of(name) for name in held} == {"eval"}
        assert len(prompt.needle_starts) == 4 * chains
    assert prompts[0].depth == 0
    assert prompts[-1].depth > 0.9


def test_settings_out_of_range() -> None:
    settings: Any
    for settings in ({"hops": 0}, {"chains": 0}, {"hops": 101}):
        with pytest.raises(DataError, match="pass 1 to 100 of each"):
            VariableTracking(**settings)
