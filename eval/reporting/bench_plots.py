"""A comparison of decodings as a picture: a dot with its interval for each decoding and figure."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..decoding.result import DECODING, TEXT, DecodeBench, Metric
from .palette import COLOURS, INK, MARKERS
from .plots import new_figure

__all__ = ["draw_decode_bench"]

_SHOWN = ("seq_rep_4", "loops", "entropy", "cross_bleu", "keys")


def draw_decode_bench(result: DecodeBench) -> Figure:
    """Draw a panel for each figure: decodings down, models by colour, the text as a line."""
    metrics = [
        m
        for m in DECODING
        if m.name in _SHOWN and any(row.figure(m.name) for row in result.of("decoding"))
    ]
    labels = [label for label, _ in result.decodings]
    height = 1.6 + 0.24 * len(labels) * max(1, len(result.models) * 0.7)
    wide = 0.07 * max(map(len, labels))
    picture = new_figure(1.0 + wide + 2.5 * len(metrics), height, "what models write, by decoding")
    grid = picture.subplots(1, len(metrics), squeeze=False, sharey=True).flatten()
    for axes, metric in zip(grid, metrics, strict=True):
        _panel(axes, result, metric, labels)
    grid[0].set_yticks(range(len(labels)), labels)
    grid[0].invert_yaxis()
    handles, names = grid[0].get_legend_handles_labels()
    picture.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return picture


def _panel(axes: Axes, result: DecodeBench, metric: Metric, labels: list[str]) -> None:
    count = len(result.models)
    for number, model in enumerate(result.models):
        colour = COLOURS[number % len(COLOURS)].light
        rows = {row.decoding: row.figure(metric.name) for row in result.of("decoding", model.name)}
        text = rows.get(TEXT)
        if text is not None:
            axes.axvline(
                text.value,
                color=colour if count > 1 else INK,
                linewidth=1,
                linestyle=(0, (4, 3)),
                label=f"the text, as {model.name} reads it",
            )
        found = [(place, rows.get(label)) for place, label in enumerate(labels)]
        points = [(place, one) for place, one in found if one is not None]
        shift = (number - (count - 1) / 2) * 0.6 / count
        axes.errorbar(
            [one.value for _, one in points],
            [place + shift for place, _ in points],
            xerr=[
                [_reach(one.value - one.low) for _, one in points],
                [_reach(one.high - one.value) for _, one in points],
            ],
            color=colour,
            marker=MARKERS[number % len(MARKERS)].matplotlib,
            linestyle="none",
            markersize=4.5,
            elinewidth=1.2,
            label=model.name,
        )
    axes.set_title(metric.title, fontsize=10, loc="left")
    if metric.scale == "share":
        axes.set_xlim(-0.03, 1.03)
    axes.grid(axis="y", color="0.93", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _reach(distance: float) -> float:
    return 0.0 if math.isnan(distance) else max(0.0, distance)
