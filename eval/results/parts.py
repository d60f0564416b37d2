"""The parts of a task as rows of their own: RULER's thirteen, beside their mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .sweep_result import Row, SweepResult, rows_of

__all__ = ["part_rows"]


def part_rows(result: SweepResult) -> list[Row]:
    """A row for each method, part and length of tasks that have parts, called TASK/PART.

    A part is what an observation's details call so; parts come in the order of the records.
    """
    found: list[Row] = []
    for variant in result.variants:
        for task in result.tasks:
            records = [
                record
                for record in result.records
                if (record.method, record.task) == (variant.label, task.name)
            ]
            for part in _parts(result, task.name):
                own = [
                    dataclasses.replace(record, observations=kept)
                    for record in records
                    if (kept := tuple(o for o in record.observations if _part(o.detail) == part))
                ]
                lengths = sorted({o.length for record in own for o in record.observations})
                rows = rows_of(variant, task, lengths, own)
                found += [dataclasses.replace(row, task=f"{task.name}/{part}") for row in rows]
    return found


def _parts(result: SweepResult, task: str) -> Sequence[str]:
    observations = (o for r in result.records if r.task == task for o in r.observations)
    return list(dict.fromkeys(part for o in observations if (part := _part(o.detail))))


def _part(detail: dict[str, object]) -> str:
    return str(detail.get("part", ""))
