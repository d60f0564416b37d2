"""Running a sweep: its units in order, each once and recorded, shared among processes.

Where memory is short, a pass over several lengths becomes one for each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeAlias

import torch
from torch import distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.fingerprint import json_digest
from longctx.scoring.batching import is_out_of_memory

from ..results.records import Record
from ..results.store import Store
from ..results.variants import Variant
from ..results.verification import Verification
from ..tasks.shared.adaptive import Adaptive, Verdict, boundary
from ..tasks.shared.answering import Answering
from ..tasks.shared.protocol import (
    Measured,
    Observation,
    OverCache,
    Plan,
    Resumable,
    Task,
    UnderWay,
    Unit,
)
from ..tasks.shared.retrieval import Retrieval
from .meter import Meter, cost
from .progress import Progress
from .verify import verify

__all__ = ["Job", "Ranks", "SweepRunner", "UnitRunner", "notes_before"]

_LONGEST = timedelta(days=7)  # that one process may have to wait for another's last unit
_Ask: TypeAlias = Callable[..., list[Record]]
_Told: TypeAlias = Callable[[int], None]
"""Told how many further prompts of a unit are finished."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    ranks: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """As the launcher's environment says; one process where there is none."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes the report."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether unit `number` is this process's to run."""
        return number % self.ranks == self.rank

    def wait(self) -> None:
        """Come back when all processes have called this."""
        if self.ranks == 1:
            return
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_LONGEST)
        distributed.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class Job:
    """One task under one method."""

    variant: Variant
    task: Task
    plan: Plan

    @property
    def label(self) -> str:
        """As the progress has it."""
        return f"{self.variant.label} {self.task.name}"


@dataclass(frozen=True, slots=True)
class UnitRunner:
    """A model, and the store that its results go to."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    store: Store
    batch_tokens: int

    def run(self, job: Job, unit: Unit, told: _Told = lambda finished: None) -> list[Record]:
        """Take a unit from the store, or run it and put it there; the method is in place.

        What is finished of it is kept as it comes, and an earlier run's is gone on from. Several
        records where a pass over all lengths did not fit and each had its own.
        """
        known = self.known(job, unit)
        if known:
            return known
        record = Record(
            key=self._key(job, unit),
            method=job.variant.label,
            task=job.task.name,
            lengths=unit.lengths,
            tokens=0,
            seconds=0.0,
            how="under way",
            observations=(),
        )
        earlier = self.store.parts(record.key)
        begin = last = time.perf_counter()

        def add(observations: Sequence[Observation], tokens: int) -> None:
            nonlocal last
            seconds, last = time.perf_counter() - last, time.perf_counter()
            part = replace(
                record, observations=tuple(observations), tokens=tokens, seconds=round(seconds, 3)
            )
            self.store.put_part(part)
            told(len(observations))

        observed = [one for part in earlier for one in part.observations]
        under_way = UnderWay(observed, sum(part.tokens for part in earlier), add)
        try:
            found = self._measured(job, unit, under_way)
            failed = None
        except BaseException as error:
            self.store.flush()
            if not is_out_of_memory(error):
                raise
            found = Measured((), unit.tokens, "failed")
            failed = f"out of memory at {max(unit.lengths)} tokens, one prompt at a time"
        if failed and len(unit.lengths) > 1:
            self.store.drop_parts(record.key)
            return [record for single in unit.by_length() for record in self.run(job, single)]
        seconds = time.perf_counter() - begin + sum(part.seconds for part in earlier)
        record = replace(
            record,
            tokens=found.tokens,
            seconds=round(seconds, 3),
            how=found.how,
            observations=found.observations,
            failed=failed,
            cache_bytes=found.cache_bytes,
        )
        table = found.per_token
        if table is not None:
            import pyarrow as pa

            table = table.add_column(0, "method", pa.repeat(job.variant.label, len(table)))
        return [self.store.put(record, table)]

    def _measured(self, job: Job, unit: Unit, under_way: UnderWay) -> Measured:
        reading, task, inputs = job.variant.reading, job.task, (self.model, self.tokenizer, unit)
        cache = job.variant.cache
        if cache is not None:
            assert isinstance(task, OverCache), "the sweep refuses other tasks"
            return task.measure_over_cache(*inputs, cache)
        if reading is not None:
            assert isinstance(task, Retrieval)
            return task.measure_in_pieces(*inputs, under_way, reading)
        batch_tokens, invariant = self.batch_tokens, job.variant.length_invariant
        # A task may measure in a way of its own, although what it derives from is resumable.
        if isinstance(task, Resumable) and type(task).measure is Resumable.measure:
            return task.measure_from(
                *inputs, under_way, batch_tokens=batch_tokens, length_invariant=invariant
            )
        return task.measure(*inputs, batch_tokens=batch_tokens, length_invariant=invariant)

    def finished(self, job: Job, unit: Unit) -> int:
        """How many prompts of a unit were finished by earlier runs."""
        if self.known(job, unit):
            return unit.prompts
        return sum(len(part.observations) for part in self.store.parts(self._key(job, unit)))

    def recorded(self, job: Job, unit: Unit) -> list[Record]:
        """The records of a unit that was run, failed ones too."""
        whole = self.store.last(self._key(job, unit))
        if whole is not None and not (whole.failed and len(unit.lengths) > 1):
            return [whole]
        singles = [] if len(unit.lengths) == 1 else unit.by_length()
        return [record for single in singles for record in self.recorded(job, single)]

    def known(self, job: Job, unit: Unit) -> list[Record]:
        """The records of a unit that was run before, as a whole or length by length; else none."""
        singles = [unit] if len(unit.lengths) == 1 else [unit, *unit.by_length()]
        found = [self.store.get(self._key(job, single)) for single in singles]
        if found[0] is not None:
            return [found[0]]
        rest = [record for record in found[1:] if record is not None]
        return rest if len(rest) == len(singles) - 1 > 0 else []

    def _key(self, job: Job, unit: Unit) -> str:
        task = [job.task.name, job.task.cache_key()]
        return json_digest(
            [self.store.identity, job.variant.record(), task, unit.lengths, unit.spec]
        )


