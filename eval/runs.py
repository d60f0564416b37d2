"""Reading sweeps back for a comparison: run folders and results become named entries.

An entry is one method of one run. The folder is only read: no lock, nothing mended, so that a sweep
that is still writing there is not disturbed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from longctx.errors import RunError, nearest

from .records import Record, parts_of, read_records
from .results import Row, SweepResult
from .task import Observation

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
    model: str
    method: str
    tokenizer: str
    """Its digest."""
    original_window: int | None
    lengths: tuple[int, ...]
    specs: Mapping[str, Any]
    """Settings of each task, as JSON."""
    estimands: Mapping[str, str]
    cells: Mapping[tuple[str, int], Cell]
    """By task and length."""
    notes: tuple[str, ...]
    """What reading the run brought up."""


@dataclass(frozen=True, slots=True)
class _Swept:
    """What a result in memory and a folder have in common."""

    model: str
    identity: dict[str, str]
    original_window: int | None
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    specs: dict[str, Any]
    estimands: dict[str, str]
    rows: tuple[Row, ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...]


def entries_of(runs: Mapping[str, Source]) -> list[Entry]:
    """Read all runs; a run of several methods gives an entry for each, named `run/method`.

    A single run's entries go by their methods alone.

    Raises:
        RunError: a folder that is no finished sweep, an unknown method, or two entries of one name.
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
            found.append(_entry(title, swept, method))
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


def _entry(name: str, swept: _Swept, method: str) -> Entry:
    rows = [row for row in swept.rows if row.method == method]
    records = [record for record in swept.records if record.method == method]
    return Entry(
        name=name,
        model=swept.model,
        method=method,
        tokenizer=swept.identity["tokenizer"],
        original_window=swept.original_window,
        lengths=swept.lengths,
        specs=swept.specs,
        estimands=swept.estimands,
        cells={(row.task, row.length): _cell(row, records) for row in rows},
        notes=swept.notes,
    )


def _cell(row: Row, records: Sequence[Record]) -> Cell:
    found = {
        o.item: o
        for record in records
        if record.task == row.task
        for o in record.observations
        if o.length == row.length
    }
    mismatch = None
    if row.failed is None and row.n != len(found):
        mismatch = f"{len(found)} observations where the report's figure has {row.n}"
    elif row.failed is None and row.n and not _is_mean(row.nll, found.values()):
        mismatch = "other observations than the report's figure is taken over"
    return Cell(row, found, mismatch)


def _is_mean(nll: float, observations: Iterable[Observation]) -> bool:
    """Whether a reported NLL comes from these observations: they may be of other settings."""
    found = list(observations)
    targets = sum(o.targets for o in found)
    return not targets or math.isclose(nll, math.fsum(o.nll for o in found) / targets)


def _of_result(result: SweepResult) -> _Swept:
    return _Swept(
        model=result.model,
        identity=result.identity,
        original_window=result.original_window,
        lengths=result.lengths,
        methods=tuple(variant.label for variant in result.variants),
        specs={task.name: task.spec() for task in result.tasks},
        estimands={task.name: task.estimand for task in result.tasks},
        rows=result.rows,
        records=result.records,
        notes=(),
    )


def _of_folder(folder: Path) -> _Swept:
    if not folder.is_dir():
        raise RunError(f"no folder {folder}: expected one that `longctx sweep --out` wrote.")
    path = folder / "sweep.json"
    if not path.exists():
        raise RunError(
            f"{folder} holds no sweep.json, which a sweep writes at its end: finish it by the same "
            "`longctx sweep` command, or name another folder."
        )
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        identity = {str(key): str(value) for key, value in report["identity"].items()}
        records, notes = _read_records(folder, identity)
        # Another sweep into this folder leaves records that this report is not about.
        own = set(report.get("records", records))
        return _Swept(
            model=str(report["model"]),
            identity=identity,
            original_window=report["original_window"],
            lengths=tuple(report["lengths"]),
            methods=tuple(str(method["label"]) for method in report["methods"]),
            specs={task["name"]: task["spec"] for task in report["tasks"]},
            estimands={task["name"]: task["estimand"] for task in report["tasks"]},
            rows=tuple(_row(fields) for fields in report["rows"]),
            records=tuple(record for key, record in records.items() if key in own),
            notes=notes,
        )
    except RunError:
        raise
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is no report of a sweep ({error!r}): write it anew by the same `longctx "
            "sweep` command, which does not compute known results again."
        ) from error


def _row(fields: dict[str, Any]) -> Row:
    """A row of sweep.json, where NaN and infinity are null."""
    for key in ("value", "low", "high", "nll"):
        if fields[key] is None:
            fields[key] = math.nan
    return Row(**fields)


def _read_records(
    folder: Path, identity: dict[str, str]
) -> tuple[dict[str, Record], tuple[str, ...]]:
    """The records of all processes of a sweep by key (the last one counts), and notes."""
    first = folder / "results.jsonl"
    if not first.exists():
        raise RunError(
            f"{folder} holds a report but no results.jsonl, where the single answers are that a "
            "comparison pairs: put it back, or sweep again."
        )
    found: dict[str, Record] = {}
    notes: list[str] = []
    for path in parts_of(first):
        found |= read_records(path, identity)
        cut = path.read_bytes().rpartition(b"\n")[2]
        if cut:
            notes.append(f"{path}: the last line is cut off ({len(cut)} bytes) and left out")
    return found, tuple(notes)
