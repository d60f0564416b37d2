"""Methods in families, by what they take over, so that many of them can be looked at."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from longctx.errors import MethodError
from longctx.reading.read import Reading
from longctx.registry import method_class

from ..results.reader import SweepData
from ..stats.effective_length import pi_length

__all__ = ["MANY", "best_of_each", "by_family", "family_of", "reads_to", "worth"]

T = TypeVar("T")
MANY = 7
"""More methods than this are shown by family: there are not so many colours to tell apart."""
_THRESHOLD = 0.8


def family_of(label: str) -> str:
    """The family of a method, as a report calls it.

    >>> family_of("none"), family_of("yarn:8"), family_of("yarn:2 + log_n")
    ('as it came', 'frequencies', 'on top of each other')
    """
    if " + " in label:
        return "on top of each other"
    match = re.match(r"\w+", label)
    name = match[0] if match else ""
    if name == "none":
        return "as it came"
    if name == Reading.name:
        return "reading in pieces"
    try:
        slots = method_class(name).slots
    except MethodError:  # of another installation
        return "others"
    if "attention" in slots:
        return "distances" if "positions" in slots else "who sees whom"
    return "frequencies" if "rotary" in slots else "others"


def by_family(items: Iterable[T], label: Callable[[T], str]) -> dict[str, list[T]]:
    """What belongs to methods, by their family, in the order in which families come."""
    found: dict[str, list[T]] = {}
    for item in items:
        found.setdefault(family_of(label(item)), []).append(item)
    return found


def reads_to(sweep: SweepData, task: str, method: str) -> int | None:
    """The longest length up to which every tested one has at least 80%; None where none has."""
    rows = sweep.cells(task, method)
    known = {row.length: row.value for row in rows if not math.isnan(row.value)}
    return pi_length(known, _THRESHOLD) if known else None


def worth(sweep: SweepData, task: str, method: str) -> tuple[float, ...]:
    """What a method is ranked by, the higher the better.

    Of answers how far it reads, then how many keys beyond the original window it finds, then its
    shares; of other tasks its values.
    """
    rows = sweep.cells(task, method)
    values = sum(row.value for row in rows if not math.isnan(row.value))
    if not sweep.is_share(task) or not sweep.is_higher_better(task):
        lost = sum(math.isnan(row.value) for row in rows)
        return (-lost, values if sweep.is_higher_better(task) else -values)
    return reads_to(sweep, task, method) or 0, sum(row.far_found or 0 for row in rows), values


def best_of_each(sweep: SweepData, task: str, methods: Sequence[str]) -> list[str]:
    """The best method of each family, and the model as it came."""
    families = by_family(methods, str)
    return [max(those, key=lambda m: worth(sweep, task, m)) for those in families.values()]
