"""What lm-evaluation-harness found, as tables: CSV, parquet and JSON with the same rows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import RunError

from .files import write_whole

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RESULTS", "TABLES", "Score", "frame_of", "refuse_lost", "write_tables"]

RESULTS = "lm_eval.jsonl"
TABLES = ("lm_eval.csv", "lm_eval.parquet", "lm_eval.json")


@dataclass(frozen=True, slots=True)
class Score:
    """A metric of one method, task and length."""

    method: str
    task: str
    length: int
    """Tokens that the task was told to fill, where it can."""
    metric: str
    """As the harness calls it; "score" for RULER's, which are called by their length there."""
    value: float
    stderr: float
    """Standard error of the mean, or as the harness gives it; NaN where there is none."""
    n: int
    """Documents that were asked."""


def frame_of(scores: list[Score]) -> pd.DataFrame:
    """A row for each score."""
    import pandas as pd

    columns = [field.name for field in fields(Score)]
    return pd.DataFrame([asdict(score) for score in scores], columns=columns)


def refuse_lost(folder: Path, wanted: set[tuple[Any, ...]], names: tuple[str, ...]) -> None:
    """Refuse to replace tables that hold what the new ones would not.

    Args:
        folder: where they are.
        wanted: what the new ones hold: a value for each of `names` in each row.
        names: columns.

    Raises:
        RunError: it names the first that would be lost.
    """
    path = folder / TABLES[-1]
    if not path.exists():
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        there = {tuple(row[name] for name in names) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is no table of lm-eval ({error!r}): name another folder."
        ) from error
    if lost := sorted(there - wanted):
        raise RunError(
            f"{folder} holds tables with {', '.join(map(str, lost[0]))} ({', '.join(names)}), "
            "which these would not: ask for it too (known results are not computed again), or name "
            "another folder."
        )


def write_tables(folder: Path, scores: list[Score], about: dict[str, Any]) -> None:
    """Write all of `TABLES`.

    Raises:
        RunError: those that are there hold more.
    """
    refuse_lost(
        folder, {(s.method, s.task, s.length) for s in scores}, ("method", "task", "length")
    )
    frame = frame_of(scores)
    rows = frame.astype(object).where(frame.notna(), None).to_dict(orient="records")
    text = json.dumps({**about, "rows": rows}, indent=1, allow_nan=False)
    write_whole(folder / TABLES[0], lambda path: frame.to_csv(path, index=False))
    write_whole(folder / TABLES[1], lambda path: frame.to_parquet(path, index=False))
    write_whole(folder / TABLES[2], lambda path: path.write_text(text, encoding="utf-8"))
