"""The command that lists the tasks: `longctx tasks`."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from ..catalogue import entries
from .catalogue_table import print_entries

__all__ = ["COMMAND", "Tasks"]


@dataclass(frozen=True, slots=True)
class Tasks:
    """List the tasks of a sweep: what each asks, its fields, an example.

    Examples:
        longctx tasks
        longctx tasks needle
    """

    names: Positional[tuple[str, ...]] = ()
    """Tasks to be shown at length; default: all in short."""

    def run(self) -> int:
        """Print them."""
        found = entries("longctx.eval.tasks", "TASK")
        print_entries(
            found, self.names, lambda entry: f"longctx sweep MODEL --tasks {entry.example()}"
        )
        return 0


COMMAND = Tasks
