"""What every retrieval task must have: the tests of each run through these."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from longctx.eval.tasks.shared.adaptive import Adaptive
from longctx.eval.tasks.shared.retrieval import Retrieval
from longctx.prompts.assembly import Prompt
from longctx.scoring.greedy import greedy

from .conftest import byte_model, byte_tokenizer


def generated(model: Any, prompt: Prompt) -> tuple[int, ...]:
    """What greedy `generate` says in as many tokens as the answer has."""
    ids = torch.tensor([prompt.input_ids[: prompt.answer_start]])
    tokens: list[int] = greedy(model, ids, len(prompt.answer_ids))[0].tolist()
    return tuple(tokens)


def prompts_of(task: Any, length: int, tokenizer: Any = None) -> list[Prompt]:
    """All prompts of one length."""
    unit = task.part(length, range(task.samples), length)
    return [prompt for _, _, prompt in task.cases(tokenizer or byte_tokenizer(), unit)]


def text_of(prompt: Prompt) -> str:
    """What a reader sees."""
    return str(byte_tokenizer().decode(list(prompt.input_ids), skip_special_tokens=True))


def shared(first: Prompt, second: Prompt) -> int:
    """Tokens that two prompts have in common at the beginning."""
    pairs = zip(first.input_ids, second.input_ids, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(first.input_ids))


def check_properties(task: Retrieval, length: int) -> None:
    """Exact lengths, the answer at the end, determinism, score equals generate, adaptive use."""
    prompts = prompts_of(task, length)
    assert {len(prompt.input_ids) for prompt in prompts} == {length}
    for prompt in prompts:
        assert text_of(prompt).endswith(prompt.key)
        assert prompt.answer.strip() == prompt.key
    assert prompts == prompts_of(dataclasses.replace(task), length)
    other = prompts_of(dataclasses.replace(task, seed=1), length)
    assert not {p.input_ids for p in prompts} & {p.input_ids for p in other}
    _score_equals_generate(task, length)
    verdict = Adaptive(step=2).ask(task.samples, 0, lambda some: _observe(task, length, some))
    assert verdict == "fail"


def _observe(task: Retrieval, length: int, indices: Any) -> Any:
    unit = task.part(length, indices, length)
    return task.measure(
        byte_model(), byte_tokenizer(), unit, batch_tokens=4096, length_invariant=True
    ).observations


def _score_equals_generate(task: Retrieval, length: int) -> None:
    """Also where the answer is right: that of the odd prompts is made what the model says."""
    model = byte_model()

    kind: Any = type(task)

    class Told(kind):
        def prompt(self, tokenizer: Any, length: int, spec: Any) -> Prompt:
            prompt = super().prompt(tokenizer, length, spec)
            if not spec.index % 2:
                return prompt
            told = prompt.input_ids[: prompt.answer_start] + generated(model, prompt)
            return dataclasses.replace(prompt, input_ids=told)

    settings = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    told = Told(**settings)
    found = _observe(told, length, range(task.samples))
    for prompt, observation in zip(prompts_of(told, length), found, strict=True):
        assert observation.correct == (generated(model, prompt) == prompt.answer_ids)
    assert [o.correct for o in found] == [bool(i % 2) for i in range(task.samples)]


def check_too_short(task: Retrieval, length: int = 150) -> None:
    """A length below the prompt's own is refused, and named."""
    with pytest.raises(ValueError, match=f"length={length} is too short for this prompt; it needs"):
        task.plan(byte_tokenizer(), (length, 4000), length_invariant=True)
