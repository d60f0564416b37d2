"""The floors of the house: who may import whom, and under which name."""

from __future__ import annotations

import ast
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("longctx", "patches", "train", "eval")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, relative ones written out by their installed name."""
    package = "longctx" if path.parent.name == "longctx" else f"longctx.{path.parent.name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                assert node.level == 1, f"{path}: relative imports stay inside the folder"
                base = f"{package}.{base}".rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_floors(path: Path) -> None:
    upper = {"longctx.patches", "longctx.train", "longctx.eval"}
    own = f"longctx.{path.parent.name}"
    roof = path.stem.split("_")[0] == "cli" and path.parent.name == "longctx"
    for module in imports(path):
        assert module.split(".")[0] not in {"patches", "train", "eval", "tests", "benchmarks"}
        reached = {name for name in upper if module == name or module.startswith(f"{name}.")}
        assert roof or reached <= {own}, f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_are_short_and_documented(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300
    assert ast.get_docstring(ast.parse(text))


def test_no_file_outside_imports_the_folders_by_their_place() -> None:
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in {"patches", "train", "eval"}, f"{path}: {name}"


def test_the_folders_install_under_one_name() -> None:
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert mapping["package-dir"] == {
        "longctx": "longctx",
        "longctx.patches": "patches",
        "longctx.train": "train",
        "longctx.eval": "eval",
    }
    for name in ("patches", "train", "eval"):
        module = importlib.import_module(f"longctx.{name}")
        assert Path(module.__path__[0]).resolve() == ROOT / name


def test_every_method_has_its_file_and_only_methods_do() -> None:
    import longctx

    files = {p.stem for p in (ROOT / "patches").glob("*.py") if not p.stem.startswith("_")}
    assert set(longctx.available()) == files
