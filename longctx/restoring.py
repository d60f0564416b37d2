"""Restoring a conversion that a model's class in transformers does not say, from its checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from transformers import PreTrainedModel

from .attention.hook import ATTRIBUTE
from .config_windows import CONVERSION
from .errors import LongctxError, ModelError
from .quiet import without_messages
from .registry import make_conversion
from .schema import conform
from .weights import read_tensors

__all__ = ["restore_conversion", "without_report"]

_ANEW = "Convert the original anew."


_REPORTER = "transformers.modeling_utils"
"""The logger that reports tensors which a model's class has no place for."""


class _Version(Struct):
    version: Annotated[int, Meta(ge=1)]
    name: str


def restore_conversion(
    model: PreTrainedModel, source: str | Path, unexpected: Collection[str]
) -> set[str]:
    """Put back what the checkpoint's config records, if it records anything.

    Args:
        model: as transformers loaded it.
        source: the checkpoint, a folder or a hub id.
        unexpected: tensors that transformers had no place for.

    Returns:
        Those of them that were the conversion's.

    Raises:
        LongctxError: a record or tensors that do not fit the model.
    """
    record: Any = getattr(model.config, CONVERSION, None)
    if record is None:
        return set()
    where = f"{source}/config.json, entry {CONVERSION}"
    checked = conform(record, _Version, where, next_step=_ANEW, error=ModelError)
    if checked.version != 1:
        raise ModelError(f"{where}: version: expected 1, got {checked.version}. Upgrade longctx.")
    fields = {key: value for key, value in record.items() if key not in ("version", "name")}
    names = {name for name in unexpected if f".{ATTRIBUTE}." in name}
    try:
        method = make_conversion(checked.name, fields)
        method.restore(model, read_tensors(source, names))
    except LongctxError as error:
        raise type(error)(f"{where}: {error} {_ANEW}") from error
    return names


@contextmanager
def without_report(config: object) -> Generator[None]:
    """Load a recorded conversion without transformers' advice to ignore its tensors.

    Those that nothing restores are refused by name later (`weights.refuse_incomplete`).
    """
    if getattr(config, CONVERSION, None) is None:
        yield
        return

    with without_messages(_REPORTER, "LOAD REPORT"):
        yield
