"""What mkdocs asks of us: the reference lists methods, tasks and decodings by file, not by hand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Expand the marks of a page; mkdocs calls it for each."""
    return expanded(markdown)


def expanded(markdown: str) -> str:
    """A page whose marks, as `<!-- tasks -->`, are written out as mkdocstrings' entries."""
    for mark, entries in (("methods", _methods), ("tasks", _tasks), ("decodings", _decodings)):
        markdown = markdown.replace(f"<!-- {mark} -->", "\n".join(entries()))
    return markdown


def _methods() -> Iterator[str]:
    """Every public file of `patches/`, with what it holds."""
    for path in sorted((ROOT / "patches").glob("[!_]*.py")):
        yield f"::: longctx.patches.{path.stem}\n    options: {{heading_level: 2}}\n"


def _decodings() -> Iterator[str]:
    """Every public file of `generation/decodings/`, with what it holds."""
    for path in sorted((ROOT / "longctx/generation/decodings").glob("[!_]*.py")):
        yield f"::: longctx.generation.decodings.{path.stem}\n    options: {{heading_level: 2}}\n"


def _tasks() -> Iterator[str]:
    """Every class of `eval/tasks/` that has a name of its own, as the protocol asks."""
    for path in sorted((ROOT / "eval" / "tasks").glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(map(_names, node.body)):
                yield f"::: longctx.eval.tasks.{path.stem}.{node.name}\n"


def _names(statement: ast.stmt) -> bool:
    """Whether it is `name: ClassVar[str] = "…"`."""
    return (
        isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and statement.target.id == "name"
        and isinstance(statement.value, ast.Constant)
    )
