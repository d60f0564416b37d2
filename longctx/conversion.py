"""Methods that make another model out of a model's weights: what they are, and what they report.

What `extend` puts on can be taken off; what a conversion makes is a new model. The original stays
as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol, runtime_checkable

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .config_windows import CONVERSION
from .errors import MethodError
from .patch import Check
from .prompts.assembly import Prompt

__all__ = [
    "Calibration",
    "Conversion",
    "ConversionReport",
    "Converted",
    "entries_of_family",
    "put_record",
    "recorded",
]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a conversion reads to choose what it does."""

    ids: Tensor
    """Text, int64 [rows, tokens]; empty where it does not calibrate."""
    prompts: tuple[Prompt, ...] = ()
    """Keys hidden in text and asked for, where it `asks_for_keys`."""


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
    plain_loadable: ClassVar[bool] = True
    """Whether the new model is one of transformers' own. If not, the conversion records itself in
    the config (`put_record`), and `restore` puts back what plain transformers would leave out."""

    @property
    def asks_for_keys(self) -> bool:
        """Whether it measures how keys are found."""
        return False

    @property
    def same_within(self) -> int:
        """First tokens of a text whose logits are the original's, whatever comes of the others."""
        return 0

    @property
    def exact(self) -> bool:
        """Whether the new model has the logits of the original before it is trained."""
        return False

    def convert(
        self, model: PreTrainedModel, calibration: Calibration | None
    ) -> tuple[PreTrainedModel, Sequence[Check]]:
        """Make the new model; `model` is in eval mode and stays as it is.

        Args:
            model: without a patch, adapters or quantised weights.
            calibration: what to read, where it calibrates or asks for keys.

        Returns:
            The new model, and what was found on the way.

        Raises:
            ModelError: a family without the structure.
            MethodError: settings that do not fit the model.
        """
        ...

    def restore(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
        """Put back on a loaded model what its class in transformers does not have.

        Args:
            model: of the checkpoint's weights but for those below, which it is changed to use.
            tensors: by name, those of the checkpoint that the class has no place for.

        Raises:
            ModelError: they do not fit the model.
        """
        del model, tensors
        raise MethodError(f"{self.name} makes models of transformers: there is nothing to restore.")


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What was made, what of it is exact, and what it has to learn."""

    method: Conversion
    exact: bool
    """Whether logits are those of the original, seen on a few tokens."""
    parameters: tuple[int, int]
    """Before and after."""
    cache: tuple[int, int]
    """Bytes of the cache for each token, before and after."""
    bounded: tuple[int, int]
    """Bytes of a row's cache whatever its length, of layers whose cache does not grow."""
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        parameters, cache = (
            f"{before:,} → {after:,}" for before, after in (self.parameters, self.cache)
        )
        cache += " bytes per token"
        if any(self.bounded):
            cache += f", {self.bounded[0]:,} → {self.bounded[1]:,} whatever the length"
        state = "the original's logits" if self.exact else "not the original's logits"
        if self.method.same_within:
            state = (
                f"the original's logits in the first {self.method.same_within} tokens, not beyond"
            )
        return "\n".join(
            [
                f"{self.method}",
                f"  parameters {parameters}; cache {cache}; {state}",
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


_OF_THE_CLASS = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")


def entries_of_family(config: PreTrainedConfig, family: str) -> dict[str, Any]:
    """What a config says that the config of another family has a place for.

    Args:
        config: of a model whose MLPs or attention are to be another's.
        family: a model type of transformers.
    """
    own: dict[str, Any] = config.to_dict()
    there = set(AutoConfig.for_model(family).to_dict()) - set(_OF_THE_CLASS)
    said = {key: value for key, value in own.items() if key in there}
    heads = int(own["num_attention_heads"])
    said["head_dim"] = int(own.get("head_dim") or own["hidden_size"] // heads)
    return said


def put_record(model: PreTrainedModel, method: Conversion) -> None:
    """Let the config say which conversion the model is of, as `load` restores it."""
    fields = dataclasses.asdict(method)  # pyright: ignore[reportArgumentType]
    setattr(model.config, CONVERSION, {"version": 1, "name": method.name, **fields})


def recorded(model: PreTrainedModel) -> str | None:
    """The name of the conversion that the model is of and its class does not say, else None."""
    record: Any = getattr(model.config, CONVERSION, None)
    return None if record is None else str(record.get("name")) if isinstance(record, dict) else "?"  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
