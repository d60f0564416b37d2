"""A needle in a haystack: a sentence of yours in real text, asked for in your words.

Source: Kamradt, "Needle In A Haystack: pressure testing LLMs" (2023), whose needle is the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.assembly import Prompt

from .haystack_task import HaystackTask
from .protocol import Plan
from .retrieval import PromptSpec

__all__ = ["Needle"]

_INTRO = (
    "Read the following text carefully. I will ask you a question about it afterwards; answer it "
    "in the exact words of the text."
)


@dataclass(frozen=True, slots=True)
class Needle(HaystackTask):
    """A sentence in real text; the value of a cell is the share of answers given word for word.

    The beginning of the answer is given: what the needle says before the answer, or "The answer
    is" where the answer is not part of the needle.
    """

    haystack: Literal["grass", "text", "both"] = "text"
    """Real text only: without it, all prompts of one depth would be the same."""
    needle: tuple[str, ...] = (
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a "
        "sunny day.",
    )
    """Sentences, one to a prompt, in turn."""
    question: tuple[str, ...] = ("What is the best thing to do in San Francisco?",)
    """The question for each needle."""
    answer: tuple[str, ...] = ("a sandwich and sit in Dolores Park on a sunny day",)
    """The answer to each question, without the full stop. The default leaves "eat" to the given
    beginning, since "is to eat" would be right too."""

    name: ClassVar[str] = "needle"

    def __post_init__(self) -> None:
        HaystackTask.__post_init__(self)
        if self.haystack != "text":
            raise DataError(
                f"haystack={self.haystack!r}: this task's needles are hidden in real text; pass "
                "'text', and files of yours as `text`."
            )
        for name in ("needle", "question", "answer"):
            if isinstance(getattr(self, name), str):
                raise DataError(f"{name}={getattr(self, name)!r}: expected a tuple of such texts.")
        counts = len(self.needle), len(self.question), len(self.answer)
        if len(set(counts)) > 1 or not self.needle:
            raise DataError(
                f"{counts[0]} needles, {counts[1]} questions and {counts[2]} answers: expected one "
                "question and one answer for each needle."
            )
        for name in ("needle", "question", "answer"):
            for text in getattr(self, name):
                if not text.strip() or text != text.strip() or "\n" in text:
                    raise DataError(
                        f"{name}={text!r}: expected a line of text without spaces around it."
                    )

    @property
    def asked(self) -> str:
        """What is to be returned."""
        return "answers in the needle's words"

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """As for any retrieval task; answers that are not part of their needle are told."""
        plan = HaystackTask.plan(self, tokenizer, lengths, length_invariant=length_invariant)
        told = [
            f"needle: the answer {answer!r} is not part of its needle {needle!r}, so that no words "
            "of the needle lead to it: the model must give it after 'The answer is'"
            for needle, answer in dict.fromkeys(zip(self.needle, self.answer, strict=True))
            if answer not in needle
        ]
        return dataclasses.replace(plan, notes=(*plan.notes, *told))

    def prompt(self, tokenizer: PreTrainedTokenizerBase, length: int, spec: PromptSpec) -> Prompt:
        """A needle at the wanted depth; over the haystacks, each needle comes to each depth."""
        grid = max(len(self._grid()), 1)
        which = (spec.index % grid + spec.index // grid) % len(self.needle)
        needle, answer = self.needle[which], self.answer[which]
        begin, found, _ = needle.partition(answer)
        return self.hide(
            tokenizer,
            length,
            spec,
            needles=[needle],
            depths=[spec.depth],
            intro=_INTRO,
            question=self.question[which],
            answer_prefix=begin.strip() if found and begin.strip() else "The answer is",
            key=answer,
        )
