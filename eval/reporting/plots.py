"""Sweeps, comparisons and the charts of a report as pictures: length on a doubling axis."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from ..comparison.comparison import ComparedCell, ComparedTask, Comparison
from ..results.reader import SweepFolder
from ..results.sweep_result import SweepResult
from ..results.variants import Variant
from ..tasks.shared.protocol import Task
from . import sections
from .charts import BANDS, Chart, Style, position_chart, styles, tokens, value_chart
from .tables import change

__all__ = ["draw_comparison", "draw_sweep", "report_plots"]

# Okabe & Ito 2008: told apart with every kind of colour vision. Black is the model as it came.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_DASHES = ("solid", "dashed", "dotted", "dashdot")
_MARKERS = "osD^vP*X"


def draw_sweep(result: SweepResult) -> Figure:
    """Draw every task of a sweep: value by length with its 95% interval, a line per method.

    Settings of one method share a colour and differ in dashes. The vertical line is the window
    that the model was trained with. What failed is left out.
    """
    tasks = len(result.tasks)
    across = min(tasks, 3)
    down = math.ceil(tasks / across)
    figure = Figure(figsize=(1.8 + 4.6 * across, 4.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes in grid[tasks:]:
        axes.set_visible(False)
    styles = _sweep_styles([variant.label for variant in result.variants])
    for axes, task in zip(grid, result.tasks, strict=False):
        for variant in result.variants:
            _method_line(axes, result, task, variant, styles[variant.label])
        _sweep_axes(axes, result, task)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(result.model, fontsize=11)
    return figure


def _sweep_styles(labels: list[str]) -> dict[str, tuple[str, str, str]]:
    """(colour, dashes, marker) of each method."""
    names = list(dict.fromkeys(label.partition(":")[0] for label in labels if label != "none"))
    seen: dict[str, int] = {}
    styles: dict[str, tuple[str, str, str]] = {}
    for label in labels:
        name = label.partition(":")[0]
        turn = seen[name] = seen.get(name, -1) + 1
        place = names.index(name) if name in names else 0
        colour = "black" if label == "none" else _COLOURS[place % len(_COLOURS)]
        marker = "o" if label == "none" else _MARKERS[(1 + place) % len(_MARKERS)]
        styles[label] = (colour, _DASHES[turn % len(_DASHES)], marker)
    return styles


def _method_line(
    axes: Axes, result: SweepResult, task: Task, variant: Variant, style: tuple[str, str, str]
) -> None:
    rows = [result.row(variant.label, task.name, length) for length in result.lengths]
    rows = [row for row in rows if math.isfinite(row.value)]
    colour, dashes, marker = style
    lengths = [row.length for row in rows]
    axes.plot(
        lengths,
        [row.value for row in rows],
        color=colour,
        linestyle=dashes,
        marker=marker,
        markersize=5,
        linewidth=1.6,
        label=variant.label,
    )
    if len(result.variants) <= BANDS:
        low, high = [row.low for row in rows], [row.high for row in rows]
        axes.fill_between(lengths, low, high, color=colour, alpha=0.12, linewidth=0)


def _sweep_axes(axes: Axes, result: SweepResult, task: Task) -> None:
    label = "found" if task.higher_is_better else "share, less is better"
    share = label if task.scale == "share" else None
    _length_axes(axes, task.name, result.lengths, result.original_window, share=share)
    axes.grid(axis="y", color="0.9", linewidth=0.8)


def _length_axes(
    axes: Axes, title: str, lengths: Sequence[int], window: int | None, *, share: str | None
) -> None:
    """Put the axes around lines of values by length.

    Args:
        axes: with the lines drawn.
        title: above them.
        lengths: in tokens, each with a tick.
        window: that the model was trained with, if it is known.
        share: label of values from 0 to 1; None: perplexities, on a logarithmic axis if there
            are any.
    """
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_major_formatter(FixedFormatter([tokens(n) for n in lengths]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("length in tokens")
    if share is not None:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel(share)
    else:
        values = [value for line in axes.lines for value in np.asarray(line.get_ydata())]
        if any(math.isfinite(value) and value > 0 for value in values):
            axes.set_yscale("log")
        low, high = axes.get_ylim()
        wide = high > 10 * low > 0
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("perplexity")
    _mark_window(axes, window)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_window(axes: Axes, window: int | None) -> None:
    """Draw a line where the window ends that the model was trained with, if it is known."""
    if window is None:
        return
    axes.axvline(window, color="0.45", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        " original window",
        (window, 1),
        xycoords=("data", "axes fraction"),
        va="top",
        rotation=90,
        fontsize=8,
        color="0.35",
    )


def draw_comparison(comparison: Comparison) -> Figure:
    """Draw a row per task: the values with their 95% intervals, and the differences.

    In the map blue is better than the baseline and red is worse; significant cells are framed and
    marked with a star, hatched ones could not be compared.
    """
    tasks, entries, lengths = comparison.tasks, comparison.entries, comparison.lengths
    height = 2.4 + 0.45 * len(entries)
    width = 7.5 + 0.9 * len(lengths) + 0.07 * max(map(len, entries))
    figure = Figure(figsize=(width, max(3.2, height) * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for (left, right), task in zip(grid, tasks, strict=True):
        _entry_lines(left, comparison, task)
        _difference_map(right, comparison, task)
    figure.suptitle(f"against {comparison.baseline}", fontsize=11)
    return figure


def _entry_lines(axes: Axes, comparison: Comparison, task: ComparedTask) -> None:
    colours = matplotlib.colormaps["tab10"]
    for place, entry in enumerate(comparison.entries):
        rows = [comparison.row(task.name, length, entry) for length in comparison.lengths]
        rows = [row for row in rows if math.isfinite(row.value)]
        lengths = [row.length for row in rows]
        colour = colours((place - 1) % 10) if place else "black"
        axes.plot(
            lengths,
            [row.value for row in rows],
            color=colour,
            marker="o",
            markersize=4,
            linestyle="solid" if place <= 10 else "dashed",
            label=entry,
        )
        if len(comparison.entries) <= BANDS:
            low, high = [row.low for row in rows], [row.high for row in rows]
            axes.fill_between(lengths, low, high, color=colour, alpha=0.12, linewidth=0)
    _length_axes(
        axes,
        task.name,
        comparison.lengths,
        comparison.original_window,
        share=task.value if task.share else None,
    )
    axes.legend(frameon=False, fontsize=8)


def _difference_map(axes: Axes, comparison: Comparison, task: ComparedTask) -> None:
    entries, lengths = comparison.entries[1:], comparison.lengths
    cells = [[comparison.row(task.name, n, entry) for n in lengths] for entry in entries]
    known = [abs(c.difference) for line in cells for c in line if math.isfinite(c.difference)]
    reach = max(known, default=0.0) or 1.0
    shades = axes.imshow(
        [[cell.difference for cell in line] for line in cells],
        cmap="RdBu" if task.higher_is_better else "RdBu_r",
        vmin=-reach,
        vmax=reach,
        aspect="auto",
    )
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            _difference_label(axes, x, y, cell, task.share, dark=abs(cell.difference) > 0.6 * reach)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(entries)), entries)
    axes.tick_params(length=0)
    axes.set_xlabel("length in tokens")
    axes.set_title("difference (* p < 0.05 after Holm)", fontsize=9, loc="left")
    axes.figure.colorbar(shades, ax=axes, label=task.unit)


def _difference_label(
    axes: Axes, x: int, y: int, cell: ComparedCell, share: bool, *, dark: bool
) -> None:
    if math.isnan(cell.difference):
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", edgecolor="0.7")
        )
        text = "failed" if cell.failed else "–"
    else:
        text = change(cell.difference, share=share) + ("*" if cell.significant else "")
    if cell.significant:
        axes.add_patch(
            Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="black", linewidth=2)
        )
    axes.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        fontsize=8,
        weight="bold" if cell.significant else "normal",
        color="white" if dark else "black",
    )


def report_plots(
    sweeps: Sequence[SweepFolder], names: Sequence[str], out: Path
) -> dict[Path, bytes]:
    """Every plot of a report, drawn: the files that go beside `out`, and what is in them."""
    looks = styles([method for sweep in sweeps for method in sweep.methods])
    drawn: dict[str, Figure] = {}
    for sweep, name in zip(sweeps, names, strict=True):
        for task in sweep.tasks:
            chart = value_chart(sweep, task, looks)
            drawn[f"{name} {task}"] = _chart_plot(chart, f"{name}, {task}")
            found = [sections.depths(sweep, task, method) for method in sweep.methods]
            maps = [each for each in found if each is not None]
            if maps:
                drawn[f"{name} {task} depth"] = _heatmaps(maps, f"{name}, {task}: share found")
        positions = sections.positions(sweep)
        if positions is not None:
            chart = position_chart(sweep, positions, looks)
            drawn[f"{name} position"] = _chart_plot(chart, f"{name}, loss by position")
    files: dict[Path, bytes] = {}
    for name, figure in drawn.items():
        stem = f"{out.stem}-{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}"
        for kind in ("png", "svg"):
            stream = io.BytesIO()
            figure.savefig(stream, format=kind, dpi=150)
            files[out.with_name(f"{stem}.{kind}")] = stream.getvalue()
    return files


def _chart_plot(chart: Chart, title: str) -> Figure:
    figure, axes = _empty_figure(6.4, 4.0, title)
    for line in chart.series:
        xs = [point.x for point in line.points]
        colour = _style_colour(line.style)
        axes.plot(
            xs,
            [point.y for point in line.points],
            color=colour,
            linestyle=_DASHES[line.style.dash],
            marker=_MARKERS[line.style.marker],
            markersize=4,
            linewidth=1.6,
            label=line.method,
        )
        if chart.bands:
            low, high = [p.low for p in line.points], [p.high for p in line.points]
            axes.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(chart.ticks)))
    axes.xaxis.set_major_formatter(FixedFormatter([tokens(n) for n in chart.ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if chart.share:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _mark_window(axes, chart.window)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _heatmaps(maps: Sequence[dict[str, Any]], title: str) -> Figure:
    across = min(3, len(maps))
    down = math.ceil(len(maps) / across)
    lengths, depths = maps[0]["lengths"], max(len(each["depths"]) for each in maps)
    width = across * (1.1 + 0.42 * len(lengths))
    figure = Figure(figsize=(max(width, 4), down * (0.9 + 0.24 * depths)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axes, each in zip(figure.subplots(down, across, squeeze=False).flat, maps, strict=False):
        values = [
            [math.nan if c is None or c["value"] is None else c["value"] for c in row]
            for row in each["cells"]
        ]
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title(each["method"], fontsize=9, loc="left")
        axes.set_xticks(range(len(lengths)), [tokens(n) for n in lengths], fontsize=7)
        axes.set_yticks(range(len(each["depths"])), each["depths"], fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    ink = "white" if value > 0.55 else "black"
                    axes.text(
                        x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=ink
                    )
    for axes in figure.axes[len(maps) :]:
        axes.set_visible(False)
    return figure


def _empty_figure(width: float, height: float, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots()


def _style_colour(style: Style) -> str:
    return "black" if style.colour is None else _COLOURS[style.colour]
