"""Lengths at which lm-eval's own generators would never end, with stand-ins for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from longctx.errors import RunError
from longctx.eval import harness_lengths
from longctx.eval.harness_lengths import refuse_endless

from .conftest import byte_tokenizer


def stand_in(example: int = 100) -> Any:
    """Generators of vt, cwe and fwe: a prompt of vt has 200 tokens and an answer of 13."""

    def made(size: int, other: int, hops: int = 0, *, is_icl: bool = False) -> Any:
        if not hops:  # cwe, whose example and prompt grow at 4,096 tokens
            return "e" * 300, "t" * (1000 if other >= 4096 else 100), ["a", "b"]
        return ("e" * example if is_icl else "t" * 20 * size), ["AB", "CD"]

    return SimpleNamespace(generate_input_output=made, TEMPLATE="t" * 70)


@pytest.mark.parametrize(
    ("task", "least"), [("ruler_vt", 744), ("ruler_cwe", 532), ("ruler_fwe", 121)]
)
def test_the_least_length_is_named(task: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_lengths, "_copy_of", lambda _: stand_in())
    refuse_endless([task], [least, 8192], byte_tokenizer())
    with pytest.raises(RunError, match=f"{task} fits no prompt into {least - 1} .* has {least}"):
        refuse_endless(["words", task], [8192, least - 1], byte_tokenizer())
    with pytest.raises(RunError, match="fits no prompt"):
        refuse_endless(["ruler"], [100], byte_tokenizer())


def test_an_example_that_never_fits_is_told_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_lengths, "_copy_of", lambda _: stand_in(example=480))
    with pytest.raises(RunError, match=r"fits no example into its 500 tokens .* has 511"):
        refuse_endless(["ruler_vt"], [8192], byte_tokenizer())


def test_other_tasks_and_a_missing_harness_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(harness_lengths, "_copy_of", missing)
    refuse_endless(["ruler", "niah_single_1"], [1], byte_tokenizer())
