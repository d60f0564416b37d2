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
    from .core import extend, extend_all
    from .errors import DataError, LongctxError, MethodError, ModelError, RunError
    from .generation.generate import Generated, generate
    from .generation.loop_guard import LoopGuard
    from .generation.registry import available_decodings, parse_decoding
    from .patch import Check, Method, Patch, Report, patch_of
    from .reading.answers import Answer
    from .reading.read import Reading, read
    from .reading.summarise import summarise
    from .registry import (
        available,
        conversions,
        parse_conversion,
        parse_method,
        parse_methods,
    )

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Check",
    "Conversion",
    "ConversionReport",
    "Converted",
    "DataError",
    "Generated",
    "LongctxError",
    "LoopGuard",
    "Method",
    "MethodError",
    "ModelError",
    "Patch",
    "Reading",
    "Report",
    "RunError",
    "Saved",
    "available",
    "available_decodings",
    "conversions",
    "convert",
    "extend",
    "extend_all",
    "generate",
    "load",
    "parse_conversion",
    "parse_decoding",
    "parse_method",
    "parse_methods",
    "patch_of",
    "read",
    "save",
    "summarise",
]


_HOMES = ("errors", "conversion", "registry", "patch", "core", "converting", "checkpoint")
_OF_GENERATION = ("generation.registry", "generation.loop_guard", "generation.generate")
_OF_READING = ("reading.answers", "reading.read", "reading.summarise")

__getattr__ = exporter(__name__, __all__, (*_HOMES, *_OF_GENERATION, *_OF_READING))
