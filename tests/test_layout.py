"""The floors of the house: who may import whom, and under which name."""

from __future__ import annotations

import ast
import importlib
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("longctx", "patches", "train", "eval")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
LONGEST = 500  # lines: a file is as long as its thought, up to here


def name_of(path: Path) -> str:
    """The installed name of a file's module; of an `__init__.py` that of its package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "longctx" else ("longctx", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file names in an import, wherever it stands, and whether relatively.

    Those under TYPE_CHECKING and inside functions count too; relative ones are written out.
    """
    package = name_of(path) if path.stem == "__init__" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in MODULES else base), bool(node.level)


def floor(module: str) -> str:
    """The folder that a module of longctx belongs to; the command stands on top of all."""
    second = [*module.split("."), ""][1]
    return second if second in ("patches", "train", "eval", "cli") else "core"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path: Path) -> None:
    own = floor(name_of(path))
    for module, relative in imports(path):
        assert module.split(".")[0] not in {"patches", "train", "eval", "tests", "benchmarks"}
        if module.split(".")[0] != "longctx":
            continue
        reached = floor(module)
        entry = path.name == "__main__.py" and reached == "cli"
        allowed = {own, "core"} if own != "cli" else {"core", "patches", "train", "eval", "cli"}
        assert entry or reached in allowed, f"{path} imports {module}"
        same = reached == own or {reached, own} <= {"core", "cli"}
        assert relative == same or module == "longctx", f"{path} imports {module}: relative inside"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports for type checking and inside functions count too: what both need goes below both."""
    graph = {
        name: {module for module, _ in imports(path) if module in MODULES}
        for name, path in MODULES.items()
        if path.name != "__init__.py"
    }
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    try:
        TopologicalSorter({name: used - packages for name, used in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' → '.join(error.args[1])}")


def test_packages_keep_nothing_but_public_names() -> None:
    """No module of a folder imports what its package offers: the package imports the module."""
    public = {"longctx", "longctx.prompts", "longctx.train", "longctx.eval"}
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            used = {module for module, _ in imports(path)} & public
            assert all(floor(package) != floor(name) for package in used - {"longctx"}), path
        elif name not in public:
            assert len(ast.parse(path.read_text()).body) == 1, f"{path}: more than a docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_documented(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LONGEST
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_files_beside_the_four_folders_are_short_too(folder: str) -> None:
    lengths = {path.name: path.read_text().count("\n") for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert max(lengths.values()) <= LONGEST


def test_no_file_outside_imports_the_folders_by_their_place() -> None:
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
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
    packages = {name_of(path) for path in FILES if path.name == "__init__.py"}
    assert set(mapping["packages"]) == packages
    assert {path.parent for path in FILES} == {MODULES[name].parent for name in packages}
    for name in ("patches", "train", "eval"):
        module = importlib.import_module(f"longctx.{name}")
        assert Path(module.__path__[0]).resolve() == ROOT / name


def test_every_file_that_is_not_python_is_installed() -> None:
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns: dict[str, list[str]] = mapping["package-data"]
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_dir() or path.suffix in (".py", ".pyc"):
                continue
            homes = [MODULES[name].parent for name in patterns]
            matches = [
                path.match(str(home / pattern))
                for home, of in zip(homes, patterns.values(), strict=True)
                for pattern in of
            ]
            assert any(matches), f"{path} is in no package-data"


@pytest.mark.parametrize("name", ["longctx", "longctx.prompts", "longctx.train", "longctx.eval"])
def test_every_public_name_is_there(name: str) -> None:
    module = importlib.import_module(name)
    for public in module.__all__:
        assert getattr(module, public) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense


def test_every_method_has_its_file_and_only_methods_do() -> None:
    import longctx

    files = {p.stem for p in (ROOT / "patches").glob("*.py") if not p.stem.startswith("_")}
    assert {*longctx.available(), *longctx.conversions()} == files
    assert not {*longctx.available()} & {*longctx.conversions()}


def test_every_task_has_its_file_and_only_tasks_do() -> None:
    from longctx.eval import available_tasks
    from longctx.eval.tasks.shared.registry import task_class

    files = {p.stem for p in (ROOT / "eval" / "tasks").glob("*.py") if p.stem != "__init__"}
    assert set(available_tasks()) == files
    for name in files:
        assert task_class(name).name == name
