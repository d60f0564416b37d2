"""Reading sweeps back for a comparison: run folders and results become named entries.

An entry is one method of one run. The folder is only read: no lock, nothing mended, so that a sweep
that is still writing there is not disturbed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from longctx.errors import RunError, nearest

from ..results.reader import mismatch, read_folder
from ..results.records import Record
from ..results.sweep_result import Row, SweepResult
from ..tasks.protocol import Observation

__all__ = ["Cell", "Entry", "Source", "TaskSettings", "entries_of"]

Source: TypeAlias = str | os.PathLike[str] | SweepResult
"""A folder that `longctx sweep --out` wrote, "FOLDER#METHOD", or a result in memory."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of a sweep and the observations behind it."""

    row: Row
    observations: Mapping[str, Observation]
    """By item."""
    mismatch: str | None
    """Why these observations are not those that the figure was taken over; None if they are."""


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """A task as a sweep had it."""

    cache_key: dict[str, Any]
    """Its settings, as JSON."""
    report_identity: dict[str, Any]
    """Those and all else that its figures depend on."""
    estimand: str
    scale: Literal["share", "perplexity"]
    higher_is_better: bool
    figure: str | None
    """Where an observation's details hold its own share (`Task.figure`)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One method of one run."""

    name: str
    model: str
    method: str
    tokenizer: str
    """Its digest."""
    chat_template: str
    """Its digest."""
    original_window: int | None
    lengths: tuple[int, ...]
    tasks: Mapping[str, TaskSettings]
    cells: Mapping[tuple[str, int], Cell]
    """By task and length."""
    adaptive: bool
    """Whether cells were asked no further once they were decided."""
    notes: tuple[str, ...]
    """What the sweep and reading it brought up."""


@dataclass(frozen=True, slots=True)
class _Swept:
    """What a result in memory and a folder have in common."""

    model: str
    identity: dict[str, str]
    original_window: int | None
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    tasks: dict[str, TaskSettings]
    rows: tuple[Row, ...]
    records: tuple[Record, ...]
    adaptive: bool
    notes: tuple[str, ...]


def entries_of(runs: Mapping[str, Source]) -> list[Entry]:
    """Read all runs; a run of several methods gives an entry for each, named `run/method`.

    A single run's entries go by their methods alone.

    Raises:
        RunError: a folder that is not a finished sweep, an unknown method, or two entries of one
            name.
    """
    found: list[Entry] = []
    for name, source in runs.items():
        swept, methods = _open(source)
        for method in methods:
            if len(runs) == 1:
                title = method
            elif len(methods) == 1:
                title = name
            else:
                title = f"{name}/{method}"
            if any(entry.name == title for entry in found):
                raise RunError(f"two entries are named {title!r}: give the runs other names.")
            found.append(_entry(title, swept, method, "" if len(runs) == 1 else f"{name}: "))
    return found


def _open(source: Source) -> tuple[_Swept, tuple[str, ...]]:
    """A run and those of its methods that are asked for."""
    if isinstance(source, SweepResult):
        swept = _of_result(source)
        return swept, swept.methods
    text = os.fspath(source)
    if Path(text).is_dir():  # its name may hold a "#"
        swept = _of_folder(Path(text))
        return swept, swept.methods
    folder, mark, method = text.partition("#")
    swept = _of_folder(Path(folder))
    if mark and method not in swept.methods:
        raise RunError(
            f"{folder} holds no method {method!r}{nearest(method, swept.methods)} (methods: "
            f"{', '.join(swept.methods)})"
        )
    return swept, ((method,) if mark else swept.methods)


def _entry(name: str, swept: _Swept, method: str, of_run: str) -> Entry:
    rows = [row for row in swept.rows if row.method == method]
    records = [record for record in swept.records if record.method == method]
    return Entry(
        name=name,
        model=swept.model,
        method=method,
        tokenizer=swept.identity["tokenizer"],
        chat_template=swept.identity.get("chat template", ""),
        original_window=swept.original_window,
        lengths=swept.lengths,
        tasks=swept.tasks,
        cells={(row.task, row.length): _cell(row, records) for row in rows},
        adaptive=swept.adaptive,
        notes=tuple(f"{of_run}{note}" for note in swept.notes),
    )


def _cell(row: Row, records: Sequence[Record]) -> Cell:
    found = {
        o.item: o
        for record in records
        if record.task == row.task
        for o in record.observations
        if o.length == row.length
    }
    return Cell(row, found, mismatch(row, found.values()))


def _of_result(result: SweepResult) -> _Swept:
    return _Swept(
        model=result.model,
        identity=result.identity,
        original_window=result.original_window,
        lengths=result.lengths,
        methods=tuple(variant.label for variant in result.variants),
        tasks={
            task.name: TaskSettings(
                task.cache_key(),
                task.report_identity(),
                task.estimand,
                task.scale,
                task.higher_is_better,
                task.figure,
            )
            for task in result.tasks
        },
        rows=result.rows,
        records=result.records,
        adaptive=result.adaptive is not None,
        notes=result.notes,
    )


def _of_folder(folder: Path) -> _Swept:
    found = read_folder(folder)
    if found.records is None:
        raise RunError(
            f"{folder} holds a report but no results.jsonl, where the single answers are that a "
            "comparison pairs: put it back, or sweep again."
        )
    report = found.report
    return _Swept(
        model=str(report["model"]),
        identity=report["identity"],
        original_window=report["original_window"],
        lengths=tuple(report["lengths"]),
        methods=tuple(str(method["label"]) for method in report["methods"]),
        tasks={
            task["name"]: TaskSettings(
                task["spec"],
                task.get("scope", task["spec"]),
                task["estimand"],
                task["scale"],
                task["higher_is_better"],
                task["figure"],
            )
            for task in report["tasks"]
        },
        rows=found.rows,
        records=found.records,
        adaptive=report.get("adaptive") is not None,
        notes=(*report["notes"], *found.notes),
    )
