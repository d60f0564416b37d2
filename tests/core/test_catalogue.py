"""The catalogue says of methods and tasks what their classes do, without importing them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from typing import Any

import pytest

import longctx
from longctx.catalogue import Entry, entries, first_sentence
from longctx.eval import parse_task
from longctx.registry import parse_conversion, parse_method

from ..families import build

METHODS = entries("longctx.patches", "METHOD")
TASKS = entries("longctx.eval.tasks", "TASK")
CLASSES = {
    **dict.fromkeys(METHODS, ("longctx.patches", "METHOD")),
    **dict.fromkeys(TASKS, ("longctx.eval.tasks", "TASK")),
}


@pytest.mark.parametrize("entry", CLASSES, ids=lambda entry: entry.name)
def test_fields_are_those_of_the_class(entry: Entry) -> None:
    package, constant = CLASSES[entry]
    module = importlib.import_module(f"{package}.{entry.name}")
    cls: Any = getattr(module, constant)
    assert cls.name == entry.name
    assert entry.text == str(module.__doc__).strip()
    found = {field.name: field for field in dataclasses.fields(cls)}
    assert [field.name for field in entry.fields] == list(found)
    for field in entry.fields:
        assert field.doc, f"{entry.name}: {field.name} has no docstring"
        if field.literal:
            assert ast.literal_eval(str(field.default)) == found[field.name].default


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_the_example_of_a_method_is_one(entry: Entry) -> None:
    example = entry.example()
    parse = parse_conversion if entry.converts else parse_method
    method = parse(example.replace("…", "()"))
    assert method is not None
    assert method.name == entry.name
    if not entry.converts and "…" not in example:
        assert longctx.extend(build("llama"), example).report().ok


@pytest.mark.parametrize("entry", TASKS, ids=lambda entry: entry.name)
def test_the_example_of_a_task_is_the_task_at_its_defaults(entry: Entry) -> None:
    assert parse_task(entry.example()) == parse_task(entry.name)


def test_first_sentence() -> None:
    assert first_sentence("One\nline.\n\nMore.") == "One line"
