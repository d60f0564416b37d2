"""One turn of a conversation, as data sets spell it: role, text, weight, fields for the template.

    turn = read_turn({"role": "model", "content": "Hi", "weight": 0}, "role", "content", "record 1")
    turn.role, turn.text, turn.learnt                        # "assistant", "Hi", False

Roles are those that chat templates know. What a turn holds beside role, text and weight (`name`,
`tool_calls`, `reasoning_content`, …) goes to the template as it is.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from longctx.errors import DataError, nearest

__all__ = [
    "ROLES",
    "WEIGHTS",
    "BadRecordError",
    "Role",
    "Turn",
    "decoded",
    "is_missing",
    "read_text",
    "read_turn",
    "refuse_media",
    "shown",
    "weighted",
    "written",
]

Role = Literal["user", "assistant", "system", "tool", "document"]

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "observation": "tool",
}
"""How data sets spell the roles, and what chat templates call them."""

WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale")
"""Fields that say whether a turn is learnt: OpenAI's, axolotl's, ms-swift's and their kin."""
_PARTIAL = ("train_detail", "training_detail", "mask", "loss_mask")
_DEEPEST = 100
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60
_CALLS = ("function_call", "tool_call")  # roles whose text is a call
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class BadRecordError(DataError):
    """A record that cannot be used; `reason` is the same for all records of its kind."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # it comes back from other processes
        return type(self), (self.args[0], self.reason)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. The role "document" marks plain text, which has no sides."""

    role: Role
    text: str
    learnt: bool = True
    """For answers: False marks one that is context only (weight 0)."""
    fields: str = ""
    """JSON of what else the chat template is given with this turn; empty for nothing."""

    @property
    def message(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.text} | self.extra

    @property
    def extra(self) -> dict[str, Any]:
        """What `fields` holds."""
        return cast(dict[str, Any], json.loads(self.fields)) if self.fields else {}


def read_turn(item: object, role_key: str, text_key: str, where: str) -> Turn:
    """Read a turn.

    Args:
        item: as decoded from its file.
        role_key: where it keeps its role.
        text_key: where it keeps its text.
        where: file, record and turn, for messages.

    Raises:
        BadRecordError: another schema, an unknown role, no text, a weight that is
            neither 0 nor 1, a mask.
    """
    rest = dict(item) if isinstance(item, Mapping) else {}
    name = rest.get(role_key)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role and len(rest) == 2 and text_key in rest and name not in _CALLS:
        return Turn(role, read_text(rest[text_key], where))  # nothing else to look at
    calls = any(not is_missing(rest.get(key)) for key in ("tool_calls", "function_call"))
    if role_key not in rest or (text_key not in rest and not calls):
        raise BadRecordError(
            f"{where} is {shown(item)}, the turns before it have '{role_key}' and '{text_key}': "
            "one file, one schema.",
            "turns of another schema",
        )
    name = rest.pop(role_key)
    role = ROLES.get(str(name).lower())
    if role is None:
        raise BadRecordError(
            f"{where} has the role {shown(name)}, known are {', '.join(ROLES)}"
            f"{nearest(str(name).lower(), ROLES)}. Rename it, or leave such turns out.",
            "an unknown role",
        )
    content = rest.pop(text_key, None)
    text = "" if calls and is_missing(content) else read_text(content, where)
    if str(name).lower() in _CALLS and (found := _called(text)):
        rest["tool_calls"], text = found, ""
    learnt = _learnt(rest, role, where)
    if not is_missing(old := rest.pop("function_call", None)):
        rest.setdefault("tool_calls", [{"type": "function", "function": old}])
    if not is_missing(rest.get("tool_calls")):
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], where)
    refuse_media(rest, where)
    rest = {key: value for key, value in rest.items() if not is_missing(value)}
    return Turn(role, text, learnt, written(rest, where) if rest else "")


def refuse_media(fields: Mapping[str, Any], where: str) -> None:
    """Refuse pictures, sound and video: only text is learnt."""
    for key in _MEDIA:
        if not is_missing(fields.get(key)):
            raise BadRecordError(
                f"{where} has '{key}', and only text is learnt: leave the record out.",
                f"with '{key}'",
            )


def shown(value: object) -> str:
    """The beginning of a value for a message, however long or deep it is."""
    return f"{_SHORT.repr(value):.60}"


def is_missing(value: object) -> bool:
    """Whether a field says nothing: null, empty, or the NaN that pandas writes for null."""
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, list | dict | str) and not value)


