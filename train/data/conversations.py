"""Conversations as they are found, and what a model can be taught from them.

    schema = schema_of(record, where)               # turns, question and answer, or plain text
    found = read_record(record, schema, where)      # turns, tools, and fields that are not used
    tidied = tidy(found.turns, special=pattern)     # [system] and questions with their answers

A conversation is tidied to exchanges: every answer that is kept stands directly after the question
that it answers, or after the results of the tools that were called for it. LongChat's trainer
likewise skips a leading answer and turns out of order, but of two questions in a row it keeps the
first, beside the answer to the second; here it is the one that was answered. What is left out is
counted by reason; strict mode refuses it instead.

Source of the practice: github.com/DachengLi1/LongChat, longchat/train/fine_tune/train.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from .turns import (
    ROLES,
    WEIGHTS,
    BadRecordError,
    Role,
    Turn,
    decoded,
    is_missing,
    read_text,
    read_turn,
    refuse_media,
    shown,
    written,
)

__all__ = [
    "FIELDS",
    "REASONS",
    "ROLES",
    "Conversation",
    "Role",
    "Schema",
    "Tidied",
    "Turn",
    "parse",
    "read_record",
    "schema_of",
    "tidy",
]

REASONS = {
    "leading": "an answer before any question",
    "unanswered": "a question without an answer after it",
    "out_of_order": "an answer without a question before it",
    "misplaced_system": "a system turn that is not the first turn",
    "stray_tool": "a tool's result without a call before it and an answer after it",
    "blank": "an empty turn, with the answer or question that belongs to it",
    "special": "a turn that spells one of the tokenizer's special tokens, with its counterpart",
}
"""Why turns are left out."""

# Arguments of `apply_chat_template` that are not the template's own.
_TAKEN = (
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("sanitize_control_tokens", "strftime_now", "raise_exception"),
)
_SYSTEM = ("system", "system_prompt")


@dataclass(frozen=True, slots=True)
class Schema:
    """Where a record keeps what is said; `role` and `text` are empty where it has no turns."""

    field: str
    """The list of turns, the question, or the plain text."""
    role: str = ""
    text: str = ""
    answer: str = ""
    """Of a question and its answer."""

    def __str__(self) -> str:
        if self.answer:
            return f"'{self.field}' and '{self.answer}'"
        return (
            f"'{self.field}' of '{self.role}' and '{self.text}'" if self.role else f"'{self.field}'"
        )


_TURNS = tuple(
    Schema(field, role, text)
    for field, role, text in (
        *((f, r, t) for f in ("conversations", "conversation", "messages")
          for r, t in (("from", "value"), ("role", "content"), ("role", "value"),
                       ("from", "content"), ("role", "text"))),
        ("contents", "role", "parts"),
    )
)  # fmt: skip
_PAIRS = tuple(
    Schema(question, answer=answer)
    for question in ("instruction", "prompt", "query", "question", "input")
    for answer in ("output", "completion", "response", "chosen", "answer")
)
FIELDS = frozenset(
    ["text", *(schema.field for schema in (*_TURNS, *_PAIRS)), *(pair.answer for pair in _PAIRS)]
)
"""All names under which a record keeps what is said."""
_MORE = ("input", "context")  # what an instruction is about


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a record holds."""

    turns: tuple[Turn, ...]
    variables: str = ""
    """JSON of what the chat template is given beside turns: tools, documents, its own settings."""
    unused: tuple[str, ...] = ()
    """Fields of the record that say something and are not used."""


