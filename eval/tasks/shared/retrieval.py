"""What all retrieval tasks share: prompts with one right answer, scored without generating.

A task says how a prompt of a given number is drawn; `haystack_task.py` has those with a haystack,
`longeval.py` those of LongEval.

Greedy decoding gives the answer if and only if, with the answer in place, the argmax is right at
each of its tokens. Its log-probability is kept as a graded signal. What prompts have in common is
run once (`longctx.scoring.prefix_sharing`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.assembly import Prompt
from longctx.prompts.haystacks import Haystack, decode
from longctx.reading.question import Question
from longctx.reading.read import Reading, answer_in_pieces
from longctx.scoring.compressed_caches import CompressedCache
from longctx.scoring.over_cache import score_over_cache
from longctx.scoring.prefix_sharing import score_prompts

from ...stats.intervals import LEAST, clustered_wilson, wilson
from .protocol import Measured, Observation, Plan, Resumable, Summary, UnderWay, Unit

__all__ = [
    "PromptSpec",
    "Retrieval",
    "depth_grid",
    "details_of",
    "names_of",
    "thin_grid",
    "turn_of",
]

_MOST = 10**6  # seeds that a length has to itself
_PROMPTS = 3  # counted up when the same settings give other prompts: old results are not reused


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """What prompt `index` of a cell is drawn with."""

    index: int
    seed: int
    """Chooses what is asked for."""
    haystack_seed: int
    """Chooses what it is hidden in."""
    longest: int | None = None
    """Tokens of the longest prompt whose haystack begins at the same place."""
    depth: float = 0.0
    """Wanted share of the haystack before the needle."""
    haystack: Haystack | None = None
    """None where the task makes its own."""


def depth_grid(depths: int | None, prompts: int) -> list[float]:
    """Depths from end to end, no more than there are prompts; inner ones for one or two."""
    n = min(depths or 1, prompts)
    if n < 3:  # both ends are where it is easiest
        return [(i + 0.5) / n for i in range(n)]
    return [i / (n - 1) for i in range(n)]


def thin_grid(name: str, samples: int, depths: int | None, kinds: int = 1) -> list[str]:
    """Say that there are fewer prompts than depths, in a sentence; nothing if there are enough.

    Args:
        name: of the task.
        samples: prompts of a length.
        depths: that were asked for; None: drawn at random.
        kinds: of haystack, which take turns.
    """
    grid = depth_grid(depths, -(-samples // kinds))
    if depths is None or len(grid) == depths:
        return []
    prompts = f"{samples} prompts a length are" if samples > 1 else "1 prompt a length is"
    each = f" and {kinds} kinds of haystack" if kinds > 1 else ""
    at = ", ".join(f"{depth:.0%}" for depth in grid)
    return [
        f"{name}: {prompts} too few for {depths} depths{each}: they stand "
        f"at {at}. Pass samples={depths * kinds} or more, or depths={len(grid)}"
    ]


def turn_of(turn: int, seed: int, grid: Sequence[float], each: int = 1) -> tuple[int, float]:
    """The haystack and depth of one prompt: all depths of `grid` in turn, then all of them again.

    The depths of one turn are dealt out to `each` haystacks, deep and shallow ones to every one.
    Without a grid, each prompt has a haystack of its own and `seed` draws its depth.
    """
    if grid:
        turns, depth = divmod(turn, len(grid))
        return turns * each + depth % each, grid[depth]
    return turn, Random(f"depth/{seed}").random()


@dataclass(frozen=True, slots=True)
class Retrieval(Resumable):
    """A task with one right answer per prompt; the value of a cell is the share found."""

    samples: int = 20
    """Prompts per method and length, each with its own answer."""
    seed: int = 0
    """Chooses what is asked for and what it is hidden in."""
    chat: bool | None = None
    """Put the prompt into the tokenizer's chat template; None: if it has one."""
    share_lengths: bool = False
    """Let all lengths share their keys and haystacks, whose beginnings are then run once for all:
    cheaper, but lengths are no longer independent of each other. Otherwise each length draws its
    own."""

    name: ClassVar[str]
    scale: ClassVar[Literal["share", "perplexity"]] = "share"
    higher_is_better: ClassVar[bool] = True
    figure: ClassVar[str | None] = None

    @abstractmethod
    def prompt_spec(self, index: int, length: int, longest: int | None) -> PromptSpec:
        """What prompt `index` of a length is drawn with; `longest` of all matters if they share."""

    @abstractmethod
    def prompt(self, tokenizer: PreTrainedTokenizerBase, length: int, spec: PromptSpec) -> Prompt:
        """Build one prompt; the same for every method."""

    @property
    @abstractmethod
    def estimand(self) -> str:
        """What the table shows."""

    def __post_init__(self) -> None:
        if type(self.samples) is not int or not 1 <= self.samples <= _MOST:
            raise DataError(
                f"samples={self.samples!r}: expected 1 to {_MOST:,} prompts per length."
            )

    def base(self, length: int) -> int:
        """The first seed of a length; up to a million follow that no other length or seed has."""
        own = 0 if self.share_lengths else length
        return own * 10**12 + self.seed * 10**6

    def cache_key(self) -> dict[str, Any]:
        """All settings, and which prompts they give."""
        return {**dataclasses.asdict(self), "prompts": _PROMPTS}

    def report_identity(self) -> dict[str, Any]:
        """The same: a cell's figure depends on nothing else."""
        return self.cache_key()

    @property
    def draws_prompts(self) -> bool:
        """Whether as many prompts are drawn as are wanted, so that `Adaptive` can stop early."""
        return True

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """One unit per length, or one for all; every prompt is built once, to see that it can."""
        longest = max(lengths)
        for length in lengths:
            for index in range(self.samples):
                self.prompt(tokenizer, length, self.prompt_spec(index, length, longest))
        everything, notes = range(self.samples), tuple(self.plan_notes())
        if self.share_lengths and length_invariant:
            spec = self.part(longest, everything, longest).spec
            count = self.samples * len(lengths)
            return Plan((Unit(tuple(lengths), sum(lengths) * self.samples, spec, count),), notes)
        return Plan(tuple(self.part(length, everything, longest) for length in lengths), notes)

    def plan_notes(self) -> list[str]:
        """What a reader must know of the prompts, in sentences."""
        return []

    def part(self, length: int, indices: Sequence[int], longest: int) -> Unit:
        """The unit of some prompts of one length; `longest` of all matters to shared haystacks."""
        spec: dict[str, Any] = {"prompts": list(indices)}
        if self.share_lengths:
            spec["longest"] = longest
        return Unit((length,), length * len(indices), spec, len(indices))

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
        """Score the answers of those of a unit's prompts that are left."""
        cases = self.cases(tokenizer, unit)
        prompts = [prompt for _, _, prompt in cases]
        names = names_of(cases)

        def finished(
            rows: Sequence[int],
            nll: Sequence[torch.Tensor],
            argmax: Sequence[torch.Tensor],
            tokens: int,
        ) -> None:
            scored = zip(rows, nll, argmax, strict=True)
            found = [self._observe(tokenizer, *cases[row], *scores) for row, *scores in scored]
            under_way.add(found, tokens)

        scores = score_prompts(
            model,
            [prompt.input_ids for prompt in prompts],
            [prompt.answer_start for prompt in prompts],
            batch_tokens=batch_tokens,
            length_invariant=length_invariant,
            known=under_way.known(names),
            finished=finished,
        )
        return under_way.measured(names, scores.how)

    def cache_obstacle(self, tokenizer: PreTrainedTokenizerBase, unit: Unit) -> str | None:
        """A prompt that does not say where its question begins."""
        if all(prompt.document is not None for _, _, prompt in self.cases(tokenizer, unit)):
            return None
        return "its prompts do not say what is context and what is question"

    def measure_over_cache(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        cache: CompressedCache,
    ) -> Measured:
        """Score answers over what the cache keeps of all that stands before the question."""
        found: list[Observation] = []
        tokens = largest = 0
        for length, spec, prompt in self.cases(tokenizer, unit):
            assert prompt.document is not None, "the sweep refuses other tasks"
            scores = score_over_cache(
                model,
                prompt.input_ids,
                cache,
                context_end=prompt.document[1],
                start=prompt.answer_start,
            )
            tokens += scores.tokens
            largest = max(largest, scores.cache_bytes)
            found.append(self._observe(tokenizer, length, spec, prompt, scores.nll, scores.argmax))
        return Measured(tuple(found), tokens, f"contexts in {cache}", cache_bytes=largest)

    def measure_in_pieces(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        under_way: UnderWay,
        reading: Reading,
    ) -> Measured:
        """Generate the answers of a unit's prompts, whose documents are read in pieces.

        Right is an answer that begins with the key's tokens. No NLL is known. All prompts say what
        their document is.
        """
        cases = self.cases(tokenizer, unit)
        names = names_of(cases)
        known = set(under_way.known(names))
        for row, (length, spec, prompt) in enumerate(cases):
            if row in known:
                continue
            assert prompt.document is not None, "the sweep refuses other tasks"
            first, last = prompt.document
            question = Question(
                prompt.input_ids[:first], prompt.input_ids[last : prompt.answer_start]
            )
            answer = answer_in_pieces(
                model,
                tokenizer,
                decode(tokenizer, prompt.input_ids[first:last]),
                question,
                reading,
                max_new_tokens=len(prompt.answer_ids),
            )
            tokens = sum(piece.tokens + question.size for piece in answer.pieces)
            said = list(answer.token_ids)
            correct = said == list(prompt.answer_ids)
            detail = {**details_of(length, spec, prompt), "said": answer.text}
            cluster = self.cluster(spec, prompt)
            found = Observation(length, str(spec.index), cluster, 0.0, 0, correct, detail)
            under_way.add([found], tokens)
        return under_way.measured(names, "read in pieces, generated")

    def cases(
        self, tokenizer: PreTrainedTokenizerBase, unit: Unit
    ) -> list[tuple[int, PromptSpec, Prompt]]:
        """The prompts of a unit, each with its length and what it is drawn with."""
        longest: int | None = unit.spec.get("longest")
        specs = [
            (length, self.prompt_spec(index, length, longest))
            for length in unit.lengths
            for index in unit.spec["prompts"]
        ]
        return [(length, spec, self.prompt(tokenizer, length, spec)) for length, spec in specs]

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        """The share of answers found; NaN where any prompt's logits held a NaN."""
        answers = [o.correct for o in observations]
        if not answers or None in answers:
            return Summary(math.nan, math.nan, math.nan, "none")
        found, clusters = [bool(each) for each in answers], [o.cluster for o in observations]
        count = len(set(clusters))
        if LEAST <= count < len(found):
            share = clustered_wilson(found, clusters, range(len(found)))
            name = f"Wilson 95%, with the design effect of {len(found)} prompts in {count} clusters"
            return Summary(*share, name)
        name = "Wilson 95%"
        if count < min(len(found), LEAST):
            several = f"{count} cluster{'s' * (count > 1)}"
            name += f", as if its {len(found)} prompts in {several} were independent"
        return Summary(sum(found) / len(found), *wilson(sum(found), len(found)), name)

    def cluster(self, spec: PromptSpec, prompt: Prompt) -> str:
        """What the prompt has in common with others, so that they are not independent."""
        return prompt.haystack

    def _observe(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        spec: PromptSpec,
        prompt: Prompt,
        nll: torch.Tensor,
        argmax: torch.Tensor,
    ) -> Observation:
        total = float(nll.double().sum())
        said: list[int] = argmax.tolist()
        detail = details_of(length, spec, prompt)
        correct = None
        if not math.isnan(total):
            correct = said == list(prompt.answer_ids)
            detail["argmax"] = tokenizer.decode(said)  # given the right tokens before each
            detail["argmax_ids"] = said
        return Observation(
            length, str(spec.index), self.cluster(spec, prompt), total, len(said), correct, detail
        )


def names_of(cases: Sequence[tuple[int, PromptSpec, Prompt]]) -> list[tuple[int, str]]:
    """Length and item of each prompt, as its observation has them."""
    return [(length, str(spec.index)) for length, spec, _ in cases]


def details_of(length: int, spec: PromptSpec, prompt: Prompt) -> dict[str, Any]:
    """What there is to know of a prompt, whatever is answered."""
    detail: dict[str, Any] = {
        "key": prompt.key,
        "depth": prompt.depth,
        "wanted_depth": spec.depth,
        "haystack": prompt.haystack,
        "seed": prompt.seed,
    }
    if prompt.distance is not None:
        detail["distance"] = prompt.distance
    if len(prompt.input_ids) != length:
        detail["tokens"] = len(prompt.input_ids)
    return detail
