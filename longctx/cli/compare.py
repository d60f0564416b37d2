"""The command that sets sweeps side by side: `longctx compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ..errors import RunError

__all__ = ["COMMAND", "Compare"]


@dataclass(frozen=True, slots=True)
class Compare:
    """Compare sweeps on the same prompts, with intervals and tests.

    The first run (or the first method of a single run) is the baseline. Runs may be of different
    models with one tokenizer; tasks and their settings must be the same. With --out, the folder
    gets the comparison as CSV, JSON and parquet, the plot as PNG and SVG.

    Examples:
        longctx compare runs/smollm2
        longctx compare base=runs/base tuned=runs/tuned --out runs/tuned-against-base
        longctx compare none=runs/all#none yarn=runs/all#yarn:4 pi=runs/pi
    """

    runs: Positional[tuple[str, ...]]
    """NAME=PATH, each a folder written by `longctx sweep --out`; PATH#METHOD takes one method."""
    out: Path | None = None
    """Folder for the comparison; default: it is printed only."""
    overwrite: bool = False
    """Replace a comparison that is there."""
    interval: Literal["t", "bootstrap"] = "t"
    """Of the differences: t (answers in a cell: Bonett-Price), or BCa bootstrap over haystacks or
    documents, of which it takes some twenty or more."""

    def run(self) -> int:
        """Read, compare, print and write."""
        from longctx.eval import compare, print_comparison, write_comparison
        from longctx.eval.reporting.files import refuse_taken_comparison

        if self.out is not None:
            refuse_taken_comparison(self.out, self.overwrite)
        comparison = compare(_named(self.runs), interval=self.interval)
        print_comparison(comparison)
        if self.out is not None:
            paths = write_comparison(comparison, self.out, overwrite=self.overwrite)
            print(f"{', '.join(path.name for path in paths)} are in {self.out}")
        return 1 if any(row.failed for row in comparison.rows) else 0


def _named(runs: Sequence[str]) -> dict[str, str]:
    """Runs by name; one without a name goes by that of its folder."""
    named: dict[str, str] = {}
    for text in runs:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or "#" in name:  # the "=" belongs to a folder or a method
            path = text
            name = Path(path.partition("#")[0]).resolve().name
        if not name or not path:
            raise RunError(f"{text!r} names no run: expected NAME=PATH or NAME=PATH#METHOD.")
        if name in named:
            raise RunError(
                f"two runs are named {name!r} ({named[name]} and {path}): write NAME=PATH for each."
            )
        named[name] = path
    return named


COMMAND = Compare
