"""Questions about long texts, from a file of yours: LongBench, BABILong or any set in this form.

A line of the file is a JSON object:

    {"context": "…", "question": "…", "answers": ["…"], "metric": "f1"}

`answers` may be one string. Optional: `metric` (else the task's), `new_tokens`, `task` (a part of
the set, of which each counts alike) and `cluster` (what several questions have in common; else the
context). Sources of such sets: Bai et al., "LongBench" (arXiv:2308.14508); Kuratov et al.,
"BABILong" (arXiv:2406.10149).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.haystacks import decode, encode

from .shared.answer_metrics import METRICS, Metric, answer_score, check_answer, check_metric
from .shared.answering import Answering, Question, around, context_end_of, draft_of
from .shared.json_lines import records_of
from .shared.protocol import Plan, Unit
from .shared.texts import digest

__all__ = ["TASK", "Questions"]

_MOST = 10**6
_OPTIONAL = ("metric", "new_tokens", "task", "cluster")


@dataclass(frozen=True, slots=True)
class Questions(Answering):
    """Questions of a file; the value of a cell is the mean score of the answers."""

    file: str = ""
    """JSON lines, each with context, question, answers and perhaps metric: the file's docstring has
    the form. A length has the prompts that fit into it, with room for the answer, and not into the
    next shorter one."""
    metric: Literal["f1", "rouge_l", "exact_match", "contains"] = "f1"
    """For lines without one: SQuAD's F1 or exact match, ROUGE-L, or whether the answer contains the
    right one, whatever its case."""
    longer: Literal["refuse", "leave_out", "truncate"] = "refuse"
    """What becomes of prompts beyond the longest length: an error, left out and counted, or cut in
    the middle of the context, as LongBench does, and counted."""
    samples: int | None = None
    """Prompts per length at most, the first of the file; None takes all."""
    new_tokens: int = 64
    """Tokens of an answer at most, for lines that do not say."""
    first_line: bool = False
    """Score the first line of an answer alone."""
    template: str = (
        "Read the text and answer the question below it in as few words as you can.\n\n{context}"
        "\n\nQuestion: {question}"
    )
    """The prompt."""
    answer_prefix: str = "Answer:"
    """Begins the answer; empty for none."""
    chat: bool | None = None
    """Put the prompt into the tokenizer's chat template; None: if it has one."""

    name: ClassVar[str] = "questions"

    def __post_init__(self) -> None:
        check_metric(self.metric, "questions")
        for name, value in (("samples", self.samples), ("new_tokens", self.new_tokens)):
            if value is not None and (type(value) is not int or not 1 <= value <= _MOST):
                raise DataError(f"{name}={value!r}: expected a whole number from 1 to {_MOST:,}.")
        if self.longer not in ("refuse", "leave_out", "truncate"):
            raise DataError(f"longer={self.longer!r}: expected refuse, leave_out or truncate.")
        for hole in ("{context}", "{question}"):
            if self.template.count(hole) != 1:
                raise DataError(f"template={self.template!r}: expected {hole} in it once.")

    @property
    def estimand(self) -> str:
        """What the table shows."""
        cases = _cases(self.file, self.metric, self.new_tokens) if self.file else ()
        metrics = [metric for metric in METRICS if metric in {case.metric for case in cases}]
        said = {
            "refuse": "",
            "leave_out": ", without those that are longer than all lengths",
            "truncate": ", those longer than all lengths cut in the middle of the context",
        }
        upto = "" if self.samples is None else f"at most {self.samples} "
        line = ", its first line alone" if self.first_line else ""
        return (
            f"mean {' or '.join(metrics) or self.metric} of the greedy answer{line} over {upto}"
            f"questions of {Path(self.file).name} that need this length{said[self.longer]}"
        )

    def cache_key(self) -> dict[str, Any]:
        """All settings, and the file by its content."""
        cases = [json.dumps(record) for _, record in records_of(self.file)] if self.file else []
        return {**dataclasses.asdict(self), "file": digest("\n".join(cases)), "prompts": 1}

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """One unit per length; every prompt is built once.

        Raises:
            DataError: no file, what a file can have wrong, or a prompt longer than all lengths.
        """
        del length_invariant  # nothing is shared between lengths
        if not self.file:
            raise DataError("no file of questions: pass --tasks questions:file=PATH.")
        sizes = [
            len(self._ids(tokenizer, case, case.context)[0]) + case.new_tokens
            for case in _cases(self.file, self.metric, self.new_tokens)
        ]
        longest = max(lengths)
        beyond = [number for number, size in enumerate(sizes) if size > longest]
        name = Path(self.file).name
        if beyond and self.longer == "refuse":
            worst = max(beyond, key=sizes.__getitem__)
            raise DataError(
                f"{len(beyond)} of {len(sizes)} prompts of {name} are longer than the longest "
                f"length asked for, {longest}: line {records_of(self.file)[worst][0]} needs "
                f"{sizes[worst]} tokens. Add a length, or pass longer=leave_out or longer=truncate."
            )
        units: list[Unit] = []
        notes: list[str] = []
        shorter = 0
        for length in sorted(lengths):
            fitting = [i for i, size in enumerate(sizes) if shorter < size <= length]
            if length == longest and self.longer == "truncate":
                fitting = sorted([*fitting, *beyond])
            chosen, shorter = fitting[: self.samples], length
            cut = sum(i in set(beyond) for i in chosen)
            notes.append(
                f"questions at {length:,}: {len(chosen)} of the {len(fitting)} prompts of {name} "
                "that need this length"
                + (f", {cut} of them cut in the middle of the context to fit" if cut else "")
            )
            if chosen:
                tokens = sum(min(sizes[i], length) for i in chosen)
                units.append(Unit((length,), tokens, {"prompts": chosen}, len(chosen)))
                self.questions(tokenizer, units[-1])
        if beyond and self.longer == "leave_out":
            notes.append(
                f"questions: {len(beyond)} of {len(sizes)} prompts of {name} are longer than "
                f"{longest:,} tokens and left out"
            )
        return Plan(tuple(units), tuple(notes))

    def questions(
        self, tokenizer: PreTrainedTokenizerBase, unit: Unit
    ) -> list[tuple[int, Question]]:
        """The prompts of one length."""
        (length,) = unit.lengths
        return [
            (length, self._question(tokenizer, length, number)) for number in unit.spec["prompts"]
        ]

    def _question(self, tokenizer: PreTrainedTokenizerBase, length: int, number: int) -> Question:
        case = _cases(self.file, self.metric, self.new_tokens)[number]
        room = length - case.new_tokens
        context = encode(tokenizer, case.context)
        ids, body = self._ids(tokenizer, case, case.context)
        kept = len(context)
        while len(ids) > room:
            kept -= len(ids) - room
            if kept < 2:
                raise DataError(
                    f"length={length} leaves no room for a context of {self._where(number)}: its "
                    f"question and the template take {len(ids) - max(kept, 0)} tokens. Ask for a "
                    "longer one."
                )
            head = decode(tokenizer, context[: kept // 2])
            tail = decode(tokenizer, context[len(context) - (kept - kept // 2) :])
            ids, body = self._ids(tokenizer, case, head + tail)
        detail: dict[str, Any] = {"metric": case.metric, "tokens": len(ids)}
        if kept < len(context):
            detail["left_out"] = len(context) - kept  # tokens of the context, in its middle
        tail_ids = ids[-len(encode(tokenizer, body)) :]
        return Question(
            item=f"{records_of(self.file)[number][0]}",
            cluster=case.cluster,
            input_ids=ids,
            references=case.answers,
            new_tokens=case.new_tokens,
            draft=draft_of(tokenizer, body, tail_ids, case.answers[0]),
            part=case.part,
            detail=detail,
            context_end=context_end_of(tokenizer, ids, self._after_context(tokenizer, case)),
        )

    def _ids(
        self, tokenizer: PreTrainedTokenizerBase, case: _Case, context: str
    ) -> tuple[tuple[int, ...], str]:
        """A prompt's ids, and the text of those after what a chat template puts first."""
        head, tail = around(tokenizer, self.answer_prefix, self.chat)
        first, _, rest = self.template.partition("{context}")  # either may hold the other's words
        first, rest = (part.replace("{question}", case.question) for part in (first, rest))
        body = f"{first}{context}{rest}{tail}"
        return (*head, *encode(tokenizer, body)), body

    def _after_context(self, tokenizer: PreTrainedTokenizerBase, case: _Case) -> str:
        """The text of a prompt after its context."""
        _, tail = around(tokenizer, self.answer_prefix, self.chat)
        rest = self.template.partition("{context}")[2].replace("{question}", case.question)
        return f"{rest}{tail}"

    def score(self, question: Question, text: str) -> float:
        """By the line's metric."""
        said = text.strip().partition("\n")[0] if self.first_line else text.strip()
        return answer_score(cast(Metric, question.detail["metric"]), said, question.references)

    def is_settled(self, question: Question, text: str) -> bool:
        """What an answer contains stays in it, and its first line ends once."""
        if self.first_line and "\n" in text.strip():
            return True
        return question.detail["metric"] == "contains" and self.score(question, text) == 1

    def _where(self, number: int) -> str:
        return f"{self.file}:{records_of(self.file)[number][0]}"


@dataclass(frozen=True, slots=True)
class _Case:
    """A line of a file."""

    context: str
    question: str
    answers: tuple[str, ...]
    metric: Metric
    new_tokens: int
    part: str
    cluster: str


@lru_cache(maxsize=8)
def _cases(file: str, metric: Metric, new_tokens: int) -> tuple[_Case, ...]:
    """The lines of a file, with what they leave open as the task has it."""
    found = tuple(
        _case(record, f"{file}:{line}", metric, new_tokens) for line, record in records_of(file)
    )
    if 0 < sum(case.part != "" for case in found) < len(found):
        raise DataError(f"{file}: some lines have a 'task' and others none: give all of them one.")
    return found


def _case(record: dict[str, Any], where: str, metric: Metric, new_tokens: int) -> _Case:
    texts = {name: record.get(name) for name in ("context", "question")}
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{where} has {value!r:.40} as {name!r} (fields: {', '.join(record) or 'none'}): "
                "expected a text that is not empty."
            )
    answers = record.get("answers")
    several: Any = [answers] if isinstance(answers, str) else answers
    if not isinstance(several, list) or not several:
        raise DataError(f"{where} has {answers!r:.40} as 'answers': expected texts, one or more.")
    for answer in several:
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(f"{where} has {answer!r:.40} among its answers: expected a text.")
    chosen: Any = record.get("metric", metric)
    if not isinstance(chosen, str):
        raise DataError(f"{where} has {chosen!r:.40} as 'metric': expected {', '.join(METRICS)}.")
    check_metric(chosen, where)
    for answer in several:
        check_answer(cast(Metric, chosen), answer, where)
    new: Any = record.get("new_tokens", new_tokens)
    if type(new) is not int or not 1 <= new <= _MOST:
        raise DataError(f"{where} has {new!r:.40} as 'new_tokens': expected a whole number from 1.")
    for name in ("task", "cluster"):
        if not isinstance(record.get(name, ""), str):
            raise DataError(f"{where} has {record[name]!r:.40} as {name!r}: expected a text.")
    for name in record.keys() - _OPTIONAL:  # sets bring columns of their own, hardly so near ours
        if meant := get_close_matches(name, _OPTIONAL, n=1, cutoff=0.85):
            raise DataError(f"{where} has a field {name!r:.40}: did you mean {meant[0]!r}?")
    context, question = cast(str, texts["context"]), cast(str, texts["question"])
    cluster = record.get("cluster") or digest(context)
    return _Case(
        context,
        question,
        tuple(several),
        cast(Metric, chosen),
        new,
        record.get("task", ""),
        cluster,
    )


TASK = Questions
