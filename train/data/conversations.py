"""Conversations as they are found, and what a model can be taught from them.

    schema = schema_of(record, where)               # ShareGPT, messages or plain text
    turns = parse(record, schema, where)            # roles as "user", "assistant", "system"
    tidied = tidy(turns, special=("<|im_end|>",))   # [system] and questions with their answers

A conversation is tidied to exchanges: every answer that is kept stands directly after the question
that it answers. LongChat's trainer likewise skips a leading answer and turns out of order, but of
two questions in a row it keeps the first, beside the answer to the second; here it is the one that
was answered. What is left out is counted by reason; strict mode refuses it instead.

Source of the practice: github.com/DachengLi1/LongChat, longchat/train/fine_tune/train.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from longctx.errors import DataError, nearest

__all__ = ["REASONS", "ROLES", "Role", "Schema", "Tidied", "Turn", "parse", "schema_of", "tidy"]

Role = Literal["user", "assistant", "system", "document"]

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
"""How data sets spell the roles, and what chat templates call them."""

REASONS = {
    "leading": "an answer before any question",
    "unanswered": "a question without an answer after it",
    "out_of_order": "an answer without a question before it",
    "misplaced_system": "a system turn that is not the first turn",
    "blank": "an empty turn, with the answer or question that belongs to it",
    "special": "a turn that spells one of the tokenizer's special tokens, with its counterpart",
}
"""Why turns are left out."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. The role "document" marks plain text, which has no sides."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Schema:
    """Where a record keeps its turns; `role` and `text` are empty for plain text."""

    field: str
    role: str = ""
    text: str = ""

    def __str__(self) -> str:
        if not self.role:
            return f"'{self.field}'"
        return f"'{self.field}' of '{self.role}' and '{self.text}'"


_SCHEMAS = (
    Schema("conversations", "from", "value"),
    Schema("conversations", "role", "content"),
    Schema("conversation", "from", "value"),
    Schema("conversation", "role", "content"),
    Schema("messages", "role", "content"),
    Schema("messages", "from", "value"),
    Schema("text"),
)


def schema_of(record: Mapping[str, Any], where: str) -> Schema | None:
    """Recognise a record; None where its list of turns is empty, which tells nothing.

    Raises:
        DataError: none of the fields that are known.
    """
    for schema in _SCHEMAS:
        if schema.field not in record:
            continue
        value = record[schema.field]
        if not schema.role or value == []:
            return schema if not schema.role else None
        first = value[0] if isinstance(value, list) else None
        if isinstance(first, Mapping) and {schema.role, schema.text} <= first.keys():
            return schema
    raise DataError(
        f"{where} has the fields {', '.join(map(repr, record)) or '(none)'}: expected "
        "'conversations' of 'from' and 'value' (ShareGPT), 'messages' of 'role' and 'content', or "
        "'text'; rename the fields."
    )


def parse(record: Mapping[str, Any], schema: Schema, where: str) -> tuple[Turn, ...]:
    """Read a record's turns.

    Args:
        record: as decoded from its file.
        schema: what the records before it had.
        where: file and record number, for messages.

    Raises:
        DataError: another schema, an unknown role, or a turn that is not a text.
    """
    if schema.field not in record:
        found = schema_of(record, where)
        raise DataError(
            f"{where} has {found}, the records before it have {schema}: one file, one schema; "
            "split the file."
        )
    value = record[schema.field]
    if not schema.role:
        return (Turn("document", _text(value, f"{where}, field '{schema.field}'")),)
    if not isinstance(value, list):
        raise DataError(f"{where}: '{schema.field}' is {value!r:.40}, expected a list of turns.")
    turns: list[Turn] = []
    for number, item in enumerate(cast(list[Any], value), 1):
        at = f"{where}, turn {number}"
        if not isinstance(item, Mapping) or not {schema.role, schema.text} <= item.keys():
            raise DataError(
                f"{at} is {item!r:.60}, the turns before it have '{schema.role}' and "
                f"'{schema.text}': one file, one schema."
            )
        turns.append(Turn(_role(item[schema.role], at), _text(item[schema.text], at)))
    return tuple(turns)


def _role(name: object, where: str) -> Role:
    role = ROLES.get(str(name).lower())
    if role is None:
        raise DataError(
            f"{where} has the role {name!r}, known are {', '.join(ROLES)}"
            f"{nearest(str(name).lower(), ROLES)}. Rename it, or leave such turns out."
        )
    return role


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {value!r:.60}, expected text. Leave the record out.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair, {value[error.start]!r}, at character "
            f"{error.start}: no tokenizer takes it. Leave the record out, or mend its text."
        ) from error
    return value


@dataclass(frozen=True, slots=True)
class Tidied:
    """A conversation reduced to what can be taught."""

    turns: tuple[Turn, ...]
    """An optional system turn, then questions and answers in turn; empty if nothing is left."""
    left_out: tuple[tuple[str, int], ...]
    """A reason out of `REASONS` and the turn's index, for each turn that is not kept."""


def tidy(turns: Sequence[Turn], *, special: re.Pattern[str] | None = None) -> Tidied:
    """Reduce turns to an optional system turn and questions directly followed by their answer.

    Args:
        turns: of a conversation, in any order.
        special: matches text that the tokenizer would take for its control tokens: such a turn
            could end itself or forge another, so it is left out together with its counterpart.
    """
    kept: list[Turn] = []
    left_out: list[tuple[str, int]] = []
    for indices, reason in _groups(turns, special):
        if reason:
            left_out += [(reason, index) for index in indices]
        else:
            kept += [turns[index] for index in indices]
    if not any(turn.role == "assistant" for turn in kept):
        kept = []
    return Tidied(tuple(kept), tuple(left_out))


def _groups(
    turns: Sequence[Turn], special: re.Pattern[str] | None
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Indices that belong together, with the reason to leave them out ("" to keep them)."""
    asked, index = False, 0
    while index < len(turns):
        role = turns[index].role
        follower = turns[index + 1].role if index + 1 < len(turns) else None
        if role == "system":
            fault = "misplaced_system" if index else _fault(turns[:1], special)
            yield (index,), fault
        elif role == "assistant":
            yield (index,), "out_of_order" if asked else "leading"
        elif follower != "assistant":
            yield (index,), "unanswered"
        else:
            yield (index, index + 1), _fault(turns[index : index + 2], special)
            index += 1
        asked |= role == "user"
        index += 1


def _fault(turns: Sequence[Turn], special: re.Pattern[str] | None) -> str:
    if any(not turn.text or turn.text.isspace() for turn in turns):
        return "blank"
    if special and any(special.search(turn.text) for turn in turns):
        return "special"
    return ""
