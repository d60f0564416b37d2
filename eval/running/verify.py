"""Scores against answers that transformers' own `generate` gives, on a sample of the prompts.

A score by teacher forcing knows what greedy decoding says up to its first wrong token. Of an answer
that was generated while prompts shared their beginnings, every token is known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.scoring.batching import is_out_of_memory
from longctx.scoring.greedy import greedy

from ..results.records import Record
from ..results.verification import Verification
from ..tasks.shared.answering import Answering
from ..tasks.shared.protocol import Observation, Unit
from ..tasks.shared.retrieval import Retrieval

__all__ = ["verify"]


@dataclass(frozen=True, slots=True)
class _Case:
    """A prompt, and what its score says that greedy decoding begins with."""

    length: int
    item: str
    ids: tuple[int, ...]
    said: tuple[int, ...]
    new_tokens: int
    """To be generated: what a method that depends on the length of a request is told."""
    wanted: str


def verify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    task: Retrieval | Answering,
    units: Sequence[Unit],
    records: Sequence[Record],
    count: int,
) -> Verification:
    """Generate `count` answers, drawn from each length in turn, and compare each with its score."""
    scored = {(o.length, o.item): o for record in records for o in record.observations}
    chosen = _drawn(_cases(tokenizer, task, units, scored), count)
    wrong: list[str] = []
    lost: list[str] = []
    for case in chosen:
        try:
            answer = greedy(model, torch.tensor([case.ids]), case.new_tokens)[0].tolist()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            lost.append(f"prompt {case.item} at {case.length}")
            continue
        answer = tuple(answer[: len(case.said)])
        if answer != case.said:
            wrong.append(
                f"prompt {case.item} at {case.length}: scored {_text(tokenizer, case.said)!r}, "
                f"generated {_text(tokenizer, answer)!r} for {case.wanted!r}"
            )
    checked = len(chosen) - len(lost)
    return Verification(method, task.name, checked, tuple(wrong), tuple(lost))


def _text(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids)))


def _cases(
    tokenizer: PreTrainedTokenizerBase,
    task: Retrieval | Answering,
    units: Sequence[Unit],
    scored: Mapping[tuple[int, str], Observation],
) -> list[_Case]:
    """Every prompt that has a score."""
    found: list[_Case] = []
    if isinstance(task, Answering):
        for length, one in (pair for unit in units for pair in task.questions(tokenizer, unit)):
            said = _details(scored, length, one.item).get("said_ids")
            if said is not None:
                wanted = "; ".join(one.references)
                case = _Case(length, one.item, one.input_ids, tuple(said), one.new_tokens, wanted)
                found.append(case)
        return found
    for length, spec, prompt in (case for unit in units for case in task.cases(tokenizer, unit)):
        detail, item = _details(scored, length, str(spec.index)), str(spec.index)
        ids, new = prompt.input_ids[: prompt.answer_start], len(prompt.answer_ids)
        said = detail.get("said_ids")
        if said is not None:
            new = detail["new_tokens"]
        elif "argmax_ids" in detail:
            said = detail["argmax_ids"][: _known(detail["argmax_ids"], prompt.answer_ids)]
        if said is not None:
            found.append(_Case(length, item, ids, tuple(said), new, prompt.answer))
    return found


def _details(
    scored: Mapping[tuple[int, str], Observation], length: int, item: str
) -> dict[str, Any]:
    one = scored.get((length, item))
    return {} if one is None else one.detail


def _drawn(cases: Sequence[_Case], count: int) -> list[_Case]:
    """Some prompts, each length in turn and at random within: depths and haystacks have cycles."""
    by_length: dict[int, list[_Case]] = defaultdict(list)
    for case in cases:
        by_length[case.length].append(case)
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
