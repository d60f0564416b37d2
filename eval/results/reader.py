"""Reading the folder of a sweep back: its report, and the records that the report was made from.

`read_folder` takes a folder as it is; `read_sweep` refuses one whose parts do not belong together.
Unlike `Store` this takes no lock and changes nothing: it may be read while a sweep writes there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import RunError

from ..tasks.protocol import Observation
from .records import Record, parts_of, read_parts
from .sweep_result import Row

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Folder", "SweepFolder", "mismatch", "read_folder", "read_sweep"]

_REPORT, _RESULTS = "sweep.json", "results.jsonl"
_KEYS = ("model", "identity", "original_window", "lengths", "methods", "notes")


@dataclass(frozen=True, slots=True)
class Folder:
    """What a sweep left in its folder."""

    path: Path
    report: dict[str, Any]
    """sweep.json as it is."""
    rows: tuple[Row, ...]
    """Its rows; null is NaN."""
    records: tuple[Record, ...] | None
    """Those that the rows summarise; None where no results file is there."""
    notes: tuple[str, ...]
    """What reading brought up."""


def read_folder(path: Path) -> Folder:
    """Read the folder that `longctx sweep --out` wrote.

    Raises:
        RunError: no such folder, no report in it, one of an earlier release, or a damaged file.
    """
    if not path.is_dir():
        raise RunError(f"no folder {path}: expected one that `longctx sweep --out` wrote.")
    report_path, first = path / _REPORT, path / _RESULTS
    if not report_path.is_file():
        raise RunError(
            f"{path} holds no {_REPORT}, which a sweep writes at its end: finish it by the same "
            "`longctx sweep` command, which goes on where it was, or name another folder."
        )
    again = "run the same `longctx sweep` again with --overwrite; it goes on from its results."
    try:
        report: dict[str, Any] = json.loads(report_path.read_text(encoding="utf-8"))
        rows = tuple(Row(**_nan(row)) for row in report["rows"])
        keys, tasks = list(map(str, report["records"])), list(report["tasks"])
        identity = {str(key): str(value) for key, value in report["identity"].items()}
        lacking = [key for key in _KEYS if key not in report]
        lacking += [k for task in tasks for k in ("name", "estimand", "spec") if k not in task]
        if lacking:
            raise KeyError(*lacking)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{report_path} is not a report of a sweep ({error!r}): {again}") from error
    for task in tasks:
        if not {"scale", "higher_is_better", "figure"} <= set(task):
            raise RunError(
                f"{report_path} is of an earlier release and does not say what the figures of "
                f"{task['name']} are: {again}"
            )
    parts = parts_of(first)
    if not parts:
        return Folder(path, report, rows, None, ())
    try:
        # Another sweep into this folder leaves records that this report is not about.
        known = read_parts(first, identity)
        cuts = {part: part.read_bytes().rpartition(b"\n")[2] for part in parts}
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}.") from error
    notes = tuple(
        f"{part}: the last line is cut off ({len(cut)} bytes) and left out"
        for part, cut in cuts.items()
        if cut
    )
    return Folder(path, report, rows, tuple(known[key] for key in keys if key in known), notes)


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
    if targets != row.targets or not same:
        return "other observations than the report's figure is taken over"
    return None


def _nan(row: dict[str, Any]) -> dict[str, Any]:
    """A report has null where a figure is NaN; where null is a value of its own it stays."""
    figures = ("value", "low", "high", "nll")
    return {k: math.nan if v is None and k in figures else v for k, v in row.items()}


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """What a sweep left in its folder."""

    folder: Path
    report: dict[str, Any]
    """sweep.json as it is."""
    rows: tuple[Row, ...]
    """Its rows; null is NaN."""
    records: tuple[Record, ...]
    """The lines of the results file that the rows summarise; none where no such file is there."""
    notes: tuple[str, ...] = ()
    """What could not be read, and what is missing from the page for it."""

    @property
    def methods(self) -> list[str]:
        """Labels, in the order of the sweep."""
        return [method["label"] for method in self.report["methods"]]

    @property
    def tasks(self) -> list[str]:
        """Names, in the order of the sweep."""
        return [task["name"] for task in self.report["tasks"]]

    def cells(self, task: str, method: str) -> list[Row]:
        """Rows of one task and method by length."""
        found = [row for row in self.rows if (row.task, row.method) == (task, method)]
        return sorted(found, key=lambda row: row.length)

    def observations(self, task: str, method: str) -> list[Observation]:
        """Observations of one task and method, in the order of the file."""
        return [
            observation
            for record in self.records
            if (record.task, record.method) == (task, method)
            for observation in record.observations
            if observation.length in self.report["lengths"]
        ]

    def is_share(self, task: str) -> bool:
        """Whether the task's values are shares, to be shown in percent; else perplexities."""
        scales = {found["name"]: found["scale"] for found in self.report["tasks"]}
        return scales[task] == "share"

    def is_higher_better(self, task: str) -> bool:
        """Which way of two values is the better one."""
        return bool(next(t["higher_is_better"] for t in self.report["tasks"] if t["name"] == task))

    def is_answered(self, task: str) -> bool:
        """Whether its prompts have one right answer: those have depths and an effective length."""
        return any(
            observation.correct is not None
            for method in self.methods
            for observation in self.observations(task, method)
        )

    def token_frame(self) -> pd.DataFrame | None:
        """Scores of single tokens, None where there are none or some are missing.

        Raises:
            RunError: a file that is not a parquet table of them.
        """
        import pandas as pd

        paths = self._token_files()
        if not paths or not all(path.exists() for path in paths):
            return None
        frames: list[pd.DataFrame] = []
        for path in paths:
            try:
                frames.append(
                    pd.read_parquet(
                        path, columns=["method", "document", "length", "context", "nll"]
                    )
                )
            except (OSError, ValueError, KeyError) as error:
                raise RunError(
                    f"{path} holds no scores of single tokens ({error}): delete it and run the "
                    "sweep again, which computes only what is missing."
                ) from error
        return pd.concat(frames, ignore_index=True)

    def missing_tokens(self) -> int:
        """How many files of token scores the records speak of that are not there."""
        return sum(not path.exists() for path in self._token_files())

    def _token_files(self) -> list[Path]:
        keys = [record.key for record in self.records if record.per_token]
        return [self.folder / "tokens" / f"{key}.parquet" for key in keys]


def read_sweep(path: Path) -> SweepFolder:
    """Read the folder that `longctx sweep --out` wrote.

    Raises:
        RunError: a folder that cannot be read as a sweep's, or records that are not those that its
            report was made from.
    """
    found = read_folder(path)
    notes = list(found.notes)
    sweep = SweepFolder(path, found.report, found.rows, found.records or ())
    if found.records is None:
        notes.append(
            f"{path.name} holds no results.jsonl: depths, failed answers, repetition and how "
            "prompts were run are not known"
        )
    else:
        _check(sweep)
    if missing := sweep.missing_tokens():
        notes.append(
            f"{missing} files of token scores are missing from {path.name}/tokens: loss by "
            "position is left out"
        )
    return dataclasses.replace(sweep, notes=tuple(notes))


def _check(sweep: SweepFolder) -> None:
    for row in sweep.rows:
        found = sweep.observations(row.task, row.method)
        if wrong := mismatch(row, (o for o in found if o.length == row.length)):
            raise RunError(
                f"{sweep.folder} holds {wrong} ({row.task} under {row.method} at {row.length:,} "
                "tokens): run the same `longctx sweep` again (known results are not computed "
                "again), or use a folder for each setting."
            )
