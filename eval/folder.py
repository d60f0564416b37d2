"""Reading the folder of a sweep back: its report, and the records that the report was made from.

Unlike `Store` this takes no lock and changes nothing: it may be read while a sweep writes there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.errors import RunError

from .records import Record, parts_of, read_parts
from .results import Row
from .task import Observation

__all__ = ["Folder", "mismatch", "read_folder"]

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
        raise RunError(f"{report_path} is no report of a sweep ({error!r}): {again}") from error
    for task in tasks:
        if "scale" not in task or "higher_is_better" not in task:
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
