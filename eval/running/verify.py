"""Teacher-forced scores against real generation, on a sample of the prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, islice, zip_longest
from random import Random
from typing import TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.prompts.assembly import Prompt
from longctx.scoring.batching import is_out_of_memory
from longctx.scoring.greedy import greedy

from ..results.records import Record
from ..results.verification import Verification
from ..tasks.shared.protocol import Unit
from ..tasks.shared.retrieval import Retrieval

__all__ = ["generated", "verify"]

_Case: TypeAlias = tuple[int, str, Prompt]
"""Length, item, prompt."""


def verify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    task: Retrieval,
    units: Sequence[Unit],
    records: Sequence[Record],
    count: int,
) -> Verification:
    """Generate `count` answers, drawn from each length in turn, and compare each with its score."""
    scored = {
        (o.length, o.item): o
        for record in records
        for o in record.observations
        if o.correct is not None
    }
    cases = [
        (length, str(spec.index), prompt)
        for unit in units
        for length, spec, prompt in task.cases(tokenizer, unit)
        if (length, str(spec.index)) in scored
    ]
    chosen = _drawn(cases, count)
    wrong: list[str] = []
    lost: list[str] = []
    for length, item, prompt in chosen:
        try:
            answer = generated(model, prompt)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            lost.append(f"prompt {item} at {length}")
            continue
        said = tuple(scored[length, item].detail["argmax_ids"])
        known = _known(said, prompt.answer_ids)
        if answer[:known] != said[:known]:
            wrong.append(
                f"prompt {item} at {length}: scored {tokenizer.decode(list(said[:known]))!r}, "
                f"generated {tokenizer.decode(list(answer[:known]))!r} for {prompt.answer!r}"
            )
    checked = len(chosen) - len(lost)
    return Verification(method, task.name, checked, tuple(wrong), tuple(lost))


def _drawn(cases: Sequence[_Case], count: int) -> list[_Case]:
    """Some prompts, each length in turn and at random within: depths and haystacks have cycles."""
    by_length: dict[int, list[_Case]] = defaultdict(list)
    for case in cases:
        by_length[case[0]].append(case)
    for length, those in by_length.items():
        Random(f"verify/{length}").shuffle(those)
    turns = chain.from_iterable(zip_longest(*by_length.values()))
    return list(islice((case for case in turns if case is not None), count))


def _known(said: Sequence[int], answer: Sequence[int]) -> int:
    """Tokens that greedy decoding begins with, if `said` is the argmax with the answer in place."""
    for place, (one, right) in enumerate(zip(said, answer, strict=True)):
        if one != right:
            return place + 1
    return len(answer)


def generated(model: PreTrainedModel, prompt: Prompt) -> tuple[int, ...]:
    """What greedy `generate` says in as many tokens as the answer has."""
    ids = torch.tensor([prompt.input_ids[: prompt.answer_start]])
    tokens: list[int] = greedy(model, ids, len(prompt.answer_ids))[0].tolist()
    return tuple(tokens)
