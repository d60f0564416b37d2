"""Lengths as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from longctx.errors import RunError

__all__ = ["parse_length", "parse_lengths"]

_NUMBER = re.compile(r"(\d+)\s*([kK]?)")
_SHORTEST = 8  # nothing can be measured below
_LONGEST = 2**24  # beyond every model's window; a prompt of that many still fits into memory


def parse_lengths(lengths: int | str | Iterable[int | str]) -> tuple[int, ...]:
    """Read lengths in tokens, ascending and without repetition.

    >>> parse_lengths("256:4096")
    (256, 512, 1024, 2048, 4096)
    >>> parse_lengths("4k,8k,12k")
    (4096, 8192, 12288)
    >>> parse_lengths(["1k", 1500, "2k:8k"])
    (1024, 1500, 2048, 4096, 8192)
    >>> parse_lengths(512)
    (512,)

    `FROM:TO` doubles from FROM and always includes TO; `k` is 1,024 tokens.

    Raises:
        RunError: something that is not a length, a range that does not ascend, or a length under 8.
    """
    if isinstance(lengths, int):
        lengths = [lengths]
    items = lengths.split(",") if isinstance(lengths, str) else list(lengths)
    found: set[int] = set()
    for item in items:
        found.update(_parse_item(item))
    if not found:
        raise RunError(f"lengths={lengths!r} names no length: pass e.g. '256:4096' or '4k,8k,12k'.")
    return tuple(sorted(found))


def parse_length(text: str, option: str) -> int:
    """Read one length, of an option of the command.

    Raises:
        RunError: it is none, or several.
    """
    lengths = parse_lengths(text)
    if len(lengths) != 1:
        raise RunError(f"{option} {text}: expected one length, such as 32k.")
    return lengths[0]


def _parse_item(item: int | str) -> list[int]:
    if isinstance(item, str) and "," in item:
        return [length for part in item.split(",") for length in _parse_item(part)]
    first, colon, last = str(item).partition(":")
    start = _parse_number(first, item)
    if not colon:
        return [start]
    end = _parse_number(last, item)
    if end < start:
        raise RunError(f"length range {item!r} goes down: expected FROM:TO with FROM below TO.")
    doublings: list[int] = []
    while start < end:
        doublings.append(start)
        start *= 2
    return [*doublings, end]


def _parse_number(text: str, item: int | str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise RunError(
            f"{item!r} is not a length: expected tokens such as 4096 or 4k, a list '4k,8k,12k' or "
            "doublings '256:4096'."
        )
    length = int(match[1][:20]) * (1024 if match[2] else 1)
    if length > _LONGEST:
        raise RunError(f"a length of {match[0]} tokens is beyond reason: expected ≤ {_LONGEST:,}.")
    if length < _SHORTEST:
        raise RunError(f"a length of {length} tokens is too short: expected at least {_SHORTEST}.")
    return length
