"""Reading sweeps back for a comparison: run folders and results become named entries.

An entry is one method of one run. The folder is only read: no lock, nothing mended, so that a sweep
that is still writing there is not disturbed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from longctx.errors import LongctxError, RunError, nearest
from longctx.registry import parse_methods
from longctx.scoring.compressed_caches import parse_cache

from ..results.reader import SweepData, data_of, mismatch, read_sweep
from ..results.sweep_result import Row, SweepResult
from ..results.variants import label, label_of
from ..tasks.shared.protocol import Observation

__all__ = ["Cell", "Entry", "Source", "entries_of"]

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
class Entry:
    """One method of one run."""

    name: str
    method: str
    sweep: SweepData
    cells: Mapping[tuple[str, int], Cell]
    """By task and length."""
    notes: tuple[str, ...]
    """What the sweep and reading it brought up."""


def entries_of(runs: Mapping[str, Source]) -> list[Entry]:
    """Read all runs; a run of several methods gives an entry for each, named `run/method`.

    A single run's entries go by their methods alone.

    Raises:
        RunError: a folder that is not a finished sweep, an unknown method, or two entries of one
            name.
    """
    found: list[Entry] = []
    for name, source in runs.items():
        sweep, methods = _open(source)
        for method in methods:
            if len(runs) == 1:
                title = method
            elif len(methods) == 1:
                title = name
            else:
                title = f"{name}/{method}"
            if any(entry.name == title for entry in found):
                raise RunError(f"two entries are named {title!r}: give the runs other names.")
            found.append(_entry(title, sweep, method, "" if len(runs) == 1 else f"{name}: "))
    return found


def _open(source: Source) -> tuple[SweepData, tuple[str, ...]]:
    """A run and those of its methods that are asked for."""
    if isinstance(source, SweepResult):
        sweep = data_of(source)
        return sweep, sweep.methods
    text = os.fspath(source)
    if Path(text).is_dir():  # its name may hold a "#"
        sweep = _read(Path(text))
        return sweep, sweep.methods
    folder, mark, method = text.partition("#")
    sweep = _read(Path(folder))
    if mark and method not in sweep.methods:
        method = _labelled(method)
    if mark and method not in sweep.methods:
        raise RunError(
            f"{folder} holds no method {method!r}{nearest(method, sweep.methods)} (methods: "
            f"{', '.join(sweep.methods)})"
        )
    return sweep, ((method,) if mark else sweep.methods)


def _labelled(method: str) -> str:
    """A method as a sweep labels it, however it was typed; what is none stays as it is."""
    name, dot, cache = method.partition("·")
    try:
        known = " + ".join(map(label, parse_methods(name))) or name.strip()
        kind = parse_cache(cache) if dot else None
    except LongctxError:
        return method
    return known if kind is None else label_of(known, kind)


def _read(folder: Path) -> SweepData:
    sweep = read_sweep(folder)
    if sweep.records is None:
        raise RunError(
            f"{folder} holds a report but no results.jsonl, where the single answers are that a "
            "comparison pairs: put it back, or sweep again."
        )
    return sweep


def _entry(name: str, sweep: SweepData, method: str, of_run: str) -> Entry:
    return Entry(
        name=name,
        method=method,
        sweep=sweep,
        cells={
            (row.task, row.length): _cell(row, sweep) for row in sweep.rows if row.method == method
        },
        notes=tuple(f"{of_run}{note}" for note in (*sweep.notes, *sweep.reading_notes)),
    )


def _cell(row: Row, sweep: SweepData) -> Cell:
    found = {o.item: o for o in sweep.observations(row.task, row.method, row.length)}
    return Cell(row, found, mismatch(row, found.values()))
