"""Extend, fine-tune, measure and ship language models beyond the window they were trained with.

>>> import longctx
>>> model, tokenizer = longctx.load("demo")
>>> with longctx.extend(model, "yarn", factor=4) as patch:
...     patch.report().window
1024
"""

from typing import TYPE_CHECKING

from .lazy_exports import exporter

if TYPE_CHECKING:
    from .checkpoint import Saved, load, save
    from .conversion import Conversion, ConversionReport, Converted
    from .converting import convert
    from .core import extend
    from .errors import DataError, LongctxError, MethodError, ModelError, RunError
    from .patch import Check, Method, Patch, Report, patch_of
    from .registry import available, conversions, parse_conversion, parse_method

__version__ = "0.1.0"

__all__ = [
    "Check",
    "Conversion",
    "ConversionReport",
    "Converted",
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
    "conversions",
    "convert",
    "extend",
    "load",
    "parse_conversion",
    "parse_method",
    "patch_of",
    "save",
]


__getattr__ = exporter(
    __name__,
    __all__,
    ("errors", "conversion", "registry", "patch", "core", "converting", "checkpoint"),
)
