"""The one palette: colours, dashes and markers of lines, for the page and for plots alike.

Lines: after Okabe & Ito 2008, told apart with every kind of colour vision, and as dark or as light
as the contrast with the page asks for. Pictures have a light ground.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COLOURS", "DASHES", "HEAT", "INK", "MARKERS", "Colour", "Drawn", "Heat"]


@dataclass(frozen=True, slots=True)
class Colour:
    """On a light and on a dark ground."""

    light: str
    dark: str


@dataclass(frozen=True, slots=True)
class Heat:
    """A step from 0 to 100%: its ground, and the ink that is read on it."""

    light: str
    dark: str
    ink_light: str
    ink_dark: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A dash or a marker, as matplotlib calls it and as SVG writes it."""

    matplotlib: str
    svg: str


INK = "black"
"""Of the model as it came, in pictures; the page has the colour of its text."""
COLOURS = (
    Colour("#0072b2", "#56b4e9"),
    Colour("#d55e00", "#ff8a3d"),
    Colour("#00805e", "#2ec49a"),
    Colour("#b5548a", "#e29ac2"),
    Colour("#9a6b00", "#f0b429"),
    Colour("#45a5dd", "#a6d8f5"),
    Colour("#6f7000", "#f0e442"),
)
DASHES = (
    Drawn("solid", ""),
    Drawn("dashed", "6 3"),
    Drawn("dotted", "2 2.5"),
    Drawn("dashdot", "7 2.5 2 2.5"),
)
MARKERS = (
    Drawn("o", "M-3.4,0a3.4,3.4 0 1,0 6.8,0a3.4,3.4 0 1,0 -6.8,0z"),
    Drawn("s", "M-3,-3h6v6h-6z"),
    Drawn("D", "M0,-4.2L4.2,0L0,4.2L-4.2,0z"),
    Drawn("^", "M0,-4L3.8,3H-3.8z"),
    Drawn("v", "M0,4L3.8,-3H-3.8z"),
)
HEAT = (
    Heat("#eef3f8", "#1d2731", "#14181d", "#f2f6fa"),
    Heat("#d3e2f0", "#223545", "#14181d", "#f2f6fa"),
    Heat("#b9d2e8", "#26435b", "#14181d", "#f2f6fa"),
    Heat("#9fc1e0", "#2a5171", "#14181d", "#f2f6fa"),
    Heat("#85b1d8", "#2d6087", "#14181d", "#f2f6fa"),
    Heat("#6aa0cf", "#2f6f9f", "#14181d", "#f2f6fa"),
    Heat("#578bba", "#5187b2", "#14181d", "#0d1117"),
    Heat("#4476a6", "#71a0c5", "#fff", "#0d1117"),
    Heat("#316192", "#91b9d8", "#fff", "#0d1117"),
    Heat("#1e4d7e", "#b2d2ec", "#fff", "#0d1117"),
    Heat("#0a3a6b", "#d3ecff", "#fff", "#0d1117"),
)
