"""Prompts of an exact length in tokens: haystacks, their assembly, passkeys.

>>> from longctx.prompts import SHORT, Grass, passkey
>>> prompt = passkey(tokenizer, 200, haystack=Grass(), wording=SHORT)         # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from ..lazy_exports import exporter

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

__getattr__ = exporter(
    __name__,
    __all__,
    ("assembly", "haystacks", "passkey_prompts"),
)
