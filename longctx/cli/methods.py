"""The command that lists the methods: `longctx methods`."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from ..catalogue import entries
from .catalogue_table import print_entries

__all__ = ["COMMAND", "Methods"]


@dataclass(frozen=True, slots=True)
class Methods:
    """List the methods: what each does, its fields, an example.

    Examples:
        longctx methods
        longctx methods yarn
    """

    names: Positional[tuple[str, ...]] = ()
    """Methods to be shown at length; default: all in short."""

    def run(self) -> int:
        """Print them."""
        found = entries("longctx.patches", "METHOD")
        print_entries(
            found,
            self.names,
            lambda entry: (
                f"longctx convert MODEL OUT --to {entry.example()}"
                if entry.converts
                else f"longctx extend MODEL OUT --method {entry.example()}"
            ),
        )
        return 0


COMMAND = Methods
