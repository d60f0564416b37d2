"""Sweep results as tables for the terminal: methods down, lengths across, one per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .task import Task

if TYPE_CHECKING:
    from .results import Row, SweepResult

__all__ = ["figure", "intervals", "show", "spread", "tables"]

_WIDEST = 10_000  # columns, more than any table has


def tables(result: SweepResult) -> list[RenderableType]:
    """Return a table per task, each with its estimand and what went wrong under it."""
    return [_table(result, task) for task in result.tasks] + [
        Text(note, style="yellow") for note in result.notes
    ]


def show(items: Sequence[RenderableType], console: Console | None = None) -> None:
    """Print one under the other; no table is cut off where the width is that of no terminal."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            free = console.options.update(max_width=_WIDEST)
            widths = [
                Measurement.get(console, free, part).maximum
                for item in items
                if isinstance(item, Group)
                for part in item.renderables
                if isinstance(part, Table)
            ]
            console = Console(width=max([console.width, *widths]))
    for item in items:
        console.print(item)


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


def intervals(rows: Sequence[Row]) -> list[str]:
    """Say which intervals the cells of a task have, or why none: where, if not all have the same.

    Methods are named where they differ.
    """
    where: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        if not row.failed:
            where.setdefault(row.interval, {}).setdefault(row.method, []).append(row.length)
    if len(where) == 1:
        return [f"interval: {name}" for name in where]
    methods = {row.method for row in rows}
    lines: list[str] = []
    for name, found in where.items():
        places = {method: ", ".join(f"{n:,}" for n in sizes) for method, sizes in found.items()}
        if found.keys() == methods and len({*places.values()}) == 1:
            said = f"at {next(iter(places.values()))}"
        else:
            said = "; ".join(f"{method} at {sizes}" for method, sizes in places.items())
        lines.append(f"interval ({said}): {name}")
    return lines


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
    rows = [row for row in result.rows if row.task == task.name]
    lines = [Text(said, style="dim") for said in (rows[0].estimand, *intervals(rows))]
    if beyond:
        lines.append(Text("* beyond the window that the model claims", style="dim"))
    lines += [Text(failure, style="red") for failure in failures]
    return Group(table, *lines, Text())
