"""A comparison as a picture: values by length, and beside them a map of the differences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .compare_table import change
from .plot import BANDS, frame

if TYPE_CHECKING:
    from .comparison import ComparedCell, ComparedTask, Comparison

__all__ = ["draw"]


def draw(comparison: Comparison) -> Figure:
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
        _lines(left, comparison, task)
        _map(right, comparison, task)
    figure.suptitle(f"against {comparison.baseline}", fontsize=11)
    return figure


def _lines(axes: Axes, comparison: Comparison, task: ComparedTask) -> None:
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
    frame(
        axes,
        task.name,
        comparison.lengths,
        comparison.original_window,
        share=task.value if task.share else None,
    )
    axes.legend(frameon=False, fontsize=8)


def _map(axes: Axes, comparison: Comparison, task: ComparedTask) -> None:
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
            _label(axes, x, y, cell, task.share, dark=abs(cell.difference) > 0.6 * reach)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(entries)), entries)
    axes.tick_params(length=0)
    axes.set_xlabel("length in tokens")
    axes.set_title("difference (* p < 0.05 after Holm)", fontsize=9, loc="left")
    axes.figure.colorbar(shades, ax=axes, label=task.unit)


def _label(axes: Axes, x: int, y: int, cell: ComparedCell, share: bool, *, dark: bool) -> None:
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
