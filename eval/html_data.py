"""Reading a sweep's folder back, and refusing one whose parts do not belong together.

Unlike `Store` this takes no lock and changes nothing: a report may be written while a sweep runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import RunError

from .records import Record, parts_of, read_records
from .results import Row
from .task import Observation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SweepFolder", "read_sweep"]

_REPORT, _RESULTS = "sweep.json", "results.jsonl"


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
        """Whether the task's values are shares, to be shown in percent; a perplexity is above 1."""
        values = [row.value for row in self.rows if row.task == task]
        return all(value <= 1 for value in values if math.isfinite(value))

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
            RunError: a file that is no parquet table of them.
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


def read_sweep(folder: Path) -> SweepFolder:
    """Read the folder that `longctx sweep --out` wrote.

    Raises:
        RunError: no such folder, no report in it, a damaged file, or records that are not those
            that the report was made from.
    """
    path = folder / _REPORT
    if not path.is_file():
        raise RunError(
            f"{folder} holds no {_REPORT}: name the --out folder of a `longctx sweep` that ended "
            "(the same command goes on where an interrupted one was)."
        )
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Row(**_nan(row)) for row in report["rows"])
        for name in (
            "model",
            "identity",
            "original_window",
            "lengths",
            "methods",
            "tasks",
            "notes",
            "records",
        ):
            report[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is no report of a sweep ({error!r}): run the same `longctx sweep` again with "
            "--overwrite; known results are not computed again."
        ) from error
    results = parts_of(folder / _RESULTS)
    found: dict[str, Record] = {}
    for part in results:
        found |= read_records(part, report["identity"])
    notes: list[str] = []
    if not results:
        notes.append(
            f"{folder.name} holds no {_RESULTS}: depths, failed answers, repetition and how "
            "prompts were run are not known"
        )
    chosen = tuple(found[key] for key in report["records"] if key in found)
    sweep = SweepFolder(folder, report, rows, chosen)
    if results:
        _check(sweep)
    if missing := sweep.missing_tokens():
        notes.append(
            f"{missing} files of token scores are missing from {folder.name}/tokens: loss by "
            "position is left out"
        )
    return SweepFolder(folder, report, rows, sweep.records, tuple(notes))


def _nan(row: dict[str, Any]) -> dict[str, Any]:
    """A report has null where a figure is NaN; where null is a value of its own it stays."""
    figures = ("value", "low", "high", "nll")
    return {k: math.nan if v is None and k in figures else v for k, v in row.items()}


def _check(sweep: SweepFolder) -> None:
    for row in sweep.rows:
        found = [o for o in sweep.observations(row.task, row.method) if o.length == row.length]
        targets = sum(o.targets for o in found)
        nll = math.fsum(o.nll for o in found) / targets if targets else math.nan
        same = math.isclose(nll, row.nll, rel_tol=1e-9) or (math.isnan(nll) and math.isnan(row.nll))
        if (len(found), targets) != (row.n, row.targets) or not same:
            raise RunError(
                f"{sweep.folder / _RESULTS} holds {_count(found)} of {row.task} under {row.method} "
                f"at {row.length:,} tokens, {_REPORT} was made from {row.n}"
                f"{'' if len(found) != row.n else ' others'}: run the same `longctx sweep` again "
                "(known results are not computed again), or use a folder for each setting."
            )


def _count(found: Sequence[Any]) -> str:
    return f"{len(found)} observation{'' if len(found) == 1 else 's'}"
