"""A line chart as the page draws it: where each piece lies in its SVG.

It is drawn for a width of 400 units, so that one fits a phone and several fit beside each other
without their text becoming unreadable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from .charts import Chart, tokens, value_axis

__all__ = ["geometry"]

_WIDTH, _HEIGHT = 400.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 24.0, 36.0
_APART = 36.0  # units between two labels on the axis of lengths


def geometry(chart: Chart, among: Sequence[Chart]) -> dict[str, Any]:
    """Where all pieces lie; the value axis is the same for all charts `among` which it stands."""
    xs = [p.x for c in among for line in c.series for p in line.points]
    ends = sorted({*xs, *(t for c in among for t in c.ticks), *_marks(among)}) or [1.0, 2.0]
    left, right = math.log2(ends[0]), math.log2(ends[-1])
    if left == right:
        left, right = left - 1, right + 1
    low, high, levels = value_axis(among)

    def across(x: float) -> float:
        share = (math.log2(x) - left) / (right - left)
        return round(_LEFT + 8 + share * (_WIDTH - _LEFT - _RIGHT - 16), 1)

    def up(y: float) -> float:
        y = min(max(y, low), high)
        share = math.log(y / low) / math.log(high / low) if chart.log else (y - low) / (high - low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    lines: list[dict[str, Any]] = []
    for line in sorted(chart.series, key=chart.is_back, reverse=True):
        spots = [(across(p.x), up(p.y)) for p in line.points]
        sure = [p for p in line.points if math.isfinite(p.low)]
        edge = [(across(p.x), up(p.high)) for p in sure]
        edge += [(across(p.x), up(p.low)) for p in reversed(sure)]
        lines.append(
            {
                "method": line.method,
                "style": line.style,
                "back": chart.is_back(line),
                "spots": spots,
                "path": _path(spots),
                "band": _path(edge) + "z" if len(sure) > 1 else "",
            }
        )
    ticks: list[tuple[float, str]] = []
    for tick in sorted(chart.ticks, reverse=True):
        place = across(tick)
        if not ticks or ticks[-1][0] - place >= _APART:
            ticks.append((place, tokens(tick)))
    return {
        "chart": chart,
        "lines": lines,
        "front": {line.method: line.style for line in chart.series if not chart.is_back(line)},
        "x_ticks": ticks,
        "y_ticks": [(up(y), chart.written(y)) for y in levels],
        "window": None if chart.window is None else across(chart.window),
        "zones": _zones(chart, across),
        "frame": (_LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM),
    }


def _marks(among: Sequence[Chart]) -> list[int]:
    return [chart.window for chart in among if chart.window is not None]


def _zones(chart: Chart, across: Callable[[float], float]) -> list[dict[str, Any]]:
    """Places to point at, each up to half way to the next, with what all methods have there."""
    middles = [math.sqrt(first * last) for first, last, _ in chart.wide]
    spots = [across(x) for x in middles]
    edges = [_LEFT, *((a + b) / 2 for a, b in pairwise(spots)), _WIDTH - _RIGHT]
    zones: list[dict[str, Any]] = []
    for number, (middle, (_, _, name)) in enumerate(zip(middles, chart.wide, strict=True)):
        said = [
            (p.y, f"{line.method}: {p.text}")
            for line in chart.series
            for p in line.points
            if math.isclose(p.x, middle)
        ]
        said.sort(key=lambda item: item[0], reverse=chart.share)
        zones.append(
            {
                "x": round(edges[number], 1),
                "width": round(edges[number + 1] - edges[number], 1),
                "at": spots[number],
                "tip": "\n".join([name, *(text for _, text in said)]),
            }
        )
    return zones


def _path(spots: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in spots) if spots else ""
