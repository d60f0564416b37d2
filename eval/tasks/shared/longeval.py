"""LongEval's two tasks: generated prompts, or those of the published test files.

Source: Li et al., "How Long Can Open-Source LLMs Truly Promise on Context Length?" (LongChat,
2023). The files are `longeval/evaluation/{lines,topics}/testcases/*.jsonl` of DachengLi1/LongChat.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.assembly import Prompt, answer_after
from longctx.prompts.haystacks import decode

from .answering import around
from .json_lines import records_of
from .protocol import Plan, Unit
from .retrieval import PromptSpec, Retrieval
from .texts import digest

__all__ = ["Case", "LongEval", "field"]


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt of a test file."""

    text: str
    """The user's message."""
    answer_prefix: str
    """Begins the answer."""
    key: str
    """What follows, after `space`."""
    space: str = " "
    depth: float = 0.0
    """Share of the text's characters before what is asked for."""


@dataclass(frozen=True, slots=True)
class LongEval(Retrieval):
    """A task of LongEval."""

    file: str = ""
    """Published test cases, JSON lines; none means generated prompts. A length has the prompts of
    the file that fit into it and not into the next shorter one, `samples` of them at most."""

    def __post_init__(self) -> None:
        Retrieval.__post_init__(self)
        if self.file and self.share_lengths:
            raise DataError(
                f"share_lengths is for prompts that are drawn, those of {self.file} are as they "
                "are: leave it out, or sweep the file by itself."
            )

    @abstractmethod
    def case(self, record: dict[str, Any], where: str) -> Case:
        """Read a line of a test file; `where` names it.

        Raises:
            DataError: a field that is missing or no what it should be.
        """

    @abstractmethod
    def generate(self, tokenizer: PreTrainedTokenizerBase, length: int, spec: PromptSpec) -> Prompt:
        """Build a prompt of exactly that many tokens."""

    def cache_key(self) -> dict[str, Any]:
        """Settings, and the file by its content."""
        cases = [json.dumps(record) for _, record in records_of(self.file)] if self.file else []
        return {**Retrieval.cache_key(self), "file": digest("\n".join(cases)) if cases else ""}

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """As for any retrieval task; the prompts of a file each in the shortest length they fit.

        Raises:
            DataError: a prompt that is longer than all lengths, besides what a file can have wrong.
        """
        if not self.file:
            return Retrieval.plan(self, tokenizer, lengths, length_invariant=length_invariant)
        sizes = [
            len(self._from_file(tokenizer, number).input_ids)
            for number in range(len(records_of(self.file)))
        ]
        if max(sizes) > max(lengths):
            raise DataError(
                f"{self._where(sizes.index(max(sizes)))} has {max(sizes)} tokens, more than the "
                f"longest length asked for, {max(lengths)}: add a length of {max(sizes)} or more."
            )
        units: list[Unit] = []
        notes: list[str] = []
        shorter = 0
        for length in sorted(lengths):
            fitting = [i for i, size in enumerate(sizes) if shorter < size <= length]
            chosen, shorter = fitting[: self.samples], length
            notes.append(
                f"{self.name} at {length:,}: {len(chosen)} of the {len(fitting)} prompts of "
                f"{Path(self.file).name} that need this length"
            )
            if chosen:
                tokens = sum(sizes[i] for i in chosen)
                units.append(Unit((length,), tokens, {"prompts": chosen}, len(chosen)))
        return Plan(tuple(units), tuple(notes))

    @property
    def draws_prompts(self) -> bool:
        """A file has as many as it has."""
        return not self.file

    def cases(
        self, tokenizer: PreTrainedTokenizerBase, unit: Unit
    ) -> list[tuple[int, PromptSpec, Prompt]]:
        """As for any retrieval task; what a file hides lies where it does, and not in a grid."""
        cases = Retrieval.cases(self, tokenizer, unit)
        if not self.file:
            return cases
        return [(n, replace(spec, depth=prompt.depth), prompt) for n, spec, prompt in cases]

    def prompt(self, tokenizer: PreTrainedTokenizerBase, length: int, spec: PromptSpec) -> Prompt:
        """A generated prompt, or test case `spec.index` (from 0) of the file."""
        if self.file:
            return self._from_file(tokenizer, spec.index)
        return self.generate(tokenizer, length, spec)

    def _from_file(self, tokenizer: PreTrainedTokenizerBase, number: int) -> Prompt:
        line, record = records_of(self.file)[number]
        case = self.case(record, self._where(number))
        head, tail = around(tokenizer, case.answer_prefix, self.chat)
        text = case.text.strip() + tail
        ids, answer_ids = answer_after(tokenizer, text, case.key, space=case.space)
        return Prompt(
            input_ids=(*head, *ids, *answer_ids),
            answer_start=len(head) + len(ids),
            answer=decode(tokenizer, answer_ids),
            key=case.key,
            needle_starts=(),
            depth=case.depth,
            haystack=f"{Path(self.file).name}:{line}",
            seed=number,
        )

    def _where(self, number: int) -> str:
        """File and line of a test case."""
        return f"{self.file}:{records_of(self.file)[number][0]}"


def field(record: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """Return a field of a test case.

    Raises:
        DataError: it is missing, empty or of another type.
    """
    value = record.get(name)
    if type(value) is not kind or value in ("", []):  # True is an int too
        said = "has no" if name not in record else f"has {value!r:.40} as"
        raise DataError(
            f"{where} {said} {name!r} (fields: {', '.join(record)}): expected a test case of "
            f"LongEval with a {kind.__name__} there; pass the file of the other task?"
        )
    return value
