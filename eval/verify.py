"""Teacher-forced scores against real generation, on a sample of the prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from random import Random
from typing import TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.assembly import Prompt
from longctx.batches import is_out_of_memory

from .greedy import greedy
from .records import Record
from .retrieval import Retrieval
from .task import Unit

__all__ = ["Verification", "generated", "notes_of", "verify"]

_Case: TypeAlias = tuple[int, str, Prompt]
"""Length, item, prompt."""


@dataclass(frozen=True, slots=True)
class Verification:
    """How many answers were generated too, and which came out otherwise.

    The scores know what greedy decoding says up to its first wrong token: so far the two must be
    the same, token by token. Answers whose logits held a NaN have no score and are left out.
    """

    method: str
    task: str
    checked: int
    disagreements: tuple[str, ...]
    """A sentence each."""
    lost: tuple[str, ...] = ()
    """Prompts that left no memory to generate after."""

    @property
    def note(self) -> str:
        """What goes under the table."""
        where = f"{self.task} under {self.method}"
        lost = f"; no memory to generate after {', '.join(self.lost)}" if self.lost else ""
        if not self.checked:
            return f"{where}: no answer could be checked{lost or ', none has a score'}"
        told = f"{where}: {self.checked} answers were generated too"
        if not self.disagreements:
            return f"{told}, all as scored{lost}"
        wrong = "; ".join(self.disagreements)
        return f"{told}, {len(self.disagreements)} NOT as scored: {wrong}{lost}"


def notes_of(checks: Sequence[Verification]) -> list[str]:
    """What goes under the tables: what is wrong each by itself, what is right in a sentence."""
    clean = [c for c in checks if c.checked and not c.disagreements and not c.lost]
    notes = [check.note for check in checks if check not in clean]
    if clean:
        counts = sum(check.checked for check in clean)
        which = ", ".join(dict.fromkeys(f"{check.task} under {check.method}" for check in clean))
        notes.append(f"{counts} answers were generated too, all as scored ({which})")
    return notes


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
        (length, str(place.index), prompt)
        for unit in units
        for length, place, prompt in task.cases(tokenizer, unit)
        if (length, str(place.index)) in scored
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
