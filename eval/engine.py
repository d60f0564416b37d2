"""Running the units of a sweep: each once, recorded, with the way out where memory is short."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.batches import is_out_of_memory
from longctx.fingerprint import json_digest

from .records import Record
from .store import Store
from .task import Measured, Plan, Task, Unit
from .variants import Variant

__all__ = ["Engine", "Job", "cost"]


@dataclass(frozen=True, slots=True)
class Job:
    """One task under one method."""

    variant: Variant
    task: Task
    plan: Plan


@dataclass(frozen=True, slots=True)
class Engine:
    """A model, and the store that its results go to."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    store: Store
    batch_tokens: int

    def run(self, job: Job, unit: Unit) -> list[Record]:
        """Take a unit from the store, or run it and put it there; the method is in place.

        Several records where a pass over all lengths did not fit and each had its own.
        """
        known = self.known(job, unit)
        if known:
            return known
        begin = time.perf_counter()
        try:
            found = job.task.measure(
                self.model,
                self.tokenizer,
                unit,
                batch_tokens=self.batch_tokens,
                length_invariant=job.variant.length_invariant,
            )
            failed = None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = Measured((), unit.tokens, "failed")
            failed = f"out of memory at {max(unit.lengths)} tokens, one prompt at a time"
        if failed and len(unit.lengths) > 1:
            return [record for single in unit.alone() for record in self.run(job, single)]
        record = Record(
            key=self._key(job, unit),
            method=job.variant.label,
            task=job.task.name,
            lengths=unit.lengths,
            tokens=found.tokens,
            seconds=round(time.perf_counter() - begin, 3),
            how=found.how,
            observations=found.observations,
            failed=failed,
        )
        table = found.per_token
        if table is not None:
            import pyarrow as pa

            table = table.add_column(0, "method", pa.repeat(job.variant.label, len(table)))
        return [self.store.put(record, table)]

    def recorded(self, job: Job, unit: Unit) -> list[Record]:
        """The records of a unit that was run, failed ones too."""
        whole = self.store.last(self._key(job, unit))
        if whole is not None and not (whole.failed and len(unit.lengths) > 1):
            return [whole]
        singles = [] if len(unit.lengths) == 1 else unit.alone()
        return [record for single in singles for record in self.recorded(job, single)]

    def known(self, job: Job, unit: Unit) -> list[Record]:
        """The records of a unit that was run before, as a whole or length by length; else none."""
        singles = [unit] if len(unit.lengths) == 1 else [unit, *unit.alone()]
        found = [self.store.get(self._key(job, single)) for single in singles]
        if found[0] is not None:
            return [found[0]]
        rest = [record for record in found[1:] if record is not None]
        return rest if len(rest) == len(singles) - 1 > 0 else []

    def _key(self, job: Job, unit: Unit) -> str:
        task = [job.task.name, job.task.spec()]
        return json_digest(
            [self.store.identity, job.variant.record(), task, unit.lengths, unit.spec]
        )


def cost(units: Iterable[Unit]) -> float:
    """Time to expect, up to a factor: attention grows with the length, the rest does not."""
    return sum(unit.tokens * (1 + max(unit.lengths) / 8192) for unit in units)
