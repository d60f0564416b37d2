"""What a folder of methods, tasks or commands holds, read from the source without running it.

Importing a method or a task takes torch and transformers, which take seconds; its name, its first
sentence and its fields stand in its file.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

__all__ = ["Entry", "Field", "converts", "entries", "first_sentence", "public_files"]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a dataclass, as its file writes it."""

    name: str
    annotation: str
    """Its type, such as "int | None"."""
    default: str | None
    """Its default as source text; None where it must be given."""
    doc: str
    """The text under it, on one line."""

    @property
    def literal(self) -> bool:
        """Whether its default is a number, a word, None or a tuple of such."""
        try:
            ast.literal_eval(self.default or "")
        except (ValueError, SyntaxError):
            return False
        return True

    def __str__(self) -> str:
        default = "" if self.default is None else f" = {self.default}"
        return f"{self.name}: {self.annotation}{default}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A method, a task or a command: the class that its file names as such."""

    name: str
    """The name of the file."""
    text: str
    """The docstring of the file."""
    class_text: str
    """That of the class."""
    fields: tuple[Field, ...]
    own: tuple[str, ...]
    """The names of those that no base has too."""
    needs_extent: bool = True
    """Whether a factor belongs to its example (`needs_extent` of its class)."""
    converts: bool = False
    """Whether it makes a new model out of the weights (`longctx.convert`), its slot "weights"."""

    def example(self) -> str:
        """Write it as the command line does, with a field of its own.

        Where that field has no default to show, "…" stands for what only you know.

        >>> [entry.example() for entry in entries("longctx.patches", "METHOD")][:2]
        ['abf:factor=4,theta=500000.0', 'alibi:factor=4']
        """
        by_name = {field.name: field for field in self.fields}
        given = ["factor=4"] if "factor" in by_name and self.needs_extent else []
        own = [by_name[name] for name in self.own if name not in ("factor", "target")]
        shown = [_shown(field) for field in own] + (
            [] if given else [_shown(field) for field in self.fields]
        )
        fields = ",".join([*given, *filter(None, shown)][: len(given) + 1])
        return f"{self.name}:{fields}".removesuffix(":")


def _shown(field: Field) -> str | None:
    """A field with its default, if that is a number or a word."""
    value = ast.literal_eval(field.default or "None") if field.literal else None
    if value == ():
        return f"{field.name}=…"
    word = isinstance(value, str) and value.isidentifier()
    return f"{field.name}={value}" if word or isinstance(value, int | float) else None


def first_sentence(text: str) -> str:
    """The first paragraph of a docstring on one line, without its full stop."""
    return " ".join(text.partition("\n\n")[0].split()).removesuffix(".")


def public_files(package: str) -> tuple[str, ...]:
    """Names of the files of a package, without folders and those that begin with "_"."""
    spec = importlib.util.find_spec(package)
    folder = [] if spec is None else spec.submodule_search_locations or []
    if package in sys.modules:  # where others may have added folders
        folder = sys.modules[package].__path__
    found = pkgutil.iter_modules(folder)
    return tuple(sorted(m.name for m in found if m.name[0] != "_" and not m.ispkg))


@lru_cache(maxsize=8)
def entries(package: str, constant: str) -> tuple[Entry, ...]:
    """The public files of a package that assign a class to `constant`, by name.

    >>> [entry.name for entry in entries("longctx.patches", "METHOD")][:2]
    ['abf', 'alibi']
    """
    found = (_entry(f"{package}.{name}", constant) for name in public_files(package))
    return tuple(entry for entry in found if entry is not None)


def _entry(module: str, constant: str) -> Entry | None:
    tree = _parsed(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if constant in names:
                made = _class(module, node.value.id)
                inherited = _inherited(module, made)
                own = _own_fields(made)
                return Entry(
                    name=module.rpartition(".")[2],
                    text=ast.get_docstring(tree) or "",
                    class_text=ast.get_docstring(made) or "",
                    fields=tuple({**inherited, **own}.values()),
                    own=tuple(name for name in own if name not in inherited),
                    needs_extent="needs_extent: ClassVar[bool] = False" not in ast.unparse(made),
                    converts=_converts(made),
                )
    return None


@lru_cache(maxsize=64)
def _parsed(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _class(module: str, name: str) -> ast.ClassDef:
    for node in _parsed(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{module} has no class {name}")


def _converts(made: ast.ClassDef) -> bool:
    return "slots: ClassVar[tuple[str, ...]] = ('weights',)" in ast.unparse(made)


@lru_cache(maxsize=128)
def converts(module: str) -> bool:
    """Whether the method of a file makes a new model, by the slot "weights" that its class names.

    >>> converts("longctx.patches.multi_query"), converts("longctx.patches.yarn")
    (True, False)
    """
    classes = (node for node in _parsed(module).body if isinstance(node, ast.ClassDef))
    return any(map(_converts, classes))


def _inherited(module: str, made: ast.ClassDef) -> dict[str, Field]:
    """The fields of the bases that longctx defines, in the order that a dataclass gives them."""
    found: dict[str, Field] = {}
    for base in reversed([node.id for node in made.bases if isinstance(node, ast.Name)]):
        home = _home(module, base)
        if home.partition(".")[0] == "longctx":
            parent = _class(home, base)
            found |= {**_inherited(home, parent), **_own_fields(parent)}
    return found


def _home(module: str, name: str) -> str:
    """The module that a class of this name comes from."""
    for node in _parsed(module).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            relative = "." * node.level + (node.module or "")
            return importlib.util.resolve_name(relative, module.rpartition(".")[0])
    return module


def _own_fields(made: ast.ClassDef) -> dict[str, Field]:
    found: dict[str, Field] = {}
    for node, after in zip(made.body, [*made.body[1:], ast.Pass()], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        annotation = ast.unparse(node.annotation)
        if annotation.startswith("ClassVar"):
            continue
        default = None if node.value is None else ast.unparse(node.value)
        found[node.target.id] = Field(node.target.id, annotation, default, _text_of(after))
    return found


def _text_of(node: ast.stmt) -> str:
    """The words of a string that stands by itself, on one line."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""
