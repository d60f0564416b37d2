"""Public names of a package that are imported when they are first used."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["exporter"]


def exporter(package: str, names: Sequence[str], modules: Sequence[str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names live in its modules (PEP 562).

    torch and transformers take seconds to import, and `longctx --help` needs neither.

    Args:
        package: its `__name__`.
        names: its `__all__`.
        modules: where they are looked for, in this order; each module has an `__all__`.
    """

    def exported(name: str) -> Any:
        if name in names:
            for module in modules:
                home = importlib.import_module(f".{module}", package)
                if name in home.__all__:
                    return getattr(home, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return exported
