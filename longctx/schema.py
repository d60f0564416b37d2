"""Data that comes from disk, checked against types before anything reads it.

Types are msgspec's Structs (or dataclasses), with limits where a figure has some. Every refusal
reads alike: "FILE: KEY: what was expected and what is there. The next step."
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn, TypeVar

import msgspec

from .errors import LongctxError, RunError

__all__ = ["conform", "parse"]

T = TypeVar("T")
_SAID = {
    r"Object missing required field (.*)": r"expected a field \1, which is missing",
    r"Object contains unknown field (.*)": r"expected no field \1",
    r"Invalid enum value (.*)": r"expected another value than \1",
}
"""What msgspec says otherwise than "expected …"."""
_PLACED = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<key>.*)`)?", re.DOTALL)


def parse(
    text: str | bytes,
    kind: type[T],
    where: object,
    *,
    next_step: str,
    error: type[LongctxError] = RunError,
) -> T:
    """Read JSON of a type.

    Args:
        text: the JSON.
        kind: a Struct, a dataclass, or what `msgspec.convert` takes else.
        where: the file, and the line if there are several.
        next_step: what the user can do about a damaged one, a sentence.
        error: to raise.

    Raises:
        LongctxError: (`error`) no JSON, or of another type.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()  # json would guess an encoding
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as fault:
        raise error(f"{where}: expected JSON, but {_sentence(str(fault))} {next_step}") from fault
    return conform(value, kind, where, next_step=next_step, error=error)


def conform(
    value: Any,
    kind: type[T],
    where: object,
    *,
    next_step: str,
    error: type[LongctxError] = RunError,
) -> T:
    """The same for what JSON gave already; see `parse`."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as fault:
        raise error(f"{where}: {_placed(str(fault))} {next_step}") from fault


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _placed(message: str) -> str:
    """The message of msgspec with the key in front: "rows[0].n: expected int, got str."."""
    found = _PLACED.fullmatch(message)
    assert found is not None, "every message matches"
    what = found["what"].replace("`", "")
    for said, better in _SAID.items():
        what = re.sub(said, better, what)
    what = _sentence(what[0].lower() + what[1:])
    return f"{found['key']}: {what}" if found["key"] else what


def _sentence(text: str) -> str:
    return text.rstrip(".") + "."
