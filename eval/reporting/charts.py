"""Line charts: what they show, whoever draws them (`svg.py` for the page, `plots.py` pictures)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..comparison.comparison import ComparedTask, Comparison
from ..results.reader import SweepData
from .families import MANY, best_of_each, family_of
from .palette import COLOURS, DASHES, MARKERS
from .tables import figure, spread

__all__ = [
    "Chart",
    "Point",
    "Series",
    "Style",
    "comparison_chart",
    "linear_axis",
    "position_chart",
    "styles",
    "tokens",
    "value_axis",
    "value_chart",
]

_REACH = 3  # times the highest value, or part of the lowest: bands beyond are cut off
_BANDS = 6  # with more lines than this their bands only hide each other


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
    front: frozenset[str] | None = None
    """Methods whose lines stand out among many; None: all."""
    remark: str = ""
    """What must be known of it, such as why no intervals are drawn."""

    def is_back(self, line: Series) -> bool:
        """Whether a line is drawn faintly, behind those that stand out."""
        return self.front is not None and line.method not in self.front

    def written(self, level: float) -> str:
        """A place of the value axis as it is written there."""
        return f"{level:.0%}" if self.share else f"{level:,g}"

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
    """A style for each method, by its name and its turn among the settings of that name.

    Of many methods a family has a colour, and those of one family differ in markers and dashes.
    """
    others = [label for label in dict.fromkeys(labels) if label != "none"]
    many = len(others) >= MANY
    name_of = family_of if many else (lambda label: label.partition(":")[0])
    names = list(dict.fromkeys(map(name_of, others)))
    seen: dict[str, int] = {}
    found: dict[str, Style] = {"none": Style(None, 0, 0)}
    for label in others:
        name = name_of(label)
        turn = seen[name] = seen.get(name, -1) + 1
        place = names.index(name)
        if many:  # no two of a family have both dash and marker in common
            found[label] = _style(place, turn + turn // (len(MARKERS) - 1), turn)
        else:
            found[label] = _style(place, turn, place)
    return found


def _style(colour: int, dash: int, marker: int) -> Style:
    return Style(colour % len(COLOURS), dash % len(DASHES), 1 + marker % (len(MARKERS) - 1))


def value_chart(sweep: SweepData, task: str, looks: dict[str, Style]) -> Chart:
    """The value of a task by length, a line per method; what failed is left out."""
    share = sweep.is_share(task)
    series: list[Series] = []
    missing: dict[str, None] = {}
    for method in sweep.methods:
        rows = [row for row in sweep.cells(task, method) if math.isfinite(row.value)]
        points: list[Point] = []
        for row in rows:
            text = figure(row, share=share)
            if interval := spread(row, share=share):
                text += f" ({interval}{'%' if share else ''})"
            elif row.interval.startswith("none"):
                missing[f"no interval{row.interval.removeprefix('none')}"] = None
            points.append(Point(row.length, row.value, row.low, row.high, f"{text}, n={row.n}"))
        series.append(Series(method, looks[method], tuple(points)))
    if sweep.is_answered(task):
        label = "found"
    elif share:
        label = "share" if sweep.is_higher_better(task) else "share, less is better"
    else:
        label = "perplexity"
    chart = _over_lengths(
        _value_title(sweep, task), label, share, sweep.lengths, sweep.original_window, series
    )
    front = best_of_each(sweep, task, sweep.methods) if len(series) > MANY else None
    return replace(
        chart, front=None if front is None else frozenset(front), remark="; ".join(missing)
    )


def comparison_chart(comparison: Comparison, task: ComparedTask) -> Chart:
    """The values of a task by length, a line per entry; what failed is left out."""
    series: list[Series] = []
    for place, entry in enumerate(comparison.entries):
        rows = [comparison.row(task.name, length, entry) for length in comparison.lengths]
        points = [
            Point(row.length, row.value, row.low, row.high, "")
            for row in rows
            if math.isfinite(row.value)
        ]
        turn, colour = divmod(place - 1, len(COLOURS))
        style = _style(colour, turn, colour) if place else Style(None, 0, 0)
        series.append(Series(entry, style, tuple(points)))
    window = comparison.original_window
    return _over_lengths(task.name, task.value, task.share, comparison.lengths, window, series)


def _over_lengths(
    title: str,
    y_label: str,
    share: bool,
    lengths: tuple[int, ...],
    window: int | None,
    series: Sequence[Series],
) -> Chart:
    values = [p.y for line in series for p in line.points]
    return Chart(
        title=title,
        x_label="length in tokens",
        y_label=y_label,
        share=share,
        log=not share and min(values, default=0.0) >= 1,
        ticks=lengths,
        window=window,
        series=tuple(series),
        bands=len(series) <= _BANDS,
        wide=tuple((n, n, f"{n:,} tokens") for n in lengths),
    )


def _value_title(sweep: SweepData, task: str) -> str:
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


def position_chart(sweep: SweepData, found: dict[str, Any], looks: dict[str, Style]) -> Chart:
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
    smallest = min((p.x for line in series for p in line.points), default=1.0)
    below = [2**k for k in range(3, 30) if smallest <= 2**k < sweep.lengths[0]]
    return Chart(
        title="",
        x_label="tokens before it",
        y_label="nats per token",
        share=False,
        log=False,
        ticks=(*below, *sweep.lengths),
        window=sweep.original_window,
        series=tuple(series),
        bands=False,  # a bin has few tokens a document: wide bands over each other
        wide=tuple(place for _, place in sorted(wide.items())),
    )


def tokens(length: int) -> str:
    """Write a length as axes do: 512, 4k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def value_axis(among: Sequence[Chart]) -> tuple[float, float, list[float]]:
    """Lowest and highest value of an axis that charts share, and where its lines are."""
    if among[0].share:
        return 0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]
    values = [value for chart in among for value in chart.values] or [1.0, 2.0]
    low, high = min(values), max(values)
    if among[0].log and high > 6 * low:
        low, high = low / 1.1, high * 1.1
        steps = [m * 10.0**k for k in range(300) for m in (1, 2, 5) if low <= m * 10.0**k <= high]
        return low, high, steps[:: max(1, len(steps) // 5)]
    return linear_axis(low, high, least=1 if among[0].log else None)


def linear_axis(
    low: float, high: float, *, least: int | None = None
) -> tuple[float, float, list[float]]:
    """Round ends around two values, and where the lines between are; `least` steps from 0 on."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-3)))
    step = next(s * step for s in (0.2, 0.5, 1, 2) if (high - low) / (s * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    if least is not None:
        first = max(first, least)
    first, last = (first, last) if first < last else (first, first + 1)
    return first * step, last * step, [round(i * step, 10) for i in range(first, last + 1)]
