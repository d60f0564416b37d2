"""The plots of a report as PNG and SVG files, in the colours that the sweep's own plot has."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator, PercentFormatter

from . import html_sections as sections
from .html_charts import Chart, Style, position_chart, styles, tokens, value_chart
from .html_data import SweepFolder
from .plot import COLOURS, DASHES, MARKERS, mark_window

__all__ = ["figures"]


def figures(sweeps: Sequence[SweepFolder], names: Sequence[str], out: Path) -> dict[Path, bytes]:
    """Every plot of a report, drawn: the files that go beside `out`, and what is in them."""
    looks = styles([method for sweep in sweeps for method in sweep.methods])
    drawn: dict[str, Figure] = {}
    for sweep, name in zip(sweeps, names, strict=True):
        for task in sweep.tasks:
            chart = value_chart(sweep, task, looks)
            drawn[f"{name} {task}"] = _lines(chart, f"{name}, {task}")
            found = [sections.depths(sweep, task, method) for method in sweep.methods]
            maps = [each for each in found if each is not None]
            if maps:
                drawn[f"{name} {task} depth"] = _heatmaps(maps, f"{name}, {task}: share found")
        positions = sections.positions(sweep)
        if positions is not None:
            chart = position_chart(sweep, positions, looks)
            drawn[f"{name} position"] = _lines(chart, f"{name}, loss by position")
    files: dict[Path, bytes] = {}
    for name, figure in drawn.items():
        stem = f"{out.stem}-{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}"
        for kind in ("png", "svg"):
            stream = io.BytesIO()
            figure.savefig(stream, format=kind, dpi=150)
            files[out.with_name(f"{stem}.{kind}")] = stream.getvalue()
    return files


def _lines(chart: Chart, title: str) -> Figure:
    figure, axes = _figure(6.4, 4.0, title)
    for line in chart.series:
        xs = [point.x for point in line.points]
        colour = _colour(line.style)
        axes.plot(
            xs,
            [point.y for point in line.points],
            color=colour,
            linestyle=DASHES[line.style.dash],
            marker=MARKERS[line.style.marker],
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
    mark_window(axes, chart.window)
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


def _figure(width: float, height: float, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots()


def _colour(style: Style) -> str:
    return "black" if style.colour is None else COLOURS[style.colour]
