"""What a comparison of sweeps gives back: its cells and its pooled differences.

Missing values are NaN, and the reason stands beside them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longctx.errors import RunError

from .differences import Interval

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ComparedCell", "ComparedTask", "Comparison", "PooledDifference"]


@dataclass(frozen=True, slots=True)
class ComparedTask:
    """A task that at least one entry has."""

    name: str
    scale: Literal["share", "perplexity"]
    higher_is_better: bool
    answered: bool
    """Whether its prompts have one right answer each."""
    estimand: str
    """What a cell's value estimates."""
    interval: Interval
    """Of its differences."""
    figure: str | None = None
    """Where an observation's details hold its own share (`Task.figure`)."""

    @property
    def share(self) -> bool:
        """Whether its value is a share (0 to 1)."""
        return self.scale == "share"

    @property
    def kind(self) -> Literal["answers", "share", "perplexity"]:
        """What is compared: right answers, a share of each prompt's own, or NLL."""
        if self.share:
            return "answers" if self.answered else "share"
        return "perplexity"

    @property
    def value(self) -> str:
        """What a cell's value is, in a word or two."""
        return {"answers": "found", "share": "share", "perplexity": "perplexity"}[self.kind]

    @property
    def unit(self) -> str:
        """What a difference is counted in."""
        units = {"answers": "share found", "share": "share", "perplexity": "NLL per token, nats"}
        return units[self.kind]

    @property
    def compared(self) -> str:
        """What a difference is, and how it is tested."""
        drawn = self.interval == "bootstrap"
        if self.kind == "answers":
            over = (
                "interval: BCa bootstrap over haystacks, 95%"
                if drawn
                else "interval: Bonett–Price 95%, and t over haystacks for all lengths"
            )
            return (
                "difference: share found minus the baseline's, on the same prompts; p: exact "
                "McNemar (takes the prompts of a cell for independent), and sign flips of "
                f"haystacks for all lengths, where every prompt counts alike; {over}"
            )
        over = "p: t over documents; interval: BCa bootstrap over documents, 95%"
        over = over if drawn else "p and interval: t over documents"
        if self.kind == "share":
            better = "more" if self.higher_is_better else "less"
            return (
                f"difference: mean share minus the baseline's, on the same prompts ({better} is "
                f"better); {over}. All lengths: every prompt counts alike"
            )
        return (
            "difference: of the mean NLL per token from the baseline's, on the same target tokens, "
            f"shown as the change of perplexity in percent; {over}, so they speak of documents "
            "like these. All lengths: every token counts alike"
        )


@dataclass(frozen=True, slots=True)
class ComparedCell:
    """One task, length and entry. Missing values are NaN, and the reasons are given."""

    task: str
    length: int
    entry: str
    value: float
    """A share (0 to 1) or perplexity, over all observations of the entry."""
    low: float
    """Lower end of its 95% interval."""
    high: float
    n: int
    """Observations behind the value."""
    difference: float
    """From the baseline over the pairs: of the share, or NLL per token in nats."""
    difference_low: float
    """Lower end of its 95% interval."""
    difference_high: float
    interval: str
    """Of the difference: which, over what; "none: …" says why there is none."""
    p_value: float
    """Two-sided."""
    p_holm: float
    """Adjusted over all cells of the entry."""
    test: str
    paired: int
    """Observations that entry and baseline have in common."""
    significant: bool
    """Whether `p_holm` is below 0.05."""
    failed: str | None = None
    """Why the sweep has no value."""
    unpaired: str | None = None
    """Why there is no difference."""


@dataclass(frozen=True, slots=True)
class PooledDifference:
    """One task and entry over several lengths together."""

    task: str
    entry: str
    lengths: tuple[int, ...]
    """Those pooled; empty if none could be."""
    left_out: tuple[int, ...]
    """Those that belong here but could not be compared."""
    difference: float
    """From the baseline, in the unit of a cell's."""
    low: float
    high: float
    interval: str
    p_value: float
    p_holm: float
    """Adjusted over the tasks of the entry."""
    test: str
    smallest_p: float
    """No figures in clusters so few could give less: above 0.05 the test cannot reject."""
    paired: int
    clusters: int
    """Haystacks or documents."""
    significant: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Entries against the first of them."""

    baseline: str
    entries: tuple[str, ...]
    """All names, the baseline first."""
    models: dict[str, str]
    """Of each entry: model and method."""
    original_window: int | None
    """Of the baseline."""
    lengths: tuple[int, ...]
    tasks: tuple[ComparedTask, ...]
    rows: tuple[ComparedCell, ...]
    pooled: tuple[PooledDifference, ...]
    """Over all lengths."""
    inside: tuple[PooledDifference, ...]
    """Over the lengths up to the original window: what does an entry cost there?"""
    notes: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """A sentence for each cell that could not be compared."""
        return tuple(
            f"{row.task} at {row.length:,}, {row.entry}: {row.failed or row.unpaired}"
            for row in self.rows
            if row.failed or row.unpaired
        )

    def row(self, task: str, length: int, entry: str) -> ComparedCell:
        """The row of one cell.

        Raises:
            RunError: there is none.
        """
        for row in self.rows:
            if (row.task, row.length, row.entry) == (task, length, entry):
                return row
        raise RunError(
            f"no cell {task!r}, {length}, {entry!r}: compared are the tasks "
            f"{', '.join(t.name for t in self.tasks)}, the lengths {self.lengths}, the entries "
            f"{', '.join(self.entries)}."
        )

    def frame(self) -> pd.DataFrame:
        """The rows as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame([dataclasses.asdict(row) for row in self.rows])
