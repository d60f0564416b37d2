"""The documentation: every public name is in the reference, every command and snippet is real."""

from __future__ import annotations

import importlib
import pkgutil
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import longctx

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PUBLIC = ["longctx", "longctx.eval", "longctx.train"]
BLOCK = re.compile(r"^```(\w+)(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)


def referenced() -> set[str]:
    """What the reference asks mkdocstrings for, marks written out as the build does."""
    expanded: Any = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["expanded"]
    pages = (path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    return set(re.findall(r"^::: (\S+)", "\n".join(map(expanded, pages)), re.MULTILINE))


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    known = referenced()
    for name in importlib.import_module(module).__all__:
        value = getattr(importlib.import_module(module), name)
        home = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
        assert f"{module}.{name}" in known or home in known, f"{module}.{name}"


def test_every_method_is_in_the_reference() -> None:
    known = referenced()
    for name in (*longctx.available(), *longctx.conversions()):
        method: Any = importlib.import_module(f"longctx.patches.{name}")
        assert f"longctx.patches.{name}" in known
        assert method.METHOD.__doc__, f"{name}: a class without a docstring is left out"


def test_every_decoding_is_in_the_reference() -> None:
    known = referenced()
    for name in longctx.available_decodings():
        decoding: Any = importlib.import_module(f"longctx.generation.decodings.{name}")
        assert f"longctx.generation.decodings.{name}" in known
        assert decoding.DECODING.__doc__, f"{name}: a class without a docstring is left out"


def test_the_reference_names_nothing_that_is_gone() -> None:
    for name in referenced():
        home, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(home), last), name


def commands() -> Iterator[tuple[str, str]]:
    """Every `longctx …` of a console block, continued lines joined, without its comment."""
    for page in PAGES:
        for language, _, body in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "console":
                for line in body.replace("\\\n", " ").splitlines():
                    found = re.match(r"\$ .*?\blongctx (.*)", line)
                    if found:
                        yield page.name, found[1]


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_command_is_read(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names a subcommand and options that there are, which `main` finds out before it runs."""
    del page
    words = shlex.split(command, comments=True)
    cli: Any = importlib.import_module("longctx.cli.main")
    seen: list[Any] = []

    def note(self: Any) -> int:
        seen.append(self)
        return 0

    for found in pkgutil.iter_modules(importlib.import_module("longctx.cli").__path__):
        for kind in vars(importlib.import_module(f"longctx.cli.{found.name}")).values():
            if isinstance(kind, type) and "run" in vars(kind):
                monkeypatch.setattr(kind, "run", note)
    assert cli.main(words) == 0
    assert len(seen) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of a page, one block after another; a block with a title needs something more."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    code = "\n".join(body for language, rest, body in blocks if (language, rest) == ("python", ""))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "page"})
