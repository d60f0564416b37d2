"""Sweep results as tables for the terminal: methods down, lengths across, one per task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .task import Task

if TYPE_CHECKING:
    from .results import Row, SweepResult

__all__ = ["figure", "tables"]


def tables(result: SweepResult) -> list[RenderableType]:
    """Return a table per task, each with its estimand and what went wrong under it."""
    return [_table(result, task) for task in result.tasks] + [
        Text(note, style="yellow") for note in result.notes
    ]


def figure(row: Row, *, share: bool) -> str:
    """Write a cell's value: "85%" or "12.3"; an interval is written by `spread`."""
    if math.isnan(row.value):
        return "failed" if row.failed else "–"
    return f"{row.value:.0%}" if share else _number(row.value)


def spread(row: Row, *, share: bool) -> str:
    """Write a cell's interval, empty where there is none."""
    if math.isnan(row.low):
        return ""
    if share:
        return f"{100 * row.low:.0f}–{100 * row.high:.0f}"
    return f"{_number(row.low)}–{_number(row.high)}"


def _number(value: float) -> str:
    if math.isinf(value) or value >= 1e6:
        return f"{value:.1e}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _table(result: SweepResult, task: Task) -> RenderableType:
    share = task.scale == "share"
    table = Table(
        title=f"{task.name} · {result.model}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for length in result.lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    failures: dict[str, None] = {}
    beyond = False
    for variant in result.variants:
        cells: list[Text] = []
        for length in result.lengths:
            row = result.row(variant.label, task.name, length)
            beyond |= row.beyond_window
            cell = Text(figure(row, share=share) + ("*" if row.beyond_window else " "))
            if row.failed:
                cell.stylize("red")
                failures[f"{row.method} at {length:,}: {row.failed}"] = None
            elif interval := spread(row, share=share):
                cell.append(f"\n{interval} ", style="dim")
            cells.append(cell)
        table.add_row(variant.label, *cells)
    lines = [Text(task.estimand, style="dim")]
    if beyond:
        lines.append(Text("* beyond the window that the model claims", style="dim"))
    lines += [Text(failure, style="red") for failure in failures]
    return Group(table, *lines, Text())
