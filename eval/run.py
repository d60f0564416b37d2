"""The course of a sweep: which units are run, in which order, by which process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .adaptive import Adaptive, Verdict, boundary
from .engine import Engine, Job, cost
from .progress import Progress
from .ranks import Ranks
from .records import Record
from .retrieval import Retrieval
from .task import Observation
from .verify import Verification, verify

__all__ = ["Run"]

_Ask: TypeAlias = Callable[..., list[Record]]


@dataclass(frozen=True, slots=True)
class Run:
    """A sweep under way."""

    engine: Engine
    lengths: tuple[int, ...]
    adaptive: Adaptive | None
    ranks: Ranks

    def measure(self, jobs: Sequence[Job], *, replace: bool, progress: bool) -> None:
        """Run this process's share of all units, each method put on the model in turn."""
        total = sum(cost(job.plan.units) for job in jobs)
        number = 0
        with Progress(total, shown=progress and self.ranks.first) as bar:
            for turn, job in enumerate(jobs):
                with job.variant.applied(self.engine.model, replace=replace):
                    # Where each step depends on the last, whole jobs are shared out.
                    if self._adapts(job):
                        bar.at(f"{job.variant.label} {job.task.name}")
                        if self.ranks.mine(turn):
                            self._walk(job, self.engine.run)
                        bar.advance(cost(job.plan.units))
                        continue
                    for unit in job.plan.units:
                        bar.at(f"{job.variant.label} {job.task.name} {max(unit.lengths)}")
                        if self.ranks.mine(number):
                            self.engine.run(job, unit)
                        number += 1
                        bar.advance(cost((unit,)))

    def collect(self, job: Job) -> tuple[list[Record], list[str]]:
        """All records of a job, whichever process made them, and what is to be said of them."""
        return self._walk(job, self.engine.recorded)

    def check(self, job: Job, count: int, *, replace: bool) -> Verification | None:
        """Generate `count` answers of a retrieval task too; None for other tasks."""
        if not isinstance(job.task, Retrieval) or not count:
            return None
        records = self.collect(job)[0]
        model, tokenizer = self.engine.model, self.engine.tokenizer
        with job.variant.applied(model, replace=replace):
            return verify(
                model, tokenizer, job.variant.label, job.task, job.plan.units, records, count
            )

    def _adapts(self, job: Job) -> bool:
        return self.adaptive is not None and isinstance(job.task, Retrieval)

    def _walk(self, job: Job, ask: _Ask) -> tuple[list[Record], list[str]]:
        """Ask the units of a job, all or as many as decide."""
        task, adaptive = job.task, self.adaptive
        if adaptive is None or not isinstance(task, Retrieval):
            return [record for unit in job.plan.units for record in ask(job, unit)], []
        found: list[Record] = []
        lost: list[int] = []

        def measure(length: int) -> Verdict:
            def answer(indices: Sequence[int]) -> list[Observation]:
                records = ask(job, task.part(length, indices, self.lengths[-1]))
                found.extend(records)
                return [o for record in records for o in record.observations]

            verdict = adaptive.ask(task.samples, task.seed, answer)
            if verdict == "not measured":
                lost.append(length)
            return verdict

        reached = boundary(self.lengths, measure)
        asked = sum(len(record.observations) for record in found)
        tokens, planned = (sum(unit.tokens for unit in units) for units in (found, job.plan.units))
        wrong = [f"{error:.0%}" for error in adaptive.errors(task.samples)]
        low, high = adaptive.threshold - adaptive.margin, adaptive.threshold + adaptive.margin
        return found, [
            f"{task.name} under {job.variant.label}: {_reach(reached, self.lengths, lost)} at a "
            f"share of {adaptive.threshold:.0%} (with at most {task.samples} prompts a length "
            f"passes wrongly at a true share of {low:.0%} with probability {wrong[0]}, and fails "
            f"wrongly at {high:.0%} with {wrong[1]}: more prompts (--samples) make both smaller; "
            f"shorter lengths that were not asked are taken to pass); {asked} of "
            f"{task.samples * len(self.lengths)} prompts asked (intervals do not allow for the "
            f"early stop), {tokens:,} tokens forwarded where "
            f"all prompts have {planned:,}"
        ]


def _reach(reached: int | None, lengths: Sequence[int], lost: Sequence[int]) -> str:
    """How far a model reads, where some lengths could not be measured."""
    begun = 0 if reached is None else lengths.index(reached) + 1
    if begun < len(lengths) and lengths[begun] in lost:
        known = f"reads to {reached:,} tokens at least" if reached else "how far it reads is open"
        return f"{known} ({', '.join(f'{n:,}' for n in sorted(lost))} tokens: not measured)"
    return f"reads to {reached:,} tokens" if reached else f"reads less than {lengths[0]:,} tokens"
