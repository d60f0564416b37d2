"""The files of a sweep: CSV, JSON, parquet and the plot, each complete or not there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import RunError
from longctx.folders import refuse_other_than_file, refuse_other_than_folder

from .files import finite, write_whole

if TYPE_CHECKING:
    from .results import SweepResult

__all__ = ["refuse_lost_cells", "write_report"]

_REPORT = "sweep.json"


def refuse_lost_cells(folder: Path, identity: dict[str, str], cells: Iterable[str]) -> None:
    """Refuse a folder whose report holds what one of `cells` would not: before work is done.

    A report over more cells of the same model and tokenizer may take its place.

    Raises:
        RunError: another model's report, or one with further cells, or a file that is none.
    """
    path = folder / _REPORT
    refuse_other_than_folder(folder)
    refuse_other_than_file(path)
    if not path.exists():
        return
    way_out = "name another folder, or pass overwrite to replace the report"
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, kept = dict(report["identity"]), set(map(str, report["cells"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no report of a sweep ({error!r}): {way_out}.") from error
    for key, value in identity.items():
        if found.get(key) != value:
            raise RunError(f"{folder} holds the report of another {key}: {way_out}.")
    lost = sorted(kept - set(cells))
    if lost:
        raise RunError(
            f"{folder} holds a report with {len(lost)} cells that this sweep lacks, such as "
            f"{lost[0]!r}: {way_out}, or sweep those too (known results are not computed again)."
        )


def write_report(result: SweepResult, folder: Path, *, overwrite: bool) -> list[Path]:
    """Write all files of a report; see `SweepResult.write`."""
    from .plot import draw
    from .results import cell_key

    cells = [
        cell_key(v.label, task, length, result.adaptive)
        for v in result.variants
        for task in result.tasks
        for length in result.lengths
    ]
    if not overwrite:
        refuse_lost_cells(folder, result.identity, cells)
    frame = result.frame()
    text = json.dumps(_report(result, cells), indent=1, allow_nan=False)
    figures: dict[str, Callable[[Path], Any]] = {
        "sweep.csv": lambda path: frame.to_csv(path, index=False),
        "sweep.parquet": lambda path: frame.to_parquet(path, index=False),
        _REPORT: lambda path: path.write_text(text, encoding="utf-8"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [write_whole(folder / name, writer) for name, writer in figures.items()]
        picture = draw(result)  # the figures are there whatever becomes of it
        plots: dict[str, Callable[[Path], Any]] = {
            "sweep.png": lambda path: picture.savefig(path, format="png", dpi=150),
            "sweep.svg": lambda path: picture.savefig(path, format="svg"),
        }
        return paths + [write_whole(folder / name, writer) for name, writer in plots.items()]
    except OSError as error:
        kept = f"; the results are in {result.results}, not lost" if result.results else ""
        raise RunError(
            f"cannot write the report to {folder}: {error}{kept}. Make room, or write to another "
            "folder."
        ) from error


def _report(result: SweepResult, cells: list[str]) -> dict[str, Any]:
    from .results import stated

    rows: list[dict[str, Any]] = result.frame().to_dict(orient="records")
    return {
        "model": result.model,
        "identity": result.identity,
        "original_window": result.original_window,
        "lengths": result.lengths,
        "methods": [{"label": v.label, "method": v.record()} for v in result.variants],
        "tasks": [
            {
                "name": task.name,
                "estimand": stated(task, result.adaptive),
                "scale": task.scale,
                "higher_is_better": task.higher_is_better,
                "spec": task.spec(),
                "scope": task.scope(),
            }
            for task in result.tasks
        ],
        "adaptive": None if result.adaptive is None else str(result.adaptive),
        "notes": result.notes,
        "verified": [dataclasses.asdict(check) for check in result.verified],
        "rows": finite(rows),
        "cells": cells,
        "records": [record.key for record in result.records],
    }
