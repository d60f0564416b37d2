"""Extend, fine-tune, measure and ship language models beyond the window they were trained with.

>>> import longctx
>>> model, tokenizer = longctx.load("demo")
>>> with longctx.extend(model, "yarn", factor=4) as patch:
...     patch.report().window
1024
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Saved, load, save
    from .core import extend
    from .errors import DataError, LongctxError, MethodError, ModelError, RunError
    from .patch import Check, Method, Patch, Report, patch_of
    from .registry import available, parse_method

__version__ = "0.1.0"

__all__ = [
    "Check",
    "DataError",
    "LongctxError",
    "Method",
    "MethodError",
    "ModelError",
    "Patch",
    "Report",
    "RunError",
    "Saved",
    "available",
    "extend",
    "load",
    "parse_method",
    "patch_of",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds."""
    if name in __all__:
        for home in ("errors", "registry", "patch", "core", "checkpoint"):
            module = importlib.import_module(f".{home}", __name__)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
