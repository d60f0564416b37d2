"""Single tokens as bytes and text: several of them may make one character, and a space may be lost.

A tokenizer's own decoding of one token writes U+FFFD for a part of a character, and many leave out
the space that SentencePiece writes as "▁" in front of a word.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..generation.detokenize import text_of

__all__ = ["TokenTexts"]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNFINISHED = "\ufffd"
_SPACE = "▁"


class TokenTexts:
    """What each token of a vocabulary stands for.

    Args:
        tokenizer: the model's, with byte-level BPE or byte fallback where tokens are parts of
            characters. Each token is decoded once: an answer names the same ones many times.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bytes = {char: byte for byte, char in bytes_to_unicode().items()}
        self._known: dict[int, bytes] = {}
        self._sizes: dict[int, int] = {}

    def bytes_of(self, token: int) -> bytes:
        """The token's own bytes, also where they are a part of a character."""
        if token not in self._known:
            self._known[token] = self._decoded(token)
        return self._known[token]

    def _decoded(self, token: int) -> bytes:
        text: Any = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        piece: Any = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):  # an embedding that the tokenizer has no token for
            return str(text).encode()
        if _UNFINISHED in text:
            if byte := _BYTE.fullmatch(piece):
                return bytes([int(byte[1], 16)])
            if all(char in self._bytes for char in piece):
                return bytes(self._bytes[char] for char in piece)
        spaced = piece.replace(_SPACE, " ")
        return (spaced if spaced.lstrip(" ") == text.lstrip(" ") else str(text)).encode()

    def text(self, token: int) -> str:
        """Its text, with U+FFFD for parts of characters."""
        return self.bytes_of(token).decode(errors="replace")

    def name(self, token: int) -> str:
        r"""Its text, or its bytes as completions of OpenAI's name them: `bytes:\xf0\x9f`."""
        own = self.bytes_of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def size(self, token: int) -> int:
        """Characters that begin in it; special tokens take no room in a text."""
        if token not in self._sizes:
            self._sizes[token] = self._counted(token)
        return self._sizes[token]

    def _counted(self, token: int) -> int:
        if not text_of(self._tokenizer, [token]) and token in self._tokenizer.all_special_ids:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.bytes_of(token))
