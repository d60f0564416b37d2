"""Tasks whose answers are generated: what all of them do, whatever they ask.

Greedy decoding answers; what the prompts share runs once, and a right answer takes no step of
decoding (`longctx.scoring.continuations`). An answer ends where its score can no longer change.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, ClassVar, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.prompts.assembly import frame
from longctx.prompts.haystacks import encode
from longctx.scoring.compressed_caches import CompressedCache
from longctx.scoring.continuations import continue_prompts
from longctx.scoring.over_cache import say_over_cache

from ...stats.intervals import mean_interval, mean_of_means, too_few, wilson
from .protocol import Measured, Observation, Plan, Resumable, Summary, UnderWay, Unit

__all__ = [
    "Answering",
    "Question",
    "around",
    "context_end_of",
    "draft_of",
    "said_by",
    "stops_of",
]

_TEXT = 2000  # characters of an answer that are kept


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt whose answer is generated."""

    item: str
    """Names it within task and length."""
    cluster: str
    """What it has in common with others, so that they are not independent."""
    input_ids: tuple[int, ...]
    """The prompt, up to where the answer begins."""
    references: tuple[str, ...]
    """What is right."""
    new_tokens: int
    """Tokens of an answer at most."""
    draft: tuple[int, ...] = ()
    """Tokens of a right answer, to be tried first."""
    part: str = ""
    """The part of the task that it belongs to; empty where there is one."""
    detail: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else there is to know, as JSON."""
    context_end: int | None = None
    """Index after the last token of what is asked about; None where that is not known."""


def around(
    tokenizer: PreTrainedTokenizerBase, answer_prefix: str, chat: bool | None
) -> tuple[tuple[int, ...], str]:
    """Return the ids of what stands before the user's message, and the text after it.

    Args:
        tokenizer: any.
        answer_prefix: begins the answer, after a space or inside the assistant's turn.
        chat: use the chat template; None means if the tokenizer has one.

    Raises:
        DataError: as in `longctx.prompts.assembly.frame`.
    """
    head, tail = frame(tokenizer, "", "", answer_prefix, chat)  # a frame around nothing
    tail = tail.removeprefix("\n")
    return head, tail if answer_prefix else tail.rstrip(" ")


def draft_of(
    tokenizer: PreTrainedTokenizerBase, body: str, ids: tuple[int, ...], answer: str
) -> tuple[int, ...]:
    """The tokens of an answer as they follow a text with these ids; none if they join it."""
    full = encode(tokenizer, f"{body} {answer}")
    return full[len(ids) :] if full[: len(ids)] == ids else ()


def context_end_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], question: str) -> int:
    """Index of the first of a prompt's tokens that says what stands after its context.

    A token that joins both belongs to the context.
    """
    end = encode(tokenizer, question)
    pairs = zip(reversed(ids), reversed(end), strict=False)
    return len(ids) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def stops_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: the checkpoint's and the tokenizer's."""
    settings: Any = model.generation_config
    own = getattr(settings, "eos_token_id", None)
    several: list[int | None] = [*own] if isinstance(own, list) else [own]
    return frozenset(
        token for token in (*several, tokenizer.eos_token_id) if isinstance(token, int)
    )


