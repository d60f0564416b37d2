"""Tables of methods by tasks, each cell coloured: what many of both look like at a glance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..results.reader import SweepData
from .families import by_family
from .tables import figure

__all__ = ["Board", "Cell", "part_boards", "reach_board"]

_STEPS = 10  # of the palette, from 0 to 100%


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure, its place in the palette, and what is said when it is pointed at."""

    text: str
    heat: int
    tip: str


@dataclass(frozen=True, slots=True)
class Board:
    """Methods down, in families, and tasks or parts of one across."""

    name: str
    columns: tuple[str, ...]
    families: dict[str, list[tuple[str, list[Cell | None]]]]


def reach_board(sweep: SweepData, effective: Sequence[dict[str, Any]]) -> Board:
    """How far each method reads in each task, by the fits of `sections.effective`."""
    tasks = tuple(dict.fromkeys(row["task"] for row in effective))
    found = {(row["task"], row["method"]): row for row in effective}
    shortest, longest = sweep.lengths[0], sweep.lengths[-1]
    doublings = max(math.log2(longest / shortest), 1.0)

    def cell(task: str, method: str) -> Cell | None:
        row = found[task, method]
        if row["text"] is None:
            return None
        sign = {"at": "", "at least": "≥", "below": "<"}[row["bound"]]
        share = math.log2(row["tokens"] / shortest) / doublings
        # Below the shortest and at it are not the same.
        heat = 0 if row["bound"] == "below" else 1 + round((_STEPS - 1) * min(max(share, 0.0), 1.0))
        return Cell(f"{sign}{_short(row['tokens'])}", heat, f"{method}, {task}\n{row['text']}")

    lines = [(method, [cell(task, method) for task in tasks]) for method in sweep.methods]
    return Board("", tasks, by_family(lines, lambda line: line[0]))


def part_boards(sweep: SweepData) -> list[Board]:
    """The mean scores of the parts of tasks that have some, a board for each task and length."""
    boards: list[Board] = []
    for task in sweep.tasks:
        named = [
            (method, o.length, str(o.detail["part"]), o.detail.get("score"))
            for method in sweep.methods
            for o in sweep.observations(task, method)
            if "part" in o.detail
        ]
        parts = tuple(dict.fromkeys(part for *_, part, _ in named))
        scores: dict[tuple[str, int, str], list[float]] = {}
        for method, length, part, score in named:
            known = score if isinstance(score, int | float) else math.nan
            scores.setdefault((method, length, part), []).append(float(known))

        def cell(method: str, length: int, part: str, scores: Any = scores) -> Cell | None:
            own: list[float] = scores.get((method, length, part), [])
            mean = math.fsum(own) / len(own) if own else math.nan
            if math.isnan(mean):
                return None
            tip = f"{method}, {part} at {length:,} tokens\n{mean:.0%} over n={len(own)}"
            return Cell(f"{100 * mean:.0f}", round(_STEPS * mean), tip)

        for length in sweep.lengths if len(parts) > 1 else ():
            lines: list[tuple[str, list[Cell | None]]] = []
            for row in (row for m in sweep.methods for row in sweep.cells(task, m)):
                if row.length == length:
                    said = f"{row.method}, mean at {length:,} tokens\n{figure(row, share=True)}"
                    level = math.nan if row.failed else row.value
                    whole = None
                    if not math.isnan(level):
                        whole = Cell(f"{100 * level:.0f}", round(_STEPS * level), said)
                    cells = [cell(row.method, length, part) for part in parts]
                    lines.append((row.method, [whole, *cells]))
            name = f"{task} at {length:,} tokens"
            boards.append(Board(name, ("mean", *parts), by_family(lines, lambda line: line[0])))
    return boards


def _short(length: int) -> str:
    """A length in a narrow cell.

    >>> _short(65536), _short(11237), _short(700)
    ('64k', '11k', '700')
    """
    if length < 1024:
        return str(length)
    return f"{length / 1024:.{0 if length >= 10_240 else 1}f}".removesuffix(".0") + "k"
