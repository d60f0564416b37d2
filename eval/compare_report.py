"""The files of a comparison: CSV, JSON, parquet and the plot, each complete or not there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import RunError
from longctx.folders import refuse_other_than_folder

from .files import finite, write_whole

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = ["refuse_taken_comparison", "write_comparison"]

_REPORT = "compare.json"


def refuse_taken_comparison(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a comparison: before any work is done.

    Raises:
        RunError: it does and `overwrite` is off, or it is not a folder.
    """
    refuse_other_than_folder(folder)
    if (folder / _REPORT).exists() and not overwrite:
        raise RunError(
            f"{folder} holds a comparison already: name another folder, or pass overwrite."
        )


def write_comparison(comparison: Comparison, folder: Path, *, overwrite: bool) -> list[Path]:
    """Write all files of a comparison; see `Comparison.write`."""
    from .compare_plot import draw

    refuse_taken_comparison(folder, overwrite)
    frame, figure = comparison.frame(), draw(comparison)
    text = json.dumps(_report(comparison), indent=1, allow_nan=False)
    # The JSON last: it is what marks a folder as taken.
    writers: dict[str, Callable[[Path], Any]] = {
        "compare.csv": lambda path: frame.to_csv(path, index=False),
        "compare.parquet": lambda path: frame.to_parquet(path, index=False),
        "compare.png": lambda path: figure.savefig(path, format="png", dpi=150),
        "compare.svg": lambda path: figure.savefig(path, format="svg"),
        _REPORT: lambda path: path.write_text(text, encoding="utf-8"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [write_whole(folder / name, writer) for name, writer in writers.items()]
    except OSError as error:
        raise RunError(
            f"cannot write the comparison to {folder}: {error}. Make room, or write to another "
            "folder."
        ) from error


def _report(comparison: Comparison) -> dict[str, Any]:
    whole: dict[str, Any] = finite(dataclasses.asdict(comparison))
    for task, entry in zip(comparison.tasks, whole["tasks"], strict=True):
        entry |= {"share": task.share, "compared": task.compared}
    return {
        **whole,
        "regressions": list(comparison.regressions),
        "missing": list(comparison.missing),
    }
