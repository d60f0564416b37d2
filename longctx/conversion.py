"""Methods that make another model out of a model's weights: what they are, and what they report.

What `extend` puts on can be taken off; what a conversion makes is a new model. The original stays
as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from .errors import MethodError
from .patch import Check

__all__ = ["Conversion", "ConversionReport", "Converted"]


@runtime_checkable
class Conversion(Protocol):
    """What the house asks of a conversion: a frozen dataclass in a file of `patches/`.

    Derive from it, and write `slots: ClassVar[tuple[str, ...]] = ("weights",)` in the class: by
    that the house knows it before the file is run.
    """

    __slots__ = ()

    name: ClassVar[str]
    """The name of its file."""
    slots: ClassVar[tuple[str, ...]]
    """("weights",)."""
    calibrates: ClassVar[bool] = False
    """Whether it reads text through the model to choose what it does."""
    training: ClassVar[str]
    """What the new model still has to learn, as a sentence."""

    @property
    def exact(self) -> bool:
        """Whether the new model has the logits of the original before it is trained."""
        return False

    def convert(
        self, model: PreTrainedModel, ids: Tensor | None
    ) -> tuple[PreTrainedModel, Sequence[Check]]:
        """Make the new model; `model` is in eval mode and stays as it is.

        Args:
            model: without a patch, adapters or quantised weights.
            ids: int64 [rows, tokens] to read, where it calibrates.

        Returns:
            The new model, and what was found on the way.

        Raises:
            ModelError: a family without the structure.
            MethodError: settings that do not fit the model.
        """
        ...


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What was made, what of it is exact, and what it has to learn."""

    method: Conversion
    exact: bool
    """Whether logits are those of the original, seen on a few tokens."""
    parameters: tuple[int, int]
    """Before and after."""
    cache: tuple[int, int]
    """Bytes of the key/value cache per token, before and after."""
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        parameters, cache = (
            f"{before:,} → {after:,}" for before, after in (self.parameters, self.cache)
        )
        state = "the original's logits" if self.exact else "not the original's logits"
        return "\n".join(
            [
                f"{self.method}",
                f"  parameters {parameters}; cache {cache} bytes per token; {state}",
                *(f"  {'ok  ' if c.ok else 'FAIL'} {c.name}: {c.detail}" for c in self.checks),
                f"  to be trained: {self.method.training}",
            ]
        )


@dataclass(frozen=True, slots=True)
class Converted:
    """A new model made out of the weights of another, which stays as it was."""

    model: PreTrainedModel
    """In eval mode, of a class of transformers: `longctx.save` writes it, `longctx.extend` takes
    it."""
    method: Conversion
    outcome: ConversionReport

    def report(self) -> ConversionReport:
        """What is exact and what needs training."""
        return self.outcome

    def remove(self) -> NoReturn:
        """Refuse: other weights cannot be turned back.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            f"{self.method.name} made a new model, which is not undone: the original that was "
            "passed is as it was; go on with that, or load it again."
        )
