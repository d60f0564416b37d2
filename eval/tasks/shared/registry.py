"""Finding a task by its name: the public files of `eval/tasks/`, each of which defines `TASK`."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

from longctx.catalogue import public_files
from longctx.errors import RunError, nearest
from longctx.registry import named_class, parse_fields

from .protocol import Task

__all__ = ["available_tasks", "make_task", "parse_task", "task_class"]


def available_tasks() -> tuple[str, ...]:
    """Names of the tasks that ship with longctx: the public files of `eval/tasks/`."""
    return public_files("longctx.eval.tasks")


def task_class(name: str) -> type[Any]:
    """The dataclass of the task called `name`.

    Raises:
        RunError: no such task; the message suggests the nearest.
    """
    known = available_tasks()
    if name not in known:
        raise RunError(f"unknown task {name!r}{nearest(name, known)} (tasks: {', '.join(known)})")
    return named_class(f"longctx.eval.tasks.{name}", "TASK", RunError)


def make_task(name: str, fields: dict[str, Any]) -> Task:
    """Build the task `name` from its fields, refusing those that do not fit.

    A single value of a field that takes several may stand alone.

    Raises:
        RunError: no such task or field, or a value of another type.
    """
    cls = task_class(name)
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, value in fields.items():
        if key not in known:
            raise RunError(
                f"{name} has no field {key!r}{nearest(key, known)} (fields: {', '.join(known)})"
            )
        values[key] = value
        if get_origin(hints[key]) is tuple and not isinstance(value, tuple):
            values[key] = (value,)
        if not _fits(values[key], hints[key]):
            wanted = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key])
            raise RunError(f"{name}: {key}={value!r}: expected {wanted.replace('typing.', '')}.")
    return cls(**values)


def parse_task(text: str) -> Task:
    """Read a task as the command line writes it.

    >>> parse_task("passkey:samples=5").samples
    5

    Raises:
        RunError: unknown task or field, a value of another type, or an item that is not
            `field=value`.
    """
    name, fields = parse_fields(text, example="needle:samples=5", error=RunError)
    return make_task(name, fields)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (int, str, bool) else isinstance(value, hint)
