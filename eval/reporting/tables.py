"""Sweeps and comparisons as tables for the terminal, and in words what an entry costs.

A table per task, methods or entries down and lengths across.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from longctx.errors import printable

from ..comparison.comparison import ComparedCell, ComparedTask, Comparison, PooledDifference
from ..results.parts import part_rows
from ..results.sweep_result import Row, SweepResult
from ..stats.intervals import wilson
from ..tasks.shared.protocol import Task

__all__ = [
    "change",
    "comparison_tables",
    "figure",
    "intervals",
    "plain",
    "print_comparison",
    "print_sweep",
    "regressions",
    "show",
    "spread",
    "sweep_tables",
]

_WIDEST = 10_000  # columns, more than any table has


def print_sweep(result: SweepResult, console: Console | None = None) -> None:
    """Print a table per task, with what it estimates under it."""
    show(sweep_tables(result), console)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print a table per task, the cost inside the old window, and what is missing."""
    show(comparison_tables(comparison), console)


def sweep_tables(result: SweepResult) -> list[RenderableType]:
    """Return a table per task, each with its estimand and what went wrong under it."""
    parts = part_rows(result)
    return [_sweep_table(result, task, parts) for task in result.tasks] + [
        plain(note, style="yellow") for note in result.notes
    ]


def plain(text: object, style: str = "") -> Text:
    """What comes from a file or a name, for the terminal: no markup, no control characters."""
    return Text(printable(text), style=style)


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
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"


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


