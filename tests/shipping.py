"""A method that is no file of `patches/`, as if it were one, and the matrix's properties for it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import longctx.patches

from . import test_matrix

Property = tuple[Callable[..., None], str | None]
"""A test of the matrix and the family it runs on, None where it has its own."""


@contextmanager
def shipped(folder: Path, name: str, text: str) -> Generator[None]:
    """Write a file `name`.py and let the registry find it beside the methods of the house."""
    assert name not in longctx.available(), "the file of the house would be found instead"
    (folder / f"{name}.py").write_text(text)
    path: Any = longctx.patches.__path__
    longctx.patches.__path__ = [*path, str(folder)]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        longctx.patches.__path__ = path
        sys.modules.pop(f"longctx.patches.{name}", None)


def properties() -> list[Property]:
    """Every test that the matrix has for a method, with every family that it runs on."""
    found: list[Property] = []
    for key, test in vars(test_matrix).items():
        if key.startswith("test_") and "name" in inspect.signature(test).parameters:
            marks = {mark.args[0]: mark.args[1] for mark in test.pytestmark}
            families = [f for f in marks.get("family", (None,)) if isinstance(f, str | None)]
            found += [(test, family) for family in families]  # without those marked slow
    return found


def label(case: Property) -> str:
    """A short name for a test's id."""
    return f"{case[0].__name__.removeprefix('test_')}-{case[1] or 'own'}"


def check(case: Property, name: str, folder: Path) -> None:
    """Run one property for the method called `name`."""
    test, family = case
    wanted = inspect.signature(test).parameters
    given: dict[str, Any] = {"name": name, "family": family, "tmp_path": folder}
    test(**{key: value for key, value in given.items() if key in wanted})
