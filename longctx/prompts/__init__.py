"""Prompts of an exact length in tokens: haystacks, their assembly, passkeys.

>>> from longctx.prompts import SHORT, Grass, passkey
>>> prompt = passkey(tokenizer, 200, haystack=Grass(), wording=SHORT)         # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assembly import Prompt, assemble
    from .haystacks import Grass, Texts, held_out
    from .passkey_prompts import CLASSIC, SHORT, Wording, passkey

__all__ = [
    "CLASSIC",
    "SHORT",
    "Grass",
    "Prompt",
    "Texts",
    "Wording",
    "assemble",
    "held_out",
    "passkey",
]

_HOMES = ("assembly", "haystacks", "passkey_prompts")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: transformers takes seconds."""
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f".{home}", __name__)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
