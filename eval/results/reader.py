"""A sweep as all that shows or compares it reads it: from its folder, or from memory.

`read_sweep` reads what `longctx sweep --out` wrote, `data_of` a result that was just measured.
Unlike `Store` reading takes no lock and changes nothing: a sweep may be writing there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from longctx.errors import RunError
from longctx.schema import conform, parse

from ..tasks.shared.protocol import Observation
from .records import Record, parts_of, read_parts
from .schemas import StoredCells, StoredRow, StoredSweep, StoredTask
from .sweep_result import Row, SweepResult, estimand_text
from .verification import Verification

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SWEEP_FILE",
    "SweepData",
    "TaskSettings",
    "data_of",
    "mismatch",
    "read_cells",
    "read_sweep",
    "refuse_other_records",
]

SWEEP_FILE, _RESULTS = "sweep.json", "results.jsonl"
_AGAIN = (
    "It is damaged, or another release wrote it. Run the same `longctx sweep` again with "
    "--overwrite; it goes on from its results."
)
_TOKENS = ["method", "document", "length", "context", "nll"]


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


@dataclass(frozen=True)
class SweepData:
    """What a sweep found, and how; observations and rows are indexed once, when first asked for."""

    model: str
    identity: dict[str, str]
    """Digests of model, tokenizer and chat template, and the attention implementation's name."""
    original_window: int | None
    lengths: tuple[int, ...]
    """Ascending."""
    methods: tuple[str, ...]
    """Labels, in the order of the sweep."""
    tasks: dict[str, TaskSettings]
    """By name, in the order of the sweep."""
    rows: tuple[Row, ...]
    records: tuple[Record, ...] | None
    """Those that the rows summarise; None where no results file is there."""
    adaptive: str | None
    """The rule by which cells were asked no further; None if all prompts were."""
    verified: tuple[Verification, ...]
    notes: tuple[str, ...]
    """What the sweep noted."""
    folder: Path | None = None
    source: dict[str, Any] | None = None
    """sweep.json as it is."""
    reading_notes: tuple[str, ...] = ()
    """What reading the folder brought up."""

    def cells(self, task: str, method: str) -> list[Row]:
        """Rows of one task and method by length."""
        return self._rows.get((task, method), [])

    def observations(self, task: str, method: str, length: int | None = None) -> list[Observation]:
        """Observations of one task and method by length, in the order of the file within each."""
        lengths = self.lengths if length is None else (length,)
        return [o for n in lengths for o in self._observations.get((task, method, n), ())]

    def is_share(self, task: str) -> bool:
        """Whether the task's values are shares, to be shown in percent; else perplexities."""
        return self.tasks[task].scale == "share"

    def is_higher_better(self, task: str) -> bool:
        """Which way of two values is the better one."""
        return self.tasks[task].higher_is_better

    def is_answered(self, task: str) -> bool:
        """Whether its prompts have one right answer: those have depths and an effective length."""
        return task in self._answered

    def token_frame(self) -> pd.DataFrame | None:
        """Scores of single tokens, None where there are none or some are missing.

        Raises:
            RunError: a file that is not a parquet table of them.
        """
        import pandas as pd

        paths = self._token_files
        if not paths or not all(path.exists() for path in paths):
            return None
        return pd.concat([_read_tokens(path) for path in paths], ignore_index=True)

    def missing_tokens(self) -> int:
        """How many files of token scores the records speak of that are not there."""
        return sum(not path.exists() for path in self._token_files)

    @cached_property
    def _rows(self) -> dict[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.length):
            found.setdefault((row.task, row.method), []).append(row)
        return found

    @cached_property
    def _observations(self) -> dict[tuple[str, str, int], list[Observation]]:
        found: dict[tuple[str, str, int], list[Observation]] = {}
        for record in self.records or ():
            for one in record.observations:
                found.setdefault((record.task, record.method, one.length), []).append(one)
        return found

    @cached_property
    def _answered(self) -> set[str]:
        answers = self._observations.items()
        return {task for (task, *_), found in answers if any(o.correct is not None for o in found)}

    @cached_property
    def _token_files(self) -> list[Path]:
        if self.folder is None:
            return []
        keys = [record.key for record in self.records or () if record.per_token]
        return [self.folder / "tokens" / f"{key}.parquet" for key in keys]


def data_of(result: SweepResult) -> SweepData:
    """A result in memory."""
    return SweepData(
        model=result.model,
        identity=result.identity,
        original_window=result.original_window,
        lengths=tuple(sorted(result.lengths)),
        methods=tuple(variant.label for variant in result.variants),
        tasks={
            task.name: TaskSettings(
                cache_key=task.cache_key(),
                report_identity=task.report_identity(),
                estimand=estimand_text(task, result.adaptive),
                scale=task.scale,
                higher_is_better=task.higher_is_better,
                figure=task.figure,
            )
            for task in result.tasks
        },
        rows=result.rows,
        records=result.records,
        adaptive=None if result.adaptive is None else str(result.adaptive),
        verified=result.verified,
        notes=result.notes,
        folder=None if result.results is None else result.results.parent,
    )


