"""How much of a sweep is done, in time to expect and in prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..tasks.shared.protocol import Unit
from .progress import Progress

__all__ = ["Meter", "cost"]


def cost(unit: Unit) -> float:
    """Time to expect, up to a factor: attention grows with the length, the rest does not."""
    return unit.tokens * (1 + max(unit.lengths) / 8192)


class Meter:
    """Moves a sweep's progress on within the units of one task under one method."""

    def __init__(self, bar: Progress, label: str, units: Sequence[Unit]) -> None:
        """Begin a task.

        Args:
            bar: of the sweep; what was finished before it began is in it already.
            label: method and task.
            units: all of the task; none where it is not known which will be asked.
        """
        self._bar, self._label = bar, label
        self._cells: Counter[tuple[int, ...]] = Counter()
        for unit in units:
            self._cells[unit.lengths] += unit.prompts
        self._done: Counter[tuple[int, ...]] = Counter()
        self._unit, self._finished, self._moved = Unit((1,), 0), 0, 0.0

    def begin(self, unit: Unit, finished: int = 0) -> None:
        """Go to a unit, so many of whose prompts were finished before the sweep began."""
        self._unit, self._finished = unit, finished
        self._bar.at(self._said())

    def add(self, prompts: int) -> None:
        """So many further prompts are finished."""
        prompts = min(prompts, self._unit.prompts - self._finished)
        self._finished += prompts
        self._move(cost(self._unit) * prompts / self._unit.prompts)
        self._bar.at(self._said())

    def end(self) -> None:
        """The unit is done, however it was."""
        self.add(self._unit.prompts)
        self._done[self._unit.lengths] += self._unit.prompts

    def fill(self, planned: Iterable[Unit]) -> None:
        """The task is done, though not all was asked that might have been."""
        self._move(sum(map(cost, planned)) - self._moved)

    def _move(self, amount: float) -> None:
        self._moved += amount
        self._bar.advance(amount)

    def _said(self) -> str:
        """Such as "yarn:2 ruler/vt 4,096: 12 of 260 prompts"."""
        unit = self._unit
        part = f"/{unit.part}" if unit.part else ""
        to = "to " if len(unit.lengths) > 1 else ""
        done = self._done[unit.lengths] + self._finished
        total = self._cells[unit.lengths]
        of = f" of {total:,}" if total else ""
        what = "prompt" if max(total, done) == 1 else "prompts"
        return f"{self._label}{part} {to}{max(unit.lengths):,}: {done:,}{of} {what}"
