"""The files of sweeps and comparisons: CSV, JSON, parquet, plots; each complete or not there."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from longctx.errors import RunError
from longctx.files import finite, write_whole
from longctx.folders import refuse_other_than_file, refuse_other_than_folder

from ..comparison.comparison import Comparison
from ..results.parts import part_rows
from ..results.reader import read_cells
from ..results.sweep_result import SweepResult, cell_key, estimand_text, frame_of
from .tables import regressions

__all__ = ["refuse_lost_cells", "refuse_taken_comparison", "write_comparison", "write_sweep"]

_SWEEP, _COMPARISON, _PARTS = "sweep.json", "compare.json", "parts.csv"
_ENDINGS = (".csv", ".json", ".parquet", ".png", ".svg")


def refuse_lost_cells(folder: Path, identity: dict[str, str], cells: Iterable[str]) -> None:
    """Refuse a folder whose report holds what one of `cells` would not: before work is done.

    A report over more cells of the same model and tokenizer may take its place.

    Raises:
        RunError: another model's report, one with further cells, or files that are not a report.
    """
    path = folder / _SWEEP
    refuse_other_than_folder(folder)
    for ending in _ENDINGS:
        refuse_other_than_file(path.with_suffix(ending))
    if not path.exists():
        _refuse_foreign(folder, "sweep", "results.jsonl")
        return
    way_out = "name another folder, or pass overwrite to replace the report"
    stored = read_cells(path, f"{way_out[0].upper()}{way_out[1:]}.")
    for key, value in identity.items():
        if stored.identity.get(key) != value:
            raise RunError(f"{folder} holds the report of another {key}: {way_out}.")
    lost = sorted({*stored.cells} - {*cells})
    if lost:
        raise RunError(
            f"{folder} holds a report with {len(lost)} cells that this sweep lacks, such as "
            f"{lost[0]!r}: {way_out}, or sweep those too (known results are not computed again)."
        )


def write_sweep(
    result: SweepResult, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> list[Path]:
    """Write sweep.csv, .json, .parquet, .png and .svg; returns their paths.

    Where a task has parts, their rows go to parts.csv.

    Args:
        result: of `sweep`.
        folder: is made if need be.
        overwrite: replace a report that holds cells which this one lacks.

    Raises:
        RunError: such a report is there, or the folder cannot be written. Measured results are not
            lost by that.
    """
    from .plots import draw_sweep  # matplotlib takes long

    folder = Path(folder)
    cells = [
        cell_key(v.label, task, length, result.adaptive)
        for v in result.variants
        for task in result.tasks
        for length in result.lengths
    ]
    if not overwrite:
        refuse_lost_cells(folder, result.identity, cells)
    frame = result.frame()
    text = json.dumps(_sweep_report(result, cells), indent=1, allow_nan=False)
    figures: dict[str, Callable[[Path], Any]] = {
        "sweep.csv": lambda path: frame.to_csv(path, index=False),
        "sweep.parquet": lambda path: frame.to_parquet(path, index=False),
        _SWEEP: lambda path: path.write_text(text, encoding="utf-8"),
    }
    refuse_other_than_file(folder / _PARTS)
    if parts := part_rows(result):
        rows = frame_of(parts)
        figures[_PARTS] = lambda path: rows.to_csv(path, index=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not parts and (folder / _SWEEP).exists():  # a report that is replaced had some
            (folder / _PARTS).unlink(missing_ok=True)
        paths = [write_whole(folder / name, writer) for name, writer in figures.items()]
        picture = draw_sweep(result)  # the figures are there whatever becomes of it
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


def _sweep_report(result: SweepResult, cells: list[str]) -> dict[str, Any]:
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
                "estimand": estimand_text(task, result.adaptive),
                "scale": task.scale,
                "higher_is_better": task.higher_is_better,
                "figure": task.figure,
                "spec": task.cache_key(),
                "scope": task.report_identity(),
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


def refuse_taken_comparison(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a comparison: before any work is done.

    Raises:
        RunError: it does and `overwrite` is off, it holds files of such names without a comparison,
            or it is not a folder.
    """
    path = folder / _COMPARISON
    refuse_other_than_folder(folder)
    for ending in _ENDINGS:
        refuse_other_than_file(path.with_suffix(ending))
    if path.exists() and not overwrite:
        raise RunError(
            f"{folder} holds a comparison already: name another folder, or pass overwrite."
        )
    if not path.exists():
        _refuse_foreign(folder, "compare", None)


def _refuse_foreign(folder: Path, stem: str, beside: str | None) -> None:
    """Refuse files of the names that are written, where nothing shows that they are ours."""
    if beside is not None and (folder / beside).exists():  # of a run that was cut off
        return
    there = [f"{stem}{ending}" for ending in _ENDINGS if (folder / f"{stem}{ending}").exists()]
    if there:
        raise RunError(
            f"{folder} holds {', '.join(there)} without {stem}.json, so they are of something "
            "else: name another folder, or move them."
        )


def write_comparison(
    comparison: Comparison, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> list[Path]:
    """Write compare.csv, .json, .parquet, .png and .svg; returns their paths.

    Args:
        comparison: of `compare`.
        folder: is made if need be.
        overwrite: replace a comparison that is there.

    Raises:
        RunError: one is there, or the folder cannot be written.
    """
    from .plots import draw_comparison  # matplotlib takes long

    folder = Path(folder)
    refuse_taken_comparison(folder, overwrite)
    frame, figure = comparison.frame(), draw_comparison(comparison)
    text = json.dumps(_comparison_report(comparison), indent=1, allow_nan=False)
    # The JSON last: it is what marks a folder as taken.
    writers: dict[str, Callable[[Path], Any]] = {
        "compare.csv": lambda path: frame.to_csv(path, index=False),
        "compare.parquet": lambda path: frame.to_parquet(path, index=False),
        "compare.png": lambda path: figure.savefig(path, format="png", dpi=150),
        "compare.svg": lambda path: figure.savefig(path, format="svg"),
        _COMPARISON: lambda path: path.write_text(text, encoding="utf-8"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [write_whole(folder / name, writer) for name, writer in writers.items()]
    except OSError as error:
        raise RunError(
            f"cannot write the comparison to {folder}: {error}. Make room, or write to another "
            "folder."
        ) from error


def _comparison_report(comparison: Comparison) -> dict[str, Any]:
    whole: dict[str, Any] = finite(dataclasses.asdict(comparison))
    for task, entry in zip(comparison.tasks, whole["tasks"], strict=True):
        entry |= {"share": task.share, "compared": task.compared}
    return {
        **whole,
        "regressions": list(regressions(comparison)),
        "missing": list(comparison.missing),
    }
