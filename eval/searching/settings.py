"""What a search for divisors tries, and by what it judges: for Python and the command line."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.errors import RunError

__all__ = ["SearchSettings"]


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How long to search, and by what to judge."""

    evaluations: int = 160
    """Divisors that are tried, those of known methods included."""
    population: int = 12
    """Divisors of a generation."""
    prompts: int = 24
    """Passkey prompts of the new window by which each is judged: with 8 a search learns them by
    heart."""
    near_prompts: int = 12
    """The same inside the old window, so that it is not given up; 0 for none."""
    near_weight: float = 0.25
    """What the old window counts in the loss, where the new one counts 1."""
    finalists: int = 4
    """The best, judged once more by as many new prompts, of which the best of all is taken."""
    seed: int = 0
    """Of prompts and mutations."""
    text: tuple[str, ...] = ()
    """Files or folders of real text to hide keys in; none means parts of Python's manual that the
    evaluation does not use."""

    def __post_init__(self) -> None:
        least = {"evaluations": 5, "population": 6, "prompts": 2, "near_prompts": 0, "finalists": 1}
        for name, low in {**least, "seed": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise RunError(f"{name}={value!r}: expected a whole number, {low} or more.")
        if not 0 <= self.near_weight <= 100:
            raise RunError(f"near_weight={self.near_weight!r}: expected a number from 0 to 100.")
