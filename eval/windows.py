"""Windows of text: documents in token ids, and where in them to read."""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from longctx.haystacks import Texts, encode

from .texts import digest

__all__ = ["documents_of", "spread"]


@lru_cache(maxsize=4)
def documents_of(tokenizer: PreTrainedTokenizerBase, texts: Texts) -> dict[str, tuple[int, ...]]:
    """Token ids of each document by the digest of its text; a repeated one counts once."""
    return {digest(text): encode(tokenizer, text) for text in texts.documents}


def spread(sizes: dict[str, int], size: int, windows: int) -> list[tuple[str, int]]:
    """(document, first token) of at most `windows` windows that do not overlap.

    Every document gets its first window before any gets a second; those of one document lie
    evenly over it.
    """
    room = {name: length // size for name, length in sizes.items()}
    counts = dict.fromkeys(sizes, 0)
    left = min(windows, sum(room.values()))
    while left:
        for name in sizes:
            if left and counts[name] < room[name]:
                counts[name] += 1
                left -= 1
    return [
        (name, j * (sizes[name] // count)) for name, count in counts.items() for j in range(count)
    ]