def schema_of(record: Mapping[str, Any], where: str) -> Schema | None:
    """Recognise a record; None where its list of turns is empty, which tells nothing.

    Raises:
        DataError: none of the fields that are known.
    """
    for schema in _TURNS:
        value = decoded(record.get(schema.field))
        if value == []:
            return None
        first: Any = value[0] if isinstance(value, list) else None
        if isinstance(first, Mapping) and {schema.role, schema.text} <= first.keys():
            return schema
        calls = isinstance(first, Mapping) and ("tool_calls" in first or "function_call" in first)
        if calls and schema.text == "content" and schema.role in first:
            return schema
    for schema in _PAIRS:
        if schema.field in record and schema.answer in record:
            return schema
    if "text" in record:
        return Schema("text")
    raise BadRecordError(
        f"{where} has the fields {', '.join(map(shown, record)) or '(none)':.400}: expected "
        "'conversations' of 'from' and 'value' (ShareGPT), 'messages' of 'role' and 'content', "
        "'instruction' and 'output' (Alpaca), 'prompt' and 'completion', or 'text'; rename the "
        "fields.",
        "unknown fields",
    )


def read_record(record: Mapping[str, Any], schema: Schema, where: str) -> Conversation:
    """Read all that a record holds.

    Args:
        record: as decoded from its file.
        schema: what the records before it had.
        where: file and record number, for messages.

    Raises:
        DataError: see `parse`.
    """
    turns = parse(record, schema, where)
    used = {schema.field, schema.answer}
    if turns and turns[0].role == "document":
        return Conversation(turns, unused=_unused(record, used))
    if schema.answer:
        used |= {"history", *(_MORE if schema.field == "instruction" else ())}
    refuse_media(record, where)
    for key in _SYSTEM:
        if not is_missing(record.get(key)) and (not turns or turns[0].role != "system"):
            turns = (Turn("system", read_text(record[key], f"{where}, field '{key}'")), *turns)
            used.add(key)
    turns, weights = _weighted(record, turns, where)
    variables = _variables(record, where)
    used |= weights | {"tools", "functions", "documents", "chat_template_kwargs"}
    text = written(variables, where) if variables else ""
    return Conversation(turns, text, _unused(record, used))


def parse(record: Mapping[str, Any], schema: Schema, where: str) -> tuple[Turn, ...]:
    """Read a record's turns.

    Args:
        record: as decoded from its file.
        schema: what the records before it had.
        where: file and record number, for messages.

    Raises:
        DataError: another schema, an unknown role, a turn that is not a text, an unknown weight.
    """
    if schema.field not in record or (schema.answer and schema.answer not in record):
        found = schema_of(record, where)
        raise BadRecordError(
            f"{where} has {found}, the records before it have {schema}: one file, one schema; "
            "split the file.",
            "another schema",
        )
    value = decoded(record[schema.field]) if schema.role else record[schema.field]
    if schema.answer:
        return _pair(record, schema, where)
    if not schema.role:
        return (Turn("document", read_text(value, f"{where}, field '{schema.field}'")),)
    if not isinstance(value, list):
        raise BadRecordError(
            f"{where}: '{schema.field}' is {shown(value)}, expected a list of turns.",
            "no list of turns",
        )
    return _turns(cast(list[Any], value), schema.role, schema.text, where)


def _turns(items: list[Any], role: str, text: str, where: str) -> tuple[Turn, ...]:
    numbered = enumerate(items, 1)
    return tuple(read_turn(item, role, text, f"{where}, turn {n}") for n, item in numbered)


def _pair(record: Mapping[str, Any], schema: Schema, where: str) -> tuple[Turn, ...]:
    """A question and its answer, each a text or messages; what stands before them is context."""
    question = _said(record, schema.field, "user", where)
    answer = _said(record, schema.answer, "assistant", where)
    if answer[:1] and answer[0].role != "assistant":  # a whole conversation, as `chosen` often is
        return answer
    if schema.field == "instruction":
        more = [read_text(record[key], where) for key in _MORE if not is_missing(record.get(key))]
        if more and len(question) == 1:
            question = (replace(question[0], text="\n".join([question[0].text, *more])),)
    history: Any = record.get("history")
    before: list[Turn] = []
    for entry in [] if is_missing(history) else history if isinstance(history, list) else [history]:
        if not isinstance(entry, list) or len(entry) != 2:
            raise BadRecordError(
                f"{where}, 'history' holds {shown(entry)}: expected pairs of question and answer.",
                "'history' that is not of pairs",
            )
        at = f"{where}, 'history'"
        before += [
            Turn("user", read_text(entry[0], at)),
            Turn("assistant", read_text(entry[1], at)),
        ]
    context = tuple(replace(turn, learnt=False) for turn in question)
    return (*before, *context, *answer)


