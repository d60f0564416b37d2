"""What all retrieval tasks share: prompts with one right answer, scored without generating.

Greedy decoding gives the answer if and only if, with the answer in place, the argmax is right at
each of its tokens. Its log-probability is kept as a graded signal. What prompts have in common is
run once (`longctx.sharing`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.assembly import Prompt
from longctx.errors import DataError
from longctx.haystacks import Grass, Haystack
from longctx.sharing import score_prompts

from .stats import wilson
from .task import Measured, Observation, Plan, Summary, Unit
from .texts import digest, texts_of

__all__ = ["Place", "Retrieval"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where prompt `index` of a cell has its needle, and what it is drawn with."""

    index: int
    haystack: Haystack
    depth: float
    """Wanted share of the haystack before the needle."""
    seed: int
    """Chooses what the needle says."""
    haystack_seed: int
    longest: int | None
    """Tokens of the longest prompt whose haystack begins at the same place."""


@dataclass(frozen=True, slots=True)
class Retrieval(ABC):
    """A task that hides something in a haystack; the value of a cell is the share found."""

    samples: int = 20
    """Prompts per method and length, each with its own needle."""
    depths: int | None = 10
    """So many depths, evenly from the beginning to the end of the haystack. Prompts go through them
    in one haystack before the next haystack is begun. None draws each at random, in a haystack of
    its own."""
    haystack: Literal["grass", "text", "both"] = "both"
    """The repeated classical sentences, real text, or one after the other."""
    text: tuple[str, ...] = ()
    """Files or folders of real text; none means the embedded held-out documents."""
    seed: int = 0
    """Chooses needles, random depths and where in the text a haystack begins."""
    chat: bool | None = None
    """Put the prompt into the tokenizer's chat template; None: if it has one."""
    share_lengths: bool = False
    """Let all lengths share their haystacks, whose beginnings are then run once for all: cheaper,
    but lengths are no longer independent of each other, and an interruption loses all of them."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def prompt(self, tokenizer: PreTrainedTokenizerBase, length: int, place: Place) -> Prompt:
        """Build one prompt; the same for every method."""

    @property
    @abstractmethod
    def asked(self) -> str:
        """What is to be returned, for the estimand: "keys of 5 digits"."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError(f"samples={self.samples}: expected at least one prompt per length.")
        if self.depths is not None and self.depths < 1:
            raise DataError(f"depths={self.depths}: expected at least one, or None for random.")
        if self.haystack not in ("grass", "text", "both"):
            raise DataError(f"haystack={self.haystack!r}: expected 'grass', 'text' or 'both'.")

    @property
    def estimand(self) -> str:
        """What the table shows."""
        where = "random depths" if self.depths is None else f"{len(self._grid())} depths"
        return (
            f"share of {self.samples} {self.asked} that greedy decoding returns, at {where} of a "
            f"prompt of exactly that many tokens (haystack: {self.haystack}); interval: Wilson 95%"
        )

    def spec(self) -> dict[str, Any]:
        """Settings, and the haystacks by their content."""
        texts = [
            digest("\f".join(h.documents)) for h in self._haystacks() if not isinstance(h, Grass)
        ]
        return {**dataclasses.asdict(self), "text": texts}

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """One unit per length, or one for all; the shortest and longest prompts are tried."""
        longest = max(lengths)
        for length in {min(lengths), longest}:
            for index in range(min(self.samples, len(self._haystacks()))):
                self.prompt(tokenizer, length, self._place(index, longest))
        everything = range(self.samples)
        if self.share_lengths and length_invariant:
            whole = self.part(longest, everything, longest)
            return Plan((Unit(tuple(lengths), sum(lengths) * self.samples, whole.spec),))
        return Plan(tuple(self.part(length, everything, longest) for length in lengths))

    def part(self, length: int, indices: Sequence[int], longest: int) -> Unit:
        """The unit of some prompts of one length; `longest` of all matters to shared haystacks."""
        spec: dict[str, Any] = {"prompts": list(indices)}
        if self.share_lengths:
            spec["longest"] = longest
        return Unit((length,), length * len(indices), spec)

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        *,
        batch_tokens: int,
        length_invariant: bool,
    ) -> Measured:
        """Score the answers of a unit's prompts."""
        cases = self.cases(tokenizer, unit)
        prompts = [prompt for _, _, prompt in cases]
        scores = score_prompts(
            model,
            [prompt.input_ids for prompt in prompts],
            [prompt.answer_start for prompt in prompts],
            batch_tokens=batch_tokens,
            length_invariant=length_invariant,
        )
        found = tuple(
            _observe(tokenizer, *case, nll, argmax)
            for case, nll, argmax in zip(cases, scores.nll, scores.argmax, strict=True)
        )
        return Measured(found, scores.tokens, scores.how)

    def cases(
        self, tokenizer: PreTrainedTokenizerBase, unit: Unit
    ) -> list[tuple[int, Place, Prompt]]:
        """The prompts of a unit, each with its length and place."""
        longest: int | None = unit.spec.get("longest")
        places = [self._place(index, longest) for index in unit.spec["prompts"]]
        return [
            (length, place, self.prompt(tokenizer, length, place))
            for length in unit.lengths
            for place in places
        ]

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        """The share of answers found; NaN where any prompt's logits held a NaN."""
        answers = [o.correct for o in observations]
        if not answers or None in answers:
            return Summary(math.nan, math.nan, math.nan, "none")
        hits = sum(map(bool, answers))
        return Summary(hits / len(answers), *wilson(hits, len(answers)), "Wilson 95%")

    def _haystacks(self) -> list[Haystack]:
        kinds: list[Haystack] = []
        if self.haystack != "text":
            kinds.append(Grass())
        if self.haystack != "grass":
            kinds.append(texts_of(self.text))
        return kinds

    def _grid(self) -> list[float]:
        kinds = 2 if self.haystack == "both" else 1
        n = min(self.depths or 1, -(-self.samples // kinds))
        return [0.5] if n == 1 else [i / (n - 1) for i in range(n)]

    def _place(self, index: int, longest: int | None) -> Place:
        kinds, grid = self._haystacks(), self._grid()
        kind, turn = index % len(kinds), index // len(kinds)
        seed = self.seed * 1_000_000
        if self.depths is None:
            number, depth = turn, Random(f"depth/{seed + index}").random()
        else:
            number, depth = turn // len(grid), grid[turn % len(grid)]
        return Place(
            index=index,
            haystack=kinds[kind],
            depth=depth,
            seed=seed + index,
            haystack_seed=seed + number,
            longest=longest if self.share_lengths else None,
        )


def _observe(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    place: Place,
    prompt: Prompt,
    nll: torch.Tensor,
    argmax: torch.Tensor,
) -> Observation:
    total = float(nll.double().sum())
    said: list[int] = argmax.tolist()
    detail: dict[str, Any] = {
        "key": prompt.key,
        "depth": prompt.depth,
        "wanted_depth": place.depth,
        "haystack": prompt.haystack,
        "seed": prompt.seed,
    }
    correct = None
    if not math.isnan(total):
        correct = said == list(prompt.answer_ids)
        detail["argmax"] = tokenizer.decode(said)  # given the right tokens before each
    # Grass is the same everywhere: all that differs between its prompts is the needle.
    cluster = f"grass/{place.seed}" if isinstance(place.haystack, Grass) else prompt.haystack
    return Observation(length, str(place.index), cluster, total, len(said), correct, detail)
