"""How much a choice of a method measures: for Python and the command line alike."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.errors import RunError

__all__ = ["ChoiceSettings"]


@dataclass(frozen=True, slots=True)
class ChoiceSettings:
    """How many prompts a candidate is given, and when it is dropped."""

    first_samples: int = 5
    """Prompts of the target length that every candidate is given."""
    screening_samples: int = 10
    """Prompts a length that those are given which the first ones did not rule out."""
    samples: int = 40
    """Prompts a length of the comparison, which no screening has seen."""
    finalists: int = 4
    """Candidates that are compared, beside the model as it came."""
    windows: int = 10
    """Windows of real text for the perplexity inside the old window."""
    task: str = "passkey"
    """What is asked, as `longctx sweep` writes it: a task with one right answer per prompt."""
    seed: int = 0
    """Of all prompts. Screening and comparison draw different ones."""

    def __post_init__(self) -> None:
        least = {"first_samples": 2, "screening_samples": 2, "samples": 2, "finalists": 1}
        for name, low in {**least, "windows": 2, "seed": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise RunError(f"{name}={value!r}: expected a whole number, {low} or more.")
