"""A progress bar with the remaining time, on stderr; nothing where that is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.progress import TimeRemainingColumn as Remaining

__all__ = ["Progress"]


class Progress:
    """A bar over a total of any unit."""

    def __init__(self, total: float, *, shown: bool) -> None:
        console = Console(stderr=True)
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            Remaining(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
            speed_estimate_period=600,  # steps take minutes at long lengths
        )
        self._task = self._rich.add_task("", total=total)

    def __enter__(self) -> Progress:
        self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rich.stop()

    def at(self, what: str) -> None:
        """Say what is being done."""
        self._rich.update(self._task, description=what)

    def advance(self, amount: float) -> None:
        """Go on by `amount` of the total."""
        self._rich.advance(self._task, amount)