def read_text(value: object, where: str) -> str:
    """A text, or the texts of content parts one after the other.

    Raises:
        BadRecordError: no text, a part that is not text, half a surrogate pair.
    """
    if isinstance(value, list) and value:
        return "".join(_part(part, where) for part in cast(list[Any], value))
    if isinstance(value, Mapping) and "text" in value:
        return _part(value, where)
    if not isinstance(value, str):
        raise BadRecordError(
            f"{where} is {shown(value)}, expected text. Leave the record out.", "not a text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"{where} holds half a surrogate pair, {value[error.start]!r}, at character "
            f"{error.start}: no tokenizer takes it. Leave the record out, or mend its text.",
            "half a surrogate pair",
        ) from error
    return value


def _part(part: object, where: str) -> str:
    fields = dict(part) if isinstance(part, Mapping) else {}
    kind = fields.get("type", "text")
    if not isinstance(fields.get("text"), str) or kind not in ("text", "input_text", "output_text"):
        raise BadRecordError(
            f"{where} has a content part of type {shown(kind)}, and only text is learnt: leave the "
            "record out.",
            "a content part that is not text",
        )
    return read_text(fields["text"], where)


def weighted(value: object, key: str, where: str) -> bool:
    """What a weight says: whether the answer is learnt.

    Raises:
        BadRecordError: neither 0 nor 1.
    """
    if isinstance(value, int | float) and value in (0, 1):  # True and False too
        return bool(value)
    raise BadRecordError(
        f"{where} has {key!r} of {shown(value)}: expected 0 or 1 (false or true), which leaves an "
        "answer out of what is learnt or keeps it. Round it, or remove the field.",
        f"'{key}' that is neither 0 nor 1",
    )


def _learnt(rest: dict[str, Any], role: Role, where: str) -> bool:
    """Take the weights of a turn out of its fields."""
    for key in _PARTIAL:
        if not is_missing(rest.get(key)):
            raise BadRecordError(
                f"{where} has {key!r}, which marks parts of a turn in a way that is not read: "
                "mark whole answers with 'weight' (0 or 1), or remove the field.",
                f"'{key}'",
            )
    given = {key: rest[key] for key in WEIGHTS if rest.get(key) is not None}
    said = [weighted(value, key, where) for key, value in given.items()]  # all are checked
    learnt = all(said)
    for key in WEIGHTS:
        if role == "assistant" or not (key in given and learnt):
            rest.pop(key, None)  # a question that is to be learnt is told of, since it is not
    return learnt


def _called(text: str) -> list[Any] | None:
    """The calls in the text of a ShareGPT turn "function_call"; None where it is not JSON."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = cast(list[Any], found if isinstance(found, list) else [found])
    if not calls or any(not isinstance(call, Mapping) or "name" not in call for call in calls):
        return None
    return [{"type": "function", "function": call} for call in calls]


def _tool_calls(value: object, where: str) -> list[Any]:
    """Calls as templates take them: a list of dicts, with the arguments decoded."""
    calls = decoded(value)
    if not isinstance(calls, list) or any(not isinstance(call, Mapping) for call in calls):
        raise BadRecordError(
            f"{where} has 'tool_calls' of {shown(value)}: expected a list of calls.",
            "'tool_calls' that are not a list of calls",
        )
    made: list[Any] = []
    for call in cast(list[Any], calls):
        inner = call.get("function", call)
        if isinstance(inner, Mapping) and isinstance(inner.get("arguments"), str):
            inner = {**inner, "arguments": decoded(inner["arguments"])}
            call = {**call, "function": inner} if "function" in call else inner
        made.append(call)
    return made


def decoded(value: object) -> object:
    """JSON that was kept as a text, decoded; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def written(value: object, where: str) -> str:
    """What goes to a template, as JSON.

    Raises:
        BadRecordError: what JSON or a tokenizer cannot take.
    """
    if _is_deep(value):
        raise BadRecordError(
            f"{where} has fields nested more than {_DEEPEST} deep: remove them.", "deep fields"
        )
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
        text.encode()
    except (ValueError, TypeError) as error:
        raise BadRecordError(
            f"{where} has fields that cannot be written as JSON text ({error}): remove them.",
            "fields that JSON cannot hold",
        ) from error
    return text


def _is_deep(value: object) -> bool:
    """Whether a value is nested deeper than templates and JSON can follow in any call."""
    level = [value]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, Mapping):
                inner += cast(Mapping[Any, Any], each).values()
            elif isinstance(each, list):
                inner += cast(list[Any], each)
        level = inner
    return bool(level)
