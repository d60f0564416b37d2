"""Fewer prompts for the same answer: how far does the share found stay above a threshold?

In a cell, prompts are asked in a random order until Wald's sequential probability ratio test
decides between a share of `threshold − margin` and one of `threshold + margin`. A cell that is
still open when its prompts are used up is decided by its share, so that the wanted `error` is kept
only with prompts enough: `Adaptive.errors` gives the probabilities of a wrong decision for so many.

Over lengths the boundary is found by bisection. That takes it that what fails at a length fails at
longer ones; a failure therefore counts only if the next longer length fails too, so that a dip is
not taken for the end. Where a length could not be measured, longer ones are not tried.

Source: Wald, "Sequential Tests of Statistical Hypotheses" (1945), sections 3 and 5.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from longctx.errors import RunError

from .protocol import Observation

__all__ = ["Adaptive", "Verdict", "boundary"]

Verdict = Literal["pass", "fail", "not measured"]


@dataclass(frozen=True, slots=True)
class Adaptive:
    """When a cell has been asked enough."""

    threshold: float = 0.8
    """Share found that a length must reach; YaRN's criterion by default."""
    margin: float = 0.1
    """The shares threshold ± margin are to be told apart; between them either answer is right."""
    error: float = 0.05
    """Probability of either wrong decision, given prompts enough (about 100 at these defaults)."""
    step: int = 5
    """Prompts asked at a time."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold - self.margin < self.threshold + self.margin < 1:
            raise RunError(
                f"threshold={self.threshold}, margin={self.margin}: both threshold − margin and "
                "threshold + margin must lie strictly between 0 and 1."
            )
        if not 0 < self.error < 0.5 or self.step < 1:
            raise RunError(
                f"error={self.error}, step={self.step}: expected an error below 0.5 and a step of "
                "at least 1."
            )

    def decide(self, hits: int, n: int) -> Verdict | None:
        """What `hits` of `n` prompts say, None where more are needed."""
        low, high = self.threshold - self.margin, self.threshold + self.margin
        ratio = hits * math.log(high / low) + (n - hits) * math.log((1 - high) / (1 - low))
        bound = math.log((1 - self.error) / self.error)
        if ratio >= bound:
            return "pass"
        return "fail" if ratio <= -bound else None

    def errors(self, samples: int) -> tuple[float, float]:
        """Probability of a wrong decision by at most so many prompts.

        Returns:
            That of a pass at a true share of threshold − margin, and of a failure at threshold +
            margin: exact, by all ways in which the hits can come.
        """
        low, high = self.threshold - self.margin, self.threshold + self.margin
        return self._probability("pass", low, samples), self._probability("fail", high, samples)

    def _probability(self, verdict: Verdict, share: float, samples: int) -> float:
        undecided, asked, total = {0: 1.0}, 0, 0.0  # probability by hits
        while asked < samples:
            more = min(self.step, samples - asked)
            asked += more
            later: dict[int, float] = defaultdict(float)
            for hits, p in undecided.items():
                for new in range(more + 1):
                    q = p * math.comb(more, new) * share**new * (1 - share) ** (more - new)
                    found = self.decide(hits + new, asked)
                    if found is None:
                        later[hits + new] += q
                    else:
                        total += q * (found == verdict)
            undecided = later
        return total + sum(
            p for hits, p in undecided.items() if self._by_share(hits, samples) == verdict
        )

    def _by_share(self, hits: int, asked: int) -> Verdict:
        return "pass" if hits >= self.threshold * asked else "fail"

    def ask(
        self, samples: int, seed: int, answer: Callable[[Sequence[int]], Iterable[Observation]]
    ) -> Verdict:
        """Ask prompts of one cell until they decide.

        Args:
            samples: prompts that there are.
            seed: chooses their order, so that a cell stopped early has no favourite depth.
            answer: asks the prompts of these numbers.
        """
        order = list(range(samples))
        Random(f"adaptive/{seed}").shuffle(order)
        hits = asked = 0
        for first in range(0, samples, self.step):
            answers = list(answer(order[first : first + self.step]))
            # Out of memory, or a NaN in the logits: more of the same would not decide.
            if not answers or any(observation.correct is None for observation in answers):
                return "not measured"
            hits += sum(bool(observation.correct) for observation in answers)
            asked += len(answers)
            verdict = self.decide(hits, asked)
            if verdict is not None:
                return verdict
        return self._by_share(hits, asked)


def boundary(lengths: Sequence[int], measure: Callable[[int], Verdict]) -> int | None:
    """The longest length that passes, None if none is known to; few are asked.

    A failing length counts as failed only if the next longer one fails too.

    Args:
        lengths: ascending.
        measure: asked at most once for each.
    """
    known: dict[int, Verdict] = {}

    def ask(index: int) -> Verdict:
        if index not in known:
            known[index] = measure(lengths[index])
        return known[index]

    low, high = -1, len(lengths)  # passes; fails, or was not measured
    while high - low > 1:
        middle = (low + high) // 2
        verdict = ask(middle)
        if verdict == "pass":
            low = middle
        elif verdict == "fail" and middle + 1 < high and ask(middle + 1) == "pass":
            low = middle + 1  # a dip
        else:
            high = middle
    return None if low < 0 else lengths[low]
