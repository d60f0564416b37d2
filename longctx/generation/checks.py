"""Refusing settings of a wrong type or range, in one form of words."""

from __future__ import annotations

import math
from typing import Any

from ..errors import DataError, RunError

__all__ = ["LARGEST", "check_flag", "check_number", "check_text", "check_whole"]

LARGEST = 1 << 31
"""Of tokens, copies and candidates: far beyond any use, and within what tensors count by."""


def check_number(
    owner: str, field: str, value: Any, *, least: float, most: float = math.inf, above: bool = False
) -> None:
    """Refuse what is not a finite number from `least` (or above it) to `most`.

    Raises:
        RunError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = number and math.isfinite(value) and least <= value <= most
    if not fits or (above and value == least):
        bound = f"above {least:g}" if above else f"from {least:g}"
        upper = f" to {most:g}" if math.isfinite(most) else ""
        raise RunError(f"{owner}: {field}={value!r}: expected a number {bound}{upper}.")


def check_whole(owner: str, field: str, value: Any, *, least: int, most: int = LARGEST) -> None:
    """Refuse what is not a whole number from `least` to `most`.

    Raises:
        RunError: it is not.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or value > most:
        bound = f"{least} or more" if most == LARGEST else f"from {least} to {most:,}"
        bound += f", and at most {most:,}" if whole and value > most == LARGEST else ""
        raise RunError(f"{owner}: {field}={value!r}: expected a whole number, {bound}.")


def check_text(name: str, value: Any) -> str:
    """The value, which a tokenizer can read.

    Raises:
        DataError: it is not text, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} is of type {type(value).__name__}: expected text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} holds half a surrogate pair, {value[error.start]!r}, at character "
            f"{error.start}: it is not text. Write the whole pair, or leave it out."
        ) from error
    return value


def check_flag(owner: str, field: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        RunError: it is neither.
    """
    if not isinstance(value, bool):
        raise RunError(f"{owner}: {field}={value!r}: expected True or False.")