def _sweep_table(result: SweepResult, task: Task, parts: Sequence[Row]) -> RenderableType:
    share = task.scale == "share"
    table = Table(
        title=plain(f"{task.name} · {result.model}", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for length in result.lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    failures: dict[str, None] = {}
    beyond = False
    rows = [row for row in result.rows if row.task == task.name]
    far = any(row.far for row in rows)
    if far:
        table.add_column("far keys", justify="right", no_wrap=True)
    cached = any(row.cache_bytes for row in rows)
    if cached:
        table.add_column("cache MiB", justify="right", no_wrap=True)
    for variant in result.variants:
        own = [result.row(variant.label, task.name, length) for length in result.lengths]
        cells = [_cell(row, share=share) for row in own]
        for row in own:
            beyond |= row.beyond_window
            if row.failed:
                failures[f"{row.method} at {row.length:,}: {row.failed}"] = None
        if far:
            cells.append(_far_keys([row for row in rows if row.method == variant.label]))
        if cached:
            cells.append(_cache_size(own[-1]))
        table.add_row(plain(variant.label), *cells)
        if any(row.prefix is not None for row in own):
            cells = [Text(f"{_number(row.prefix or math.nan)} ", style="dim") for row in own]
            table.add_row(plain("  prefix", style="dim"), *cells)
        for name, by_length in _parts_of(variant.label, task.name, parts).items():
            found = [by_length.get(length) for length in result.lengths]
            cells = [Text() if row is None else _cell(row, share=share) for row in found]
            table.add_row(plain(f"  {name}", style="dim"), *cells)
    lines = [plain(said, style="dim") for said in (rows[0].estimand, *intervals(rows))]
    remarks: Callable[[Sequence[Row]], list[str]] | None = getattr(task, "remarks", None)
    lines += [plain(said, style="dim") for said in (remarks(rows) if remarks else ())]
    if any(row.prefix is not None for row in rows):
        said = "prefix: the same over all tokens before each length, of the same documents"
        lines.append(Text(said, style="dim"))
    if beyond:
        lines.append(Text("* beyond the window that the model claims", style="dim"))
    if far:
        said = (
            f"far keys: found of those that end {result.original_window:,} tokens or more back "
            "(Wilson 95%, as if they were independent)"
        )
        lines.append(Text(said, style="dim"))
    if cached:
        said = f"cache MiB: held for one prompt of {max(result.lengths):,} tokens, at its end"
        lines.append(Text(said, style="dim"))
    lines += [plain(failure, style="red") for failure in failures]
    return Group(table, *lines, Text())


def _cell(row: Row, *, share: bool) -> Text:
    """The value, and its interval under it."""
    cell = Text(figure(row, share=share) + ("*" if row.beyond_window else " "))
    if row.failed:
        cell.stylize("red")
    elif interval := spread(row, share=share):
        cell.append(f"\n{interval} ", style="dim")
    return cell


def _cache_size(row: Row) -> Text:
    """The cache of one prompt in MiB."""
    size = row.cache_bytes
    return Text("– " if size is None or row.failed else f"{_number(size / 2**20)} ")


def _parts_of(method: str, task: str, parts: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """The rows of a task's parts under a method, by part and length."""
    found: dict[str, dict[int, Row]] = {}
    for row in parts:
        whole, _, name = row.task.partition("/")
        if (whole, row.method) == (task, method):
            found.setdefault(name, {})[row.length] = row
    return found


def _far_keys(rows: Sequence[Row]) -> Text:
    """Keys found beyond the original window, at all lengths together, with Wilson's interval."""
    counted = [row for row in rows if row.far is not None]
    far, found = (sum(getattr(row, name) or 0 for row in counted) for name in ("far", "far_found"))
    if not far:
        return Text("– ")
    text = Text(f"{found} of {far} ")
    low, high = wilson(found, far)
    text.append(f"\n{100 * low:.0f}–{100 * high:.0f}% ", style="dim")
    return text


def comparison_tables(comparison: Comparison) -> list[RenderableType]:
    """Return a table per task, the cost inside the old window, what is missing, and notes."""
    missing = [plain(f"not compared: {sentence}", style="red") for sentence in comparison.missing]
    notes = [plain(note, style="yellow") for note in comparison.notes]
    return [
        *(_comparison_table(comparison, task) for task in comparison.tasks),
        Text("Inside the old window", style="bold"),
        *(plain(sentence) for sentence in regressions(comparison)),
        Text(),
        *missing,
        *notes,
    ]


def change(difference: float, *, share: bool) -> str:
    """Write a difference: "−15 pts" of a share, or "+3.1%" of perplexity for NLL in nats.

    >>> change(-0.15, share=True), change(0.0305, share=False)
    ('−15 pts', '+3.1%')
    """
    if math.isnan(difference):
        return "–"
    if share:
        return f"{_points(difference)} pts"
    return _percent(difference)


def regressions(comparison: Comparison) -> tuple[str, ...]:
    """Return a sentence for each task and entry: does it cost anything inside the old window?"""
    window = comparison.original_window
    if window is None:
        return (f"{comparison.baseline} names no original window, so there is no inside.",)
    found = {(one.task, one.entry): one for one in comparison.inside}
    sentences: list[str] = []
    for entry in comparison.entries[1:]:
        for task in comparison.tasks:
            one = found.get((task.name, entry))
            if one is None:
                said = f"nothing was compared at up to {window:,} tokens, so nothing is known."
            else:
                said = _verdict(one, task)
            sentences.append(f"{entry}, {task.name}: {said}")
    return tuple(sentences)


def _verdict(one: PooledDifference, task: ComparedTask) -> str:
    share, more = task.share, task.higher_is_better
    worse = one.difference < 0 if more else one.difference > 0
    if math.isnan(one.p_value):
        head = "cannot be tested"
    elif one.significant:
        head = "yes, it costs" if worse else "no, it gains"
    elif one.p_value < 0.05:
        head = "perhaps" if worse else "no cost shown"
    elif one.p_value < 1 and one.smallest_p > 0.05:
        least = _p(one.smallest_p)
        head = f"undecided (so few clusters differ that no p below {least} is possible)"
    else:
        head = "no cost shown"
    figures = f"{change(one.difference, share=share)}{' of perplexity' if not share else ''}"
    if math.isnan(one.low):
        figures += f" (no interval{one.interval.removeprefix('none')}"
    else:
        figures += f" (95% {_difference_spread(one.low, one.high, share=share)}"
    if not math.isnan(one.p_value):
        figures += f"; p = {_p(one.p_value)}, adjusted {_p(one.p_holm)}"
    said = (
        f"{head}: {figures}; {one.paired} pairs in {one.clusters} cluster{'s' * (one.clusters > 1)}"
    )
    said += f", lengths {', '.join(f'{n:,}' for n in one.lengths)})"
    limit = one.low if more else one.high
    if not one.significant and (limit < 0 if more else limit > 0):
        said += f"; a cost of {change(limit, share=share)} is not excluded"
    if one.left_out:
        said += (
            f"; without {', '.join(f'{n:,}' for n in one.left_out)}, which could not be compared"
        )
    return said + "."


def _comparison_table(comparison: Comparison, task: ComparedTask) -> RenderableType:
    table = Table(
        title=plain(f"{task.name} · against {comparison.baseline}", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("entry", no_wrap=True)
    for length in comparison.lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    table.add_column("all lengths", justify="right", no_wrap=True)
    pooled = {one.entry: one for one in comparison.pooled if one.task == task.name}
    for entry in comparison.entries:
        rows = [comparison.row(task.name, length, entry) for length in comparison.lengths]
        if entry == comparison.baseline:
            cells = [_baseline(row, task.share) for row in rows]
        else:
            cells = [_figures(row, task.share) for row in rows]
        one = pooled.get(entry)
        table.add_row(plain(entry), *cells, Text() if one is None else _pooled(one, task.share))
    lines = (
        task.estimand,
        task.compared,
        "under the baseline's values are their intervals, under the others the difference and its "
        "interval",
        "* p below 0.05 after Holm's adjustment over all cells of the entry (all lengths: over its "
        "tasks)",
    )
    return Group(table, *(plain(line, style="dim") for line in lines), Text())


def _baseline(row: ComparedCell, share: bool) -> Text:
    """Value and its own interval."""
    if row.failed:
        return Text("failed ", style="red")
    text = Text(_compared_value(row.value, share=share) + " ")
    if not math.isnan(row.low):
        low, high = _compared_value(row.low, share=share), _compared_value(row.high, share=share)
        text.append(f"\n{low} to {high} ", style="dim")
    else:
        text.append("\nno interval ", style="dim")
    return text


def _figures(row: ComparedCell, share: bool) -> Text:
    """Value, difference and its interval, one under the other."""
    if row.failed:
        return Text("failed ", style="red")
    text = Text(_compared_value(row.value, share=share) + " ")
    if row.paired:
        text.append(f"\n{change(row.difference, share=share)}{'*' if row.significant else ' '}")
        text.stylize("bold" if row.significant else "")
        if not math.isnan(row.difference_low):
            spread = _difference_spread(row.difference_low, row.difference_high, share=share)
            text.append(f"\n{spread} ", style="dim")
        else:
            text.append("\nno interval ", style="dim")
    return text


def _pooled(one: PooledDifference, share: bool) -> Text:
    text = Text(f"\n{change(one.difference, share=share)}{'*' if one.significant else ' '}")
    if not math.isnan(one.low):
        text.append(f"\n{_difference_spread(one.low, one.high, share=share)} ", style="dim")
    return text


def _compared_value(value: float, *, share: bool) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.0%}" if share else _number(value)


def _difference_spread(low: float, high: float, *, share: bool) -> str:
    write = _points if share else _percent
    return f"{write(low)} to {write(high)}"


def _points(share: float) -> str:
    points = round(100 * share)
    return _signed(f"{points:+d}") if points else "0"


def _percent(nats: float) -> str:
    """A change in NLL as that of perplexity; beyond a thousandfold as a factor."""
    if nats > math.log(1000):
        return f"×{math.exp(nats):.1e}" if nats < 700 else "×∞"
    percent = 100 * math.expm1(nats)
    return _signed(f"{percent:+.0f}%" if abs(percent) >= 100 else f"{percent:+.1f}%")


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else f"{p:.0e}"
