"""Decodings as points over two figures: where each piece lies in the SVG that the page draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..decoding.result import TEXT, DecodeBench, Figure
from .charts import Style, linear_axis
from .decoding_tables import written
from .palette import COLOURS, MARKERS

__all__ = ["decoding_styles", "scatter"]

_WIDTH, _HEIGHT = 400.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 24.0, 24.0


def decoding_styles(benches: Sequence[DecodeBench]) -> dict[str, Style]:
    """A look for each decoding: a colour for its name; its settings differ in markers."""
    labels = dict.fromkeys(name for bench in benches for name in bench.decoding_block)
    names = list(dict.fromkeys(label.partition(":")[0] for label in labels if label != TEXT))
    found: dict[str, Style] = {}
    turns: dict[str, int] = {}
    for label in labels:
        if label == TEXT:
            found[label] = Style(None, 0, 0)
            continue
        name = label.partition(":")[0]
        turn = turns[name] = turns.get(name, -1) + 1
        place = names.index(name)
        found[label] = Style(place % len(COLOURS), 0, 1 + (place + turn) % (len(MARKERS) - 1))
    return found


def scatter(
    bench: DecodeBench,
    among: Sequence[DecodeBench],
    looks: dict[str, Style],
    figures: tuple[str, str],
) -> dict[str, Any]:
    """A point with both intervals for each decoding that has both figures.

    Args:
        bench: whose points are drawn.
        among: benches that share the axes.
        looks: of all decodings.
        figures: what is drawn across, and what up.
    """
    x, y = figures
    drawn = [block for each in among for block in each.decoding_block.values()]
    drawn = [block for block in drawn if _drawn(block, figures)]
    across = _Axis([block[x] for block in drawn], _LEFT + 8, _WIDTH - _RIGHT - 8)
    up = _Axis([block[y] for block in drawn], _HEIGHT - _BOTTOM, _TOP)
    points: list[dict[str, Any]] = []
    for name, block in bench.decoding_block.items():
        if not _drawn(block, figures):
            continue
        said = [name]
        for label in figures:
            value, interval = written(label, block[label])
            said.append(f"{label} {value}" + (f" ({interval})" if interval else ""))
        points.append(
            {
                "name": name,
                "style": looks[name],
                "x": across.at(block[x].value),
                "y": up.at(block[y].value),
                "wide": across.span(block[x]),
                "high": up.span(block[y]),
                "tip": "\n".join(said),
            }
        )
    return {
        "points": points,
        "x_ticks": across.ticks,
        "y_ticks": up.ticks,
        "x_label": x,
        "y_label": y,
        "frame": (_LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM),
        "size": (_WIDTH, _HEIGHT),
    }


def _drawn(block: dict[str, Figure], figures: tuple[str, str]) -> bool:
    return all(name in block and math.isfinite(block[name].value) for name in figures)


class _Axis:
    """Places of figures that are not negative, between two ends of the picture."""

    def __init__(self, figures: Sequence[Figure], first: float, last: float) -> None:
        ends = [end for f in figures for end in (f.value, f.low, f.high) if math.isfinite(end)]
        ends = [max(0.0, end) for end in ends] or [0.0, 1.0]
        self._low, self._high, levels = linear_axis(min(ends), max(ends))
        self._first, self._last = first, last
        self.ticks = [(self.at(level), f"{level:g}") for level in levels]

    def at(self, value: float) -> float:
        share = (min(max(value, self._low), self._high) - self._low) / (self._high - self._low)
        return round(self._first + share * (self._last - self._first), 1)

    def span(self, figure: Figure) -> tuple[float, float] | None:
        if math.isnan(figure.low):
            return None
        return self.at(figure.low), self.at(figure.high)
