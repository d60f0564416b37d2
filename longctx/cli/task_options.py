"""Options of `longctx sweep` that come from the fields of the tasks.

Fields of several tasks with one name are one option. A field whose type or default cannot be
written on a command line is none.
"""

from __future__ import annotations

import ast
import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from tyro.conf import arg

from ..catalogue import Field, entries

__all__ = ["given_options", "task_options", "tasks_with"]

_TYPES: Mapping[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


def task_options(*commands: type[Any]) -> type[Any]:
    """A dataclass of the options for tasks, without names that the command has itself."""
    own = {field.name for command in commands for field in dataclasses.fields(command)}
    options = [
        (name, *_option(fields))
        for name, fields in _fields_by_name().items()
        if name not in own and all(_writable(field) for field in fields.values())
    ]
    return dataclasses.make_dataclass(
        "TaskOptions", [(name, kind, dataclasses.field(default=d)) for name, kind, d in options]
    )


def given_options(options: Any) -> dict[str, Any]:
    """The options that are not at their defaults."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {
        field.name: values[field.name]
        for field in dataclasses.fields(options)
        if values[field.name] != field.default
    }


def tasks_with(option: str) -> tuple[str, ...]:
    """The names of the tasks that have such a field."""
    return tuple(_fields_by_name().get(option, ()))


def _fields_by_name() -> dict[str, dict[str, Field]]:
    """The fields of that name by task."""
    found: dict[str, dict[str, Field]] = defaultdict(dict)
    for entry in entries("longctx.eval.tasks", "TASK"):
        for field in entry.fields:
            found[field.name][entry.name] = field
    return dict(found)


def _writable(field: Field) -> bool:
    return field.literal and _type_of(field.annotation) is not None


def _option(fields: Mapping[str, Field]) -> tuple[Any, Any]:
    """The type and the default of an option, with its help.

    Where tasks differ, None stands for the default of each.
    """
    kinds = {field.annotation: _type_of(field.annotation) for field in fields.values()}
    tasks_by_default = _grouped({task: field.default or "" for task, field in fields.items()})
    one = len(kinds) == len(tasks_by_default) == 1
    default = ast.literal_eval(next(iter(tasks_by_default))) if one else None
    kind = Union[tuple(kinds.values()) if one else (*kinds.values(), None)]  # noqa: UP007
    tasks_by_doc = _grouped({task: field.doc for task, field in fields.items()})
    text = " ".join(f"{', '.join(tasks)}: {doc}" for doc, tasks in tasks_by_doc.items())
    if one:
        return Annotated[kind, arg(help=text)], default
    each = "; ".join(f"{value} for {', '.join(tasks)}" for value, tasks in tasks_by_default.items())
    return Annotated[kind, arg(help=text, help_behavior_hint=f"(default: {each})")], default


def _grouped(values: Mapping[str, str]) -> dict[str, list[str]]:
    """The tasks that have each value."""
    found: dict[str, list[str]] = defaultdict(list)
    for task, value in values.items():
        found[value].append(task)
    return dict(found)


def _type_of(annotation: str) -> Any:
    """The type that an annotation names, None if a command line cannot write its values."""
    return _type_at(ast.parse(annotation, mode="eval").body)


def _type_at(node: ast.expr) -> Any:
    match node:
        case ast.Name(name):
            return _TYPES.get(name)
        case ast.BinOp(left, ast.BitOr(), ast.Constant(None)):
            kind = _type_at(left)
            return None if kind is None else kind | None
        case ast.Subscript(ast.Name("Literal"), ast.Tuple(words)):
            return Literal[tuple(ast.literal_eval(word) for word in words)]
        case ast.Subscript(ast.Name("tuple"), ast.Tuple([inner, ast.Constant()])):
            kind = _type_at(inner)
            return None if kind is None else tuple[kind, ...]
        case _:
            return None