def _said(record: Mapping[str, Any], key: str, role: Role, where: str) -> tuple[Turn, ...]:
    value = record[key]
    first: Any = value[0] if isinstance(value, list) and value else value
    if isinstance(first, Mapping) and "role" in first:
        return _turns(value if isinstance(value, list) else [value], "role", "content", where)
    return (Turn(role, read_text(value, f"{where}, field '{key}'")),)


def _weighted(
    record: Mapping[str, Any], turns: tuple[Turn, ...], where: str
) -> tuple[tuple[Turn, ...], set[str]]:
    """Turns under the weight of their record, and the fields that said it."""
    mask: Any = record.get("mask")
    if not is_missing(mask) and ROLES.get(str(mask).lower()) not in ("user", "system", "tool"):
        raise BadRecordError(
            f"{where} has 'mask' of {shown(mask)}, which is not read: mark answers with 'weight' "
            "(0 or 1) in their turn, or remove the field.",
            "'mask'",
        )
    said = {key for key in WEIGHTS if isinstance(record.get(key), int | float)}
    said = {key for key in said if record[key] in (0, 1)}
    if any(not record[key] for key in said):
        turns = tuple(replace(turn, learnt=False) for turn in turns)
    return turns, said | {"mask"}


def _variables(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a record gives to the chat template as a whole."""
    found: dict[str, Any] = {}
    functions = decoded(record.get("functions"))
    if isinstance(functions, list) and functions:
        found["tools"] = [{"type": "function", "function": each} for each in functions]
    for key in ("tools", "documents"):
        value = decoded(record.get(key))
        if is_missing(value):
            continue
        if not isinstance(value, list) or any(not isinstance(each, Mapping) for each in value):
            raise BadRecordError(
                f"{where} has '{key}' of {shown(value)}: expected a list of objects.",
                f"'{key}' that are not a list of objects",
            )
        found[key] = value
    own = decoded(record.get("chat_template_kwargs"))
    if not is_missing(own):
        if not isinstance(own, Mapping) or any(key in _TAKEN or key in found for key in own):
            raise BadRecordError(
                f"{where} has 'chat_template_kwargs' of {shown(own)}: expected an object of "
                "settings that the chat template has itself, such as enable_thinking.",
                "unknown 'chat_template_kwargs'",
            )
        found |= own
    return found


def _unused(record: Mapping[str, Any], used: set[str]) -> tuple[str, ...]:
    return tuple(
        str(key) for key, value in record.items() if key not in used and not is_missing(value)
    )


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
        if role == "system":
            fault = "misplaced_system" if index else _fault(turns[:1], special)
            yield (index,), fault
        elif role == "assistant":
            yield (index,), "out_of_order" if asked else "leading"
        elif role == "tool":
            yield (index,), "stray_tool"
        else:
            end = _answered(turns, index)
            fault = _fault(turns[index:end], special) if end > index + 1 else "unanswered"
            yield tuple(range(index, end)), fault
            index = end - 1
        asked |= role == "user"
        index += 1


def _answered(turns: Sequence[Turn], question: int) -> int:
    """The index after the last answer to a question: tools may be called on the way to it."""
    end = at = question + 1
    while at < len(turns) and turns[at].role == "assistant":
        end = at = at + 1
        while at < len(turns) and turns[at].role == "tool":
            at += 1
        if at == end:
            break
    return end


def _fault(turns: Sequence[Turn], special: re.Pattern[str] | None) -> str:
    if any(_blank(turn) for turn in turns):
        return "blank"
    if special and any(special.search(turn.text) or special.search(turn.fields) for turn in turns):
        return "special"
    return ""


def _blank(turn: Turn) -> bool:
    """Whether a turn says nothing: a call does, and a tool's result may be empty."""
    if turn.text and not turn.text.isspace():
        return False
    return turn.role != "tool" and "tool_calls" not in turn.extra
