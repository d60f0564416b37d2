"""What the tables of `choosing` and `searching` read off a sweep."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from longctx.eval.results.sweep_result import SweepResult
from longctx.eval.tasks.shared.protocol import Observation

__all__ = ["observed", "share"]


def observed(
    result: SweepResult, label: str, lengths: Collection[int] | None = None
) -> dict[str, Observation]:
    """What one method gave, by length and item.

    Args:
        result: of a sweep.
        label: of the method.
        lengths: in tokens; None for all.
    """
    return {
        f"{o.length}/{o.item}": o
        for record in result.records
        if record.method == label
        for o in record.observations
        if lengths is None or o.length in lengths
    }


def share(found: Mapping[str, Observation]) -> float:
    """Share of right answers."""
    return sum(bool(o.correct) for o in found.values()) / len(found)