def said_by(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of an answer."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


@dataclass(frozen=True, slots=True)
class Answering(Resumable):
    """A task whose answers are generated; the value of a cell is the mean of their scores.

    Of a task in parts it is the mean over the parts, of which each counts alike.
    """

    name: ClassVar[str]
    scale: ClassVar[Literal["share", "perplexity"]] = "share"
    higher_is_better: ClassVar[bool] = True
    figure: ClassVar[str | None] = "score"

    @property
    @abstractmethod
    def estimand(self) -> str:
        """What the table shows."""

    @abstractmethod
    def cache_key(self) -> dict[str, Any]:
        """All that the inputs depend on beside tokenizer and unit."""

    @abstractmethod
    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """The units for these lengths."""

    @abstractmethod
    def questions(
        self, tokenizer: PreTrainedTokenizerBase, unit: Unit
    ) -> list[tuple[int, Question]]:
        """The prompts of a unit, each with its length; the same for every method."""

    @abstractmethod
    def score(self, question: Question, text: str) -> float:
        """The score of an answer, 0 to 1."""

    def is_settled(self, question: Question, text: str) -> bool:
        """Whether nothing that may still follow an answer changes its score."""
        return False

    def report_identity(self) -> dict[str, Any]:
        """The same as the key: a cell's figure depends on nothing else."""
        return self.cache_key()

    def measure_from(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        under_way: UnderWay,
        *,
        batch_tokens: int,
        length_invariant: bool,
    ) -> Measured:
        """Generate and score the answers of a unit that are left."""
        del batch_tokens  # one prompt after the other
        asked = self.questions(tokenizer, unit)
        only = [question for _, question in asked]
        names = [(length, question.item) for length, question in asked]

        def settled(row: int, said: Sequence[int]) -> bool:
            return self.is_settled(only[row], said_by(tokenizer, said))

        def finished(row: int, said: tuple[int, ...] | None, tokens: int) -> None:
            under_way.add([self._observe(tokenizer, *asked[row], said)], tokens)

        found = continue_prompts(
            model,
            [question.input_ids for question in only],
            new_tokens=[question.new_tokens for question in only],
            stop=stops_of(model, tokenizer),
            drafts=[question.draft for question in only],
            settled=settled,
            length_invariant=length_invariant,
            known=under_way.known(names),
            finished=finished,
        )
        return under_way.measured(names, found.how)

    def cache_obstacle(self, tokenizer: PreTrainedTokenizerBase, unit: Unit) -> str | None:
        """A prompt that does not say where its question begins."""
        asked = (question for _, question in self.questions(tokenizer, unit))
        if all(0 < (one.context_end or 0) < len(one.input_ids) for one in asked):
            return None
        return "its prompts do not say what is context and what is question"

    def measure_over_cache(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        cache: CompressedCache,
    ) -> Measured:
        """Generate answers over what the cache keeps of all that stands before the question."""
        found: list[Observation] = []
        tokens = largest = 0
        stop = stops_of(model, tokenizer)
        for length, question in self.questions(tokenizer, unit):
            assert question.context_end is not None, "the sweep refuses other tasks"

            def settled(said: Sequence[int], question: Question = question) -> bool:
                return self.is_settled(question, said_by(tokenizer, said))

            answer = say_over_cache(
                model,
                question.input_ids,
                cache,
                context_end=question.context_end,
                new_tokens=question.new_tokens,
                stop=stop,
                settled=settled,
            )
            tokens += answer.tokens
            largest = max(largest, answer.cache_bytes)
            found.append(self._observe(tokenizer, length, question, answer.token_ids))
        return Measured(tuple(found), tokens, f"contexts in {cache}", cache_bytes=largest)

    def _observe(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        question: Question,
        said: tuple[int, ...] | None,
    ) -> Observation:
        detail: dict[str, Any] = {**question.detail, "key": "; ".join(question.references)[:_TEXT]}
        if question.part:
            detail["part"] = question.part
        detail["score"] = math.nan
        if said is not None:
            text = said_by(tokenizer, said)
            detail |= {
                "score": self.score(question, text),
                "said": text[:_TEXT],
                "said_ids": list(said),
            }
        nll = math.nan if said is None else 0.0
        return Observation(length, question.item, question.cluster, nll, 0, detail=detail)

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        """The mean score over parts, with an interval over their clusters."""
        if not observations:
            return Summary(math.nan, math.nan, math.nan, "none")
        scores: list[float] = [o.detail["score"] for o in observations]
        clusters = [o.cluster for o in observations]
        parts: list[str] = [o.detail.get("part", "") for o in observations]
        count = len(set(zip(parts, clusters, strict=True)))
        if len(set(parts)) > 1:
            found = mean_of_means(scores, clusters, parts)
            said = f"t over {count} clusters in {len(set(parts))} parts, 95%"
            return Summary(*found, "none: a part of one cluster" if math.isnan(found[1]) else said)
        if count == len(scores) and {*scores} <= {0.0, 1.0}:
            hits = int(math.fsum(scores))
            return Summary(hits / count, *wilson(hits, count), "Wilson 95%")
        mean, low, high = mean_interval(scores, [1.0] * len(scores), clusters)
        if math.isnan(mean):
            return Summary(mean, math.nan, math.nan, "none")
        if few := too_few(count):
            return Summary(mean, math.nan, math.nan, few)
        if len(set(scores)) == 1:  # no spread to tell from: not a certainty
            return Summary(mean, math.nan, math.nan, "none: all alike")
        return Summary(mean, max(0.0, low), min(1.0, high), f"t over {count} clusters, 95%")
