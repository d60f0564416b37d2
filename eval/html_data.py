"""What a report shows of a sweep's folder; one whose parts do not belong together is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import RunError

from .folder import mismatch, read_folder
from .records import Record
from .results import Row
from .task import Observation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SweepFolder", "read_sweep"]


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
