"""Records out of JSON that holds all of them in one object.

{"data": [{"messages": …}, …]}                     a list under any name, or one for each split
{"instruction": ["a", "b"], "output": ["c", "d"]}  a list for each field
{"text": {"0": "a", "1": "b"}}                     the same, as pandas writes it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from longctx.errors import DataError

from .conversations import FIELDS, schema_of
from .turns import BadRecordError, shown

__all__ = ["unwrapped"]


def unwrapped(record: Any, split: str, where: str, note: Callable[[str], None]) -> Iterator[Any]:
    """Yield the records that an object holds; itself, if it is one.

    Args:
        record: as decoded; anything.
        split: which of several lists to take.
        where: the file, for messages.
        note: is told of what the object holds beside its records.

    Raises:
        DataError: several lists and none of the split's name, columns of unequal length.
    """
    if not isinstance(record, dict):
        yield record
        return
    found = cast(dict[str, Any], record)
    columns = {
        key: column for key, value in found.items() if (column := _column(value)) is not None
    }
    if FIELDS & columns.keys() and not any(_is_said(found[key]) for key in FIELDS & found.keys()):
        yield from _rows(found, columns, where, note)
        return
    if _is_record(found):
        yield record
        return
    lists = {
        key: cast(list[Any], value)
        for key, value in found.items()
        if isinstance(value, list) and value and _is_record(value[0])
    }
    if not lists:
        yield record
        return
    if len(lists) > 1 and split not in lists:
        raise DataError(
            f"{where} has no list {split!r}, and has {', '.join(map(shown, lists))}: pass one of "
            "them as split (--split)."
        )
    name = split if split in lists else next(iter(lists))
    _tell(note, (key for key in found if key not in lists))
    yield from lists[name]


def _is_record(value: Any) -> bool:
    try:
        return isinstance(value, dict) and schema_of(cast(dict[str, Any], value), "") is not None
    except BadRecordError:
        return False


def _is_said(value: Any) -> bool:
    """Whether a field holds what one record says: a text, or messages."""
    first: Any = value[0] if isinstance(value, list) and value else value
    return (isinstance(first, Mapping) and _column(value) is None) or isinstance(value, str)


def _column(value: Any) -> list[Any] | None:
    """The values of a field in all records; None where it is of one record."""
    if isinstance(value, Mapping) and value and all(str(key).isdecimal() for key in value):
        value = list(cast(Mapping[Any, Any], value).values())
    whole = isinstance(value, list) and bool(value)
    if whole and all(each is None or isinstance(each, str | list) for each in value):
        return cast(list[Any], value)
    return None


def _rows(
    record: dict[str, Any],
    columns: dict[str, list[Any]],
    where: str,
    note: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    count = len(next(columns[key] for key in columns if key in FIELDS))
    columns = columns | {
        key: cast(list[Any], value)
        for key, value in record.items()
        if isinstance(value, list) and len(value) == count
    }
    short = {key: len(column) for key, column in columns.items() if len(column) != count}
    if short:
        raise DataError(
            f"{where} has columns of unequal length ({count:,} values, and {short}): expected one "
            "value of each field for each record."
        )
    _tell(note, (key for key in record if key not in columns))
    for index in range(count):
        yield {key: column[index] for key, column in columns.items()}


def _tell(note: Callable[[str], None], names: Iterator[str]) -> None:
    if left := ", ".join(map(shown, names)):
        note(f"fields of the file that are not used: {left}")
