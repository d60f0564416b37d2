"""Continuations with shared prefixes and drafts against a loop over whole forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import longctx
from longctx.attention.hook import ATTRIBUTE
from longctx.errors import DataError
from longctx.scoring import continuations, prefix_tree
from longctx.scoring.continuations import continue_prompts

from ...eval.conftest import byte_model

NEW = [9, 5, 9, 1, 7]


@pytest.fixture(autouse=True)
def calls_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that sharing pays at lengths that a test has time for."""
    monkeypatch.setattr(prefix_tree, "CALL", 0)
    monkeypatch.setattr(continuations, "CALL", 0)


def prompts(length: int = 200) -> list[list[int]]:
    """Five of several lengths, of which four share a beginning, and two the most of it."""
    draw = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(3, 259, (length,), generator=draw).tolist()
    return [ids, [*ids[:150], 7, 8, 9], [*ids[:150], 7, 8, 10, 11], [*ids[:60], 3], [5, 6]]


def naive(model: Any, prompt: list[int], count: int) -> list[int]:
    """The argmax of the last logits, again and again, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def drafts(right: list[list[int]]) -> list[list[int]]:
    """All of it, a beginning that goes on wrongly, a wrong one, none, and more than asked for."""
    wrong = [(token + 1) % 259 for token in right[2]]
    return [right[0], [*right[1][:2], 3, 3], wrong, [], [*right[4], 3, 3]]


@pytest.mark.parametrize("method", [None, "yarn:2", "dynamic:2", "sink_window"])
def test_as_greedy_decoding_says(method: str | None) -> None:
    model: Any = byte_model()
    if method:
        longctx.extend(model, method)
    invariant = method != "dynamic:2"
    asked = prompts()
    right = [naive(model, prompt, new) for prompt, new in zip(asked, NEW, strict=True)]
    for given in (None, drafts(right)):
        found = continue_prompts(
            model, asked, new_tokens=NEW, drafts=given, length_invariant=invariant
        )
        if invariant:  # `dynamic` depends on the request's length, which the loop has none of
            assert [list(said or ()) for said in found.token_ids] == right
        assert found.how.startswith("shared" if invariant else "whole prompts (length-dependent")
    if invariant:
        assert found.tokens < sum(map(len, asked))
    assert not any(hasattr(module, ATTRIBUTE) for module in model.modules()) or method


def test_a_right_draft_takes_no_step() -> None:
    model: Any = byte_model()
    asked = prompts()
    right = [naive(model, prompt, new) for prompt, new in zip(asked, NEW, strict=True)]
    steps: list[int] = []

    def step(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if "past_key_values" in kwargs:
            steps.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(step, with_kwargs=True)
    continue_prompts(model, asked, new_tokens=NEW, drafts=right)
    assert steps == []
    continue_prompts(model, asked, new_tokens=NEW)
    assert steps == [1] * (sum(NEW) - len(NEW))


def test_it_ends_where_it_is_told_to() -> None:
    model: Any = byte_model()
    asked = prompts()
    right = [naive(model, prompt, new) for prompt, new in zip(asked, NEW, strict=True)]
    stop = {right[0][3], right[2][0]}
    wanted = [
        said[: next((i for i, token in enumerate(said) if token in stop), len(said))]
        for said in right
    ]
    for given in (None, drafts(right)):
        for invariant in (True, False):
            found = continue_prompts(
                model, asked, new_tokens=NEW, stop=stop, drafts=given, length_invariant=invariant
            )
            assert [list(said or ()) for said in found.token_ids] == wanted
    for invariant in (True, False):
        found = continue_prompts(
            model,
            asked,
            new_tokens=NEW,
            settled=lambda row, said: len(said) > row,
            length_invariant=invariant,
        )
        said = [list(one or ()) for one in found.token_ids]
        assert said == [one[: row + 1] for row, one in enumerate(right)]


@pytest.mark.parametrize("invariant", [True, False])
def test_logits_with_nan_say_nothing(invariant: bool) -> None:
    model: Any = byte_model()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    found = continue_prompts(model, prompts(), new_tokens=NEW, length_invariant=invariant)
    assert found.token_ids == (None,) * 5


def test_without_memory_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    model: Any = byte_model()
    right = [naive(model, prompt, new) for prompt, new in zip(prompts(), NEW, strict=True)]
    monkeypatch.setattr(prefix_tree, "prefill", full)
    found = continue_prompts(model, prompts(), new_tokens=NEW)
    assert found.how == "whole prompts (no memory for a cache)"
    assert [list(said or ()) for said in found.token_ids] == right


def test_what_is_refused() -> None:
    for asked, new in (([[]], [1]), ([[5]], [0])):
        with pytest.raises(DataError, match="at least one token"):
            continue_prompts(byte_model(), asked, new_tokens=new)
    assert continue_prompts(byte_model(), [], new_tokens=[]).token_ids == ()
