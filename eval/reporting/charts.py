"""Line charts of a report: what they show, for the page and for the plots beside it.

`geometry` says where each piece lies in the SVG of the page, drawn for a width of 400 units, so
that one fits a phone and several fit beside each other without their text becoming unreadable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..results.reader import SweepFolder
from .tables import figure, spread

__all__ = [
    "BANDS",
    "DASHES",
    "MARKERS",
    "Chart",
    "Point",
    "Series",
    "Style",
    "geometry",
    "position_chart",
    "styles",
    "tokens",
    "value_chart",
]

_COLOURS, _DASHES, _MARKERS = 7, 4, 5  # as many as the page and the plots tell apart
_REACH = 3  # times the highest value, or part of the lowest: bands beyond are cut off
BANDS = 6  # with more lines than this their bands only hide each other
DASHES = ("", "6 3", "2 2.5", "7 2.5 2 2.5")
MARKERS = (
    "M-3.4,0a3.4,3.4 0 1,0 6.8,0a3.4,3.4 0 1,0 -6.8,0z",
    "M-3,-3h6v6h-6z",
    "M0,-4.2L4.2,0L0,4.2L-4.2,0z",
    "M0,-4L3.8,3H-3.8z",
    "M0,4L3.8,-3H-3.8z",
)
_WIDTH, _HEIGHT = 400.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 24.0, 36.0
_APART = 36.0  # units between two labels on the axis of lengths


@dataclass(frozen=True, slots=True)
class Style:
    """How a method looks in every chart; settings of one method differ in dashes."""

    colour: int | None
    """Place in the palette; None: the colour of text, for the model as it came."""
    dash: int
    marker: int


@dataclass(frozen=True, slots=True)
class Point:
    """A value with its interval; NaN where there is none."""

    x: float
    y: float
    low: float
    high: float
    text: str
    """As it is written."""


@dataclass(frozen=True, slots=True)
class Series:
    """The line of a method."""

    method: str
    style: Style
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over a doubling axis of tokens."""

    title: str
    x_label: str
    y_label: str
    share: bool
    """From 0 to 100%; otherwise the axis fits the values, doubling if `log`."""
    log: bool
    ticks: tuple[int, ...]
    window: int | None
    """Original window, marked."""
    series: tuple[Series, ...]
    bands: bool
    """Whether intervals are drawn without being asked for."""
    wide: tuple[tuple[float, float, str], ...] = ()
    """First, last and name of each place that can be pointed at."""

    @property
    def values(self) -> list[float]:
        """What the axis must hold: values, and interval ends unless these lie far beyond."""
        points = [p for line in self.series for p in line.points]
        ys = [p.y for p in points]
        if not ys:
            return []
        ends = [end for p in points for end in (p.low, p.high) if math.isfinite(end)]
        low, high = self.reach
        return [*ys, *(min(max(end, low), high) for end in ends if self.bands)]

    @property
    def reach(self) -> tuple[float, float]:
        """Where bands are cut off, so that a wide one does not flatten all lines."""
        ys = [p.y for line in self.series for p in line.points]
        if self.log:
            return min(ys) / _REACH, max(ys) * _REACH
        return min(ys) - 2 * (max(ys) - min(ys)), max(ys) + 2 * (max(ys) - min(ys))

    @property
    def cut(self) -> bool:
        """Whether a band is cut off."""
        points = [p for line in self.series for p in line.points]
        if not self.bands or self.share or not points:
            return False
        low, high = self.reach
        return any(p.low < low or p.high > high for p in points)


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each method, by its name and its turn among the settings of that name."""
    names = list(dict.fromkeys(label.partition(":")[0] for label in labels if label != "none"))
    seen: dict[str, int] = {}
    found: dict[str, Style] = {"none": Style(None, 0, 0)}
    for label in dict.fromkeys(labels):
        name = label.partition(":")[0]
        if label == "none":
            continue
        turn = seen[name] = seen.get(name, -1) + 1
        place = names.index(name)
        found[label] = Style(place % _COLOURS, turn % _DASHES, 1 + place % (_MARKERS - 1))
    return found


def value_chart(sweep: SweepFolder, task: str, looks: dict[str, Style]) -> Chart:
    """The value of a task by length, a line per method; what failed is left out."""
    share = sweep.is_share(task)
    series: list[Series] = []
    for method in sweep.methods:
        rows = [row for row in sweep.cells(task, method) if math.isfinite(row.value)]
        points: list[Point] = []
        for row in rows:
            text = figure(row, share=share)
            if interval := spread(row, share=share):
                text += f" ({interval}{'%' if share else ''})"
            points.append(Point(row.length, row.value, row.low, row.high, f"{text}, n={row.n}"))
        series.append(Series(method, looks[method], tuple(points)))
    values = [p.y for line in series for p in line.points]
    lengths: tuple[int, ...] = tuple(sorted(sweep.report["lengths"]))
    return Chart(
        title=_value_title(sweep, task),
        x_label="length in tokens",
        y_label="found" if sweep.is_answered(task) else task,
        share=share,
        log=not share and min(values, default=0.0) >= 1,
        ticks=lengths,
        window=sweep.report["original_window"],
        series=tuple(series),
        bands=len(series) <= BANDS,
        wide=tuple((n, n, f"{n:,} tokens") for n in lengths),
    )


def _value_title(sweep: SweepFolder, task: str) -> str:
    """What is seen at the longest length, without a claim that a difference is more than chance."""
    share, answered = sweep.is_share(task), sweep.is_answered(task)
    rows = [row for row in sweep.rows if row.task == task and math.isfinite(row.value)]
    if not rows:
        return "no cell could be measured"
    longest = max(row.length for row in rows)
    rows = [row for row in rows if row.length == longest]
    best = (max if sweep.is_higher_better(task) else min)(row.value for row in rows)
    first = [row for row in rows if row.value == best]
    said = figure(first[0], share=share)
    if len(first) == len(rows) > 1:
        return f"at {longest:,} tokens every method stands at {said}"
    who, many = (first[0].method, False) if len(first) == 1 else (f"{len(first)} methods", True)
    if answered:
        return f"at {longest:,} tokens {who} find{'' if many else 's'} the most, {said}"
    which = "highest" if sweep.is_higher_better(task) else "lowest"
    return f"at {longest:,} tokens {who} {'have' if many else 'has'} the {which}, {said}"


def position_chart(sweep: SweepFolder, found: dict[str, Any], looks: dict[str, Style]) -> Chart:
    """Mean NLL by the number of tokens before, a line per method."""
    series: list[Series] = []
    wide: dict[float, tuple[float, float, str]] = {}
    for line in found["lines"]:
        points: list[Point] = []
        for each in line["bins"]:
            if each["nll"] is None:
                continue
            first, last = each["first"], each["last"]
            middle = math.sqrt(first * (last + 1))
            low, high = (math.nan if each[k] is None else each[k] for k in ("low", "high"))
            text = f"{each['nll']:.3f}"
            if math.isfinite(low):
                text += f" ({low:.3f}–{high:.3f})"
            points.append(Point(middle, each["nll"], low, high, text))
            name = f"{first:,}–{last:,} tokens before, n={each['tokens']:,}"
            wide.setdefault(middle, (first, last + 1, name))
        series.append(Series(line["method"], looks[line["method"]], tuple(points)))
    lengths: tuple[int, ...] = tuple(sorted(sweep.report["lengths"]))
    smallest = min((p.x for line in series for p in line.points), default=1.0)
    below = [2**k for k in range(3, 30) if smallest <= 2**k < lengths[0]]
    return Chart(
        title="",
        x_label="tokens before it",
        y_label="nats per token",
        share=False,
        log=False,
        ticks=(*below, *lengths),
        window=sweep.report["original_window"],
        series=tuple(series),
        bands=False,  # a bin has few tokens a document: wide bands over each other
        wide=tuple(place for _, place in sorted(wide.items())),
    )


def tokens(length: int) -> str:
    """Write a length as axes do: 512, 4k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def geometry(chart: Chart, among: Sequence[Chart]) -> dict[str, Any]:
    """Where all pieces lie; the value axis is the same for all charts `among` which it stands."""
    xs = [p.x for c in among for line in c.series for p in line.points]
    ends = sorted({*xs, *(t for c in among for t in c.ticks), *_marks(among)}) or [1.0, 2.0]
    left, right = math.log2(ends[0]), math.log2(ends[-1])
    if left == right:
        left, right = left - 1, right + 1
    low, high, levels = _levels(among)

    def across(x: float) -> float:
        share = (math.log2(x) - left) / (right - left)
        return round(_LEFT + 8 + share * (_WIDTH - _LEFT - _RIGHT - 16), 1)

    def up(y: float) -> float:
        y = min(max(y, low), high)
        share = math.log(y / low) / math.log(high / low) if chart.log else (y - low) / (high - low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    lines: list[dict[str, Any]] = []
    for line in chart.series:
        spots = [(across(p.x), up(p.y)) for p in line.points]
        sure = [p for p in line.points if math.isfinite(p.low)]
        edge = [(across(p.x), up(p.high)) for p in sure]
        edge += [(across(p.x), up(p.low)) for p in reversed(sure)]
        lines.append(
            {
                "method": line.method,
                "style": line.style,
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
        "x_ticks": ticks,
        "y_ticks": [(up(y), f"{y:.0%}" if chart.share else f"{y:,g}") for y in levels],
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


def _levels(among: Sequence[Chart]) -> tuple[float, float, list[float]]:
    """Lowest and highest value of the axis, and where its lines are."""
    if among[0].share:
        return 0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]
    values = [value for chart in among for value in chart.values] or [1.0, 2.0]
    low, high = min(values), max(values)
    if among[0].log and high > 6 * low:
        low, high = low / 1.1, high * 1.1
        steps = [m * 10.0**k for k in range(300) for m in (1, 2, 5) if low <= m * 10.0**k <= high]
        return low, high, steps[:: max(1, len(steps) // 5)]
    step = 10 ** math.floor(math.log10(max(high - low, 1e-3)))
    step = next(s * step for s in (0.2, 0.5, 1, 2) if (high - low) / (s * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    if among[0].log:
        first = max(first, 1)
    first, last = (first, last) if first < last else (first, first + 1)
    return first * step, last * step, [round(i * step, 10) for i in range(first, last + 1)]


def _path(spots: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in spots) if spots else ""