def notes_before(jobs: Sequence[Job]) -> list[str]:
    """What is known before any work is done: of methods, and of the prompts."""
    methods = [f"{job.variant.label}: {job.variant.note}" for job in jobs if job.variant.note]
    return list(dict.fromkeys((*methods, *(note for job in jobs for note in job.plan.notes))))


@dataclass(frozen=True, slots=True)
class SweepRunner:
    """A sweep under way."""

    unit_runner: UnitRunner
    lengths: tuple[int, ...]
    adaptive: Adaptive | None
    ranks: Ranks

    def measure(self, jobs: Sequence[Job], *, replace: bool, progress: bool) -> None:
        """Run this process's share of all units, each method put on the model in turn.

        What a reader must know of methods and prompts is said before.
        """
        units = [[] if self._adapts(job) else list(job.plan.units) for job in jobs]
        finished = {
            (job.label, place): self.unit_runner.finished(job, unit)
            for job, those in zip(jobs, units, strict=True)
            for place, unit in enumerate(those)
        }
        known = sum(
            cost(unit) * finished[job.label, place] / unit.prompts
            for job, those in zip(jobs, units, strict=True)
            for place, unit in enumerate(those)
        )
        total = sum(cost(unit) for job in jobs for unit in job.plan.units)
        number = 0
        with Progress(total, known=known, shown=progress and self.ranks.first) as bar:
            for note in notes_before(jobs):
                bar.note(note)
            for turn, (job, those) in enumerate(zip(jobs, units, strict=True)):
                meter = Meter(bar, job.label, those)
                with job.variant.applied(self.unit_runner.model, replace=replace):
                    # Where each step depends on the last, whole jobs are shared out.
                    if self._adapts(job):

                        def ask(job: Job, unit: Unit, meter: Meter = meter) -> list[Record]:
                            meter.begin(unit)
                            found = self.unit_runner.run(job, unit, meter.add)
                            meter.end()
                            return found

                        if self.ranks.mine(turn):
                            self._walk(job, ask)
                        meter.fill(job.plan.units)
                    for place, unit in enumerate(those):
                        meter.begin(unit, finished[job.label, place])
                        if self.ranks.mine(number):
                            self.unit_runner.run(job, unit, meter.add)
                        number += 1
                        meter.end()

    def collect(self, job: Job) -> tuple[list[Record], list[str]]:
        """All records of a job, whichever process made them, and what is to be said of them."""
        return self._walk(job, self.unit_runner.recorded)

    def check(self, job: Job, count: int, *, replace: bool) -> Verification | None:
        """Generate `count` answers of a task that has some too; None for other tasks."""
        task = job.task
        if not isinstance(task, Retrieval | Answering) or not count:
            return None
        if job.variant.reading is not None or job.variant.cache is not None:
            return None
        records = self.collect(job)[0]
        model, tokenizer = self.unit_runner.model, self.unit_runner.tokenizer
        with job.variant.applied(model, replace=replace):
            return verify(model, tokenizer, job.variant.label, task, job.plan.units, records, count)

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