def read_cells(path: Path, next_step: str) -> StoredCells:
    """Which cells a sweep.json is about, and of which model.

    Raises:
        RunError: it cannot be read, or is not a sweep.json.
    """
    return parse(_text(path), StoredCells, path, next_step=next_step)


def read_sweep(path: Path) -> SweepData:
    """Read the folder that `longctx sweep --out` wrote.

    Raises:
        RunError: no such folder, no report in it, or a damaged file.
    """
    if not path.is_dir():
        raise RunError(f"no folder {path}: expected one that `longctx sweep --out` wrote.")
    report_path = path / SWEEP_FILE
    if not report_path.is_file():
        raise RunError(
            f"{path} holds no {SWEEP_FILE}, which a sweep writes at its end: finish it by the same "
            "`longctx sweep` command, which goes on where it was, or name another folder."
        )
    source: dict[str, Any] = parse(_text(report_path), dict, report_path, next_step=_AGAIN)
    stored = conform(source, StoredSweep, report_path, next_step=_AGAIN)
    records, notes = _read_records(path, stored)
    return SweepData(
        model=stored.model,
        identity=stored.identity,
        original_window=stored.original_window,
        lengths=tuple(sorted(stored.lengths)),
        methods=tuple(method.label for method in stored.methods),
        tasks={task.name: _task(task) for task in stored.tasks},
        rows=tuple(map(_row, stored.rows)),
        records=records,
        adaptive=stored.adaptive,
        verified=tuple(
            Verification(v.method, v.task, v.checked, tuple(v.disagreements), tuple(v.lost))
            for v in stored.verified
        ),
        notes=tuple(stored.notes),
        folder=path,
        source=source,
        reading_notes=notes,
    )


def mismatch(row: Row, observations: Iterable[Observation]) -> str | None:
    """Why these are not the observations that a row was made from: they may be of other settings.

    None if they are.
    """
    found = list(observations)
    if len(found) != row.n:
        s = "" if len(found) == 1 else "s"
        return f"{len(found)} observation{s} where the report's figure has {row.n}"
    targets = sum(o.targets for o in found)
    nll = math.fsum(o.nll for o in found) / targets if targets else math.nan
    same = math.isclose(nll, row.nll) or (math.isnan(nll) and math.isnan(row.nll))
    unanswered = {o.correct is None for o in found}
    if targets != row.targets or not same or (len(unanswered) == 2 and not row.failed):
        return "other observations than the report's figure is taken over"
    return None


def refuse_other_records(sweep: SweepData) -> None:
    """Refuse records that are not those that the report was made from (RunError)."""
    if sweep.records is None:
        return
    for row in sweep.rows:
        found = sweep.observations(row.task, row.method, row.length)
        if wrong := mismatch(row, found):
            raise RunError(
                f"{sweep.folder} holds {wrong} ({row.task} under {row.method} at {row.length:,} "
                "tokens): run the same `longctx sweep` again (known results are not computed "
                "again), or use a folder for each setting."
            )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: expected JSON that can be read ({error}). {_AGAIN}") from error


def _task(stored: StoredTask) -> TaskSettings:
    return TaskSettings(
        cache_key=stored.spec,
        report_identity=stored.spec if stored.scope is None else stored.scope,
        estimand=stored.estimand,
        scale=stored.scale,
        higher_is_better=stored.higher_is_better,
        figure=stored.figure,
    )


def _row(stored: StoredRow) -> Row:
    """A report has null where a figure is NaN; where null is a value of its own it stays."""
    fields: dict[str, Any] = msgspec.structs.asdict(stored)
    figures = ("value", "low", "high", "nll")
    fields |= {name: math.nan for name in figures if fields[name] is None}
    return Row(**fields)


def _read_records(
    path: Path, stored: StoredSweep
) -> tuple[tuple[Record, ...] | None, tuple[str, ...]]:
    """The records that a report is about, and notes; None where no results file is there.

    Another sweep into this folder leaves records that this report is not about.
    """
    parts = parts_of(path / _RESULTS)
    if not parts:
        return None, ()
    try:
        known = read_parts(path / _RESULTS, stored.identity)
        cuts = {part: part.read_bytes().rpartition(b"\n")[2] for part in parts}
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}.") from error
    notes = tuple(
        f"{part}: the last line is cut off ({len(cut)} bytes) and left out"
        for part, cut in cuts.items()
        if cut
    )
    return tuple(known[key] for key in stored.records if key in known), notes


def _read_tokens(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        frame: Any = pd.read_parquet(path, columns=_TOKENS)
        for name, kinds in (("length", "iu"), ("context", "iu"), ("nll", "f")):
            if frame[name].dtype.kind not in kinds:
                raise ValueError(f"{name} is {frame[name].dtype}")
        if frame.empty or frame["context"].min() < 0:
            raise ValueError("no tokens, or some before the first")
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"{path} holds no scores of single tokens ({error}): delete it and run the "
            "sweep again, which computes only what is missing."
        ) from error
    return frame
