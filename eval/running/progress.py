"""How far a sweep is, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from threading import Event, Thread
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.progress import TimeRemainingColumn as Remaining

__all__ = ["Progress"]


class Progress:
    """A bar with the remaining time or, where stderr is not a terminal, a line every 30 seconds."""

    def __init__(
        self, total: float, *, known: float = 0.0, shown: bool, every: float = 30.0
    ) -> None:
        """Begin.

        Args:
            total: of the work, in any unit.
            known: how much of it was done before, which says nothing of the time that is left.
            shown: or say nothing.
            every: seconds between two lines.
        """
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            Remaining(),
            TextColumn("left"),
            console=self._console,
            transient=True,
            disable=not (shown and self._console.is_terminal),
            speed_estimate_period=600,  # steps take minutes at long lengths
        )
        self._task = self._bar.add_task("", total=total)
        self._bar.tasks[0].completed = known
        self._known, self._shown = known, shown
        self._every = every
        self._ended = Event()
        self._lines = Thread(target=self._say, daemon=True)
        self._says = shown and not self._console.is_terminal
        self._began = time.monotonic()

    def note(self, said: str) -> None:
        """Print a sentence, if anything is shown."""
        if self._shown:
            self._console.print(f"note: {said}", markup=False)

    def __enter__(self) -> Progress:
        self._bar.start()
        if self._says:
            self._lines.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._ended.set()
        if self._says:
            self._lines.join()

    def at(self, what: str) -> None:
        """Say what is being done."""
        self._bar.update(self._task, description=what)

    def advance(self, amount: float) -> None:
        """Go on by `amount` of the total."""
        self._bar.advance(self._task, amount)

    def _say(self) -> None:
        """Print a line now and then, however long a step takes."""
        while not self._ended.wait(self._every):
            task = self._bar.tasks[0]
            share = task.completed / task.total if task.total else 0.0
            elapsed = time.monotonic() - self._began
            done, rest = task.completed - self._known, task.remaining or 0.0
            left = f", about {_clock(elapsed * rest / done)} left" if done > 0 else ""
            where = f" at {task.description}" if task.description else ""
            self._console.print(
                f"{share:.1%}{where}, {_clock(elapsed)} elapsed{left}", markup=False
            )


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(3725.0)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
