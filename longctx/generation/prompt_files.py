"""Prompts from a file: a line of text each, or JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import read_text
from .requests import is_prompt

__all__ = ["read_prompts"]

_KEYS = ("prompt", "messages", "input_ids")
_EXPECTED = (
    'a text, a list of messages, token ids, or an object with one of "prompt", "messages", '
    '"input_ids"'
)


def read_prompts(path: Path) -> list[Any]:
    """The prompts of a file.

    Args:
        path: `.jsonl`, whose lines are each a text, a list of messages, token ids, or an object
            that holds one of these as "prompt", "messages" or "input_ids"; any other name is taken
            as plain text. Empty lines are passed over.

    Raises:
        DataError: it is not a file, cannot be read, is not UTF-8, or holds another line or none.
    """
    lines = read_text(path, "prompts (.txt or .jsonl)").split("\n")
    numbered = [(i, line.rstrip("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path} holds no prompts: expected one a line.")
    if path.suffix.lower() != ".jsonl":
        return [line for _, line in numbered]
    return [_value(line, f"{path}:{number}") for number, line in numbered]


def _value(line: str, where: str) -> Any:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): expected {_EXPECTED}.") from error
    if isinstance(value, dict):
        held = [key for key in _KEYS if key in value]
        if len(held) != 1:
            raise DataError(f"{where} holds {len(held)} prompts: expected {_EXPECTED}.")
        value = value[held[0]]
    if not value or not is_prompt(value):
        raise DataError(f"{where} is {line!r:.60}: expected {_EXPECTED}.")
    return value
