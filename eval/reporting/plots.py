"""Sweeps, comparisons and the charts of a report as pictures: length on a doubling axis."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from ..comparison.comparison import ComparedCell, ComparedTask, Comparison
from ..results.reader import SweepData, data_of
from ..results.sweep_result import SweepResult
from . import sections
from .charts import (
    Chart,
    comparison_chart,
    position_chart,
    styles,
    tokens,
    value_axis,
    value_chart,
)
from .palette import COLOURS, DASHES, HEAT, INK, MARKERS
from .tables import change

__all__ = ["draw_comparison", "draw_sweep", "report_plots"]

_MARGIN = 0.03  # of an axis, beyond its ends
_FOUND = LinearSegmentedColormap.from_list("found", [step.light for step in HEAT])


def draw_sweep(result: SweepResult) -> Figure:
    """Draw every task of a sweep: value by length with its 95% interval, a line per method.

    Settings of one method share a colour and differ in dashes. The vertical line is the window
    that the model was trained with. What failed is left out.
    """
    sweep = data_of(result)
    tasks = len(sweep.tasks)
    across = min(tasks, 3)
    down = math.ceil(tasks / across)
    figure = _figure(1.8 + 4.6 * across, 4.2 * down, sweep.model)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes in grid[tasks:]:
        axes.set_visible(False)
    looks = styles(sweep.methods)
    for axes, task in zip(grid, sweep.tasks, strict=False):
        _draw_chart(axes, value_chart(sweep, task, looks), task)
    _legend(figure, grid[0])
    return figure


def _draw_chart(axes: Axes, chart: Chart, title: str | None = None) -> None:
    """Draw a line chart."""
    for line in chart.series:
        back = chart.is_back(line)
        xs = [point.x for point in line.points]
        colour = INK if line.style.colour is None else COLOURS[line.style.colour].light
        axes.plot(
            xs,
            [point.y for point in line.points],
            color=colour,
            linestyle=DASHES[line.style.dash].matplotlib,
            marker=MARKERS[line.style.marker].matplotlib,
            markersize=3 if back else 4.5,
            linewidth=0.8 if back else 1.6,
            alpha=0.4 if back else 1,
            zorder=2 if back else 3,
            label=line.method,
        )
        if chart.bands:
            low, high = [p.low for p in line.points], [p.high for p in line.points]
            axes.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
    if title is not None:
        axes.set_title(title, fontsize=11, loc="left")
    axes.set_xscale("log", base=2)
    _ticks(axes.xaxis, chart.ticks, [tokens(n) for n in chart.ticks])
    axes.set_xlabel(chart.x_label + (f"\n{chart.remark}" if chart.remark else ""))
    _value_scale(axes, chart)
    _mark_window(axes, chart.window)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _value_scale(axes: Axes, chart: Chart) -> None:
    """As far as the values go, if two ticks lie within."""
    low, high, levels = value_axis([chart])
    first, last = min(chart.values, default=low), max(chart.values, default=high)
    if not chart.share and sum(first <= level <= last for level in levels) > 1:
        low, high = first, last
    axes.set_ylabel(chart.y_label)
    if chart.log:
        margin = (high / low) ** _MARGIN
        axes.set_yscale("log")
        axes.set_ylim(low / margin, high * margin)
    else:
        margin = (high - low) * _MARGIN
        axes.set_ylim(low - margin, high + margin)
    _ticks(axes.yaxis, levels, [chart.written(level) for level in levels])


def _ticks(axis: XAxis | YAxis, places: Sequence[float], names: Sequence[str]) -> None:
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_major_formatter(FixedFormatter(list(names)))
    axis.set_minor_locator(NullLocator())


def _mark_window(axes: Axes, window: int | None) -> None:
    """Draw a line where the window ends that the model was trained with, if it is known."""
    if window is None:
        return
    axes.axvline(window, color="0.45", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        " original window",
        (window, 0.02),
        xycoords=("data", "axes fraction"),
        va="bottom",
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
    figure = _figure(width, max(3.2, height) * len(tasks), f"against {comparison.baseline}")
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for (left, right), task in zip(grid, tasks, strict=True):
        _draw_chart(left, comparison_chart(comparison, task), task.name)
        left.legend(frameon=False, fontsize=8)
        _difference_map(right, comparison, task)
    return figure


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


def report_plots(sweeps: Sequence[SweepData], names: Sequence[str], out: Path) -> dict[Path, bytes]:
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
    figure = _figure(6.4, 4.0, title)
    axes = figure.subplots()
    _draw_chart(axes, chart)
    _legend(figure, axes)
    return figure


def _heatmaps(maps: Sequence[dict[str, Any]], title: str) -> Figure:
    across = min(3, len(maps))
    down = math.ceil(len(maps) / across)
    lengths, depths = maps[0]["lengths"], max(len(each["depths"]) for each in maps)
    width = across * (1.1 + 0.42 * len(lengths))
    figure = _figure(max(width, 4), down * (0.9 + 0.24 * depths), title)
    for axes, each in zip(figure.subplots(down, across, squeeze=False).flat, maps, strict=False):
        values = [
            [math.nan if c is None or c["value"] is None else c["value"] for c in row]
            for row in each["cells"]
        ]
        axes.imshow(values, cmap=_FOUND, vmin=0, vmax=1, aspect="auto")
        axes.set_title(each["method"], fontsize=9, loc="left")
        axes.set_xticks(range(len(lengths)), [tokens(n) for n in lengths], fontsize=7)
        axes.set_yticks(range(len(each["depths"])), each["depths"], fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    ink = HEAT[round(value * (len(HEAT) - 1))].ink_light
                    axes.text(
                        x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=ink
                    )
    for axes in figure.axes[len(maps) :]:
        axes.set_visible(False)
    return figure


def _figure(width: float, height: float, title: str) -> Figure:
    """An empty one, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """Say beside the plots what the lines of these are."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
