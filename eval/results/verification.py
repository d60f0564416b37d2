"""How many answers of a sweep were generated too, and which came out otherwise than scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Verification", "notes_of"]


@dataclass(frozen=True, slots=True)
class Verification:
    """How many answers were generated too, and which came out otherwise.

    Scores by teacher forcing know what greedy decoding says up to its first wrong token, generated
    answers all of it: so far the two must be the same, token by token. Answers whose logits held a
    NaN have no score and are left out.
    """

    method: str
    task: str
    checked: int
    disagreements: tuple[str, ...]
    """A sentence each."""
    lost: tuple[str, ...] = ()
    """Prompts that left no memory to generate after."""

    @property
    def note(self) -> str:
        """What goes under the table."""
        where = f"{self.task} under {self.method}"
        lost = f"; no memory to generate after {', '.join(self.lost)}" if self.lost else ""
        if not self.checked:
            return f"{where}: no answer could be checked{lost or ': no answer has a score'}"
        told = f"{where}: {self.checked} answers were generated too"
        if not self.disagreements:
            return f"{told}, all as scored{lost}"
        wrong = "; ".join(self.disagreements)
        return f"{told}, {len(self.disagreements)} NOT as scored: {wrong}{lost}"


def notes_of(checks: Sequence[Verification]) -> list[str]:
    """What goes under the tables: what is wrong each by itself, what is right in a sentence."""
    clean = [c for c in checks if c.checked and not c.disagreements and not c.lost]
    notes = [check.note for check in checks if check not in clean]
    if clean:
        counts = sum(check.checked for check in clean)
        which = ", ".join(dict.fromkeys(f"{check.task} under {check.method}" for check in clean))
        notes.append(f"{counts} answers were generated too, all as scored ({which})")
    return notes
