"""Sweep results as a picture: a panel per task, length on a doubling axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from .task import Task
from .variants import Variant

if TYPE_CHECKING:
    from .results import SweepResult

__all__ = ["BANDS", "COLOURS", "DASHES", "MARKERS", "draw", "frame", "mark_window"]

# Okabe & Ito 2008: told apart with every kind of colour vision. Black is the model as it came.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
DASHES = ("solid", "dashed", "dotted", "dashdot")
MARKERS = "osD^vP*X"
BANDS = 6  # with more lines than this their bands only hide each other


def draw(result: SweepResult) -> Figure:
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
    styles = _styles([variant.label for variant in result.variants])
    for axes, task in zip(grid, result.tasks, strict=False):
        for variant in result.variants:
            _line(axes, result, task, variant, styles[variant.label])
        _frame(axes, result, task)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(result.model, fontsize=11)
    return figure


def _styles(labels: list[str]) -> dict[str, tuple[str, str, str]]:
    """(colour, dashes, marker) of each method."""
    names = list(dict.fromkeys(label.partition(":")[0] for label in labels if label != "none"))
    seen: dict[str, int] = {}
    styles: dict[str, tuple[str, str, str]] = {}
    for label in labels:
        name = label.partition(":")[0]
        turn = seen[name] = seen.get(name, -1) + 1
        place = names.index(name) if name in names else 0
        colour = "black" if label == "none" else COLOURS[place % len(COLOURS)]
        marker = "o" if label == "none" else MARKERS[(1 + place) % len(MARKERS)]
        styles[label] = (colour, DASHES[turn % len(DASHES)], marker)
    return styles


def _line(
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


def _frame(axes: Axes, result: SweepResult, task: Task) -> None:
    label = "found" if task.higher_is_better else "share, less is better"
    share = label if task.scale == "share" else None
    frame(axes, task.name, result.lengths, result.original_window, share=share)
    axes.grid(axis="y", color="0.9", linewidth=0.8)


def frame(
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
    axes.xaxis.set_major_formatter(FixedFormatter([_tokens(n) for n in lengths]))
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
    mark_window(axes, window)
    axes.spines[["top", "right"]].set_visible(False)


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def mark_window(axes: Axes, window: int | None) -> None:
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
