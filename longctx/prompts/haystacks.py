"""What a key is hidden in: repeated sentences or real text, tokenised once and cut in token ids."""

from __future__ import annotations

import json
import lzma
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from random import Random
from typing import TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from ..errors import DataError

__all__ = [
    "Grass",
    "Haystack",
    "Straw",
    "Texts",
    "bos_of",
    "decode",
    "encode",
    "held_in",
    "held_out",
    "tokenise",
]


@dataclass(frozen=True, slots=True)
class Grass:
    """The classical haystack: the same five sentences over and over, as long as asked."""

    line: str = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    """What is repeated, with a space in between."""
    name: str = "grass"
    """Stands in results."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Real text as a haystack: documents in a row, from a line that the seed chooses."""

    documents: tuple[str, ...]
    """At least one, in the order in which they are joined."""
    name: str = "texts"
    """Stands in results."""

    def __post_init__(self) -> None:
        if not any(document.strip() for document in self.documents):
            raise DataError(
                f"Haystack {self.name!r} holds no text in its {len(self.documents)} documents; "
                "pass at least one that is not empty."
            )


Haystack: TypeAlias = Grass | Texts


@lru_cache(maxsize=1)
def held_in() -> Texts:
    """133 documents of Python's manual (PSF licence), none of them in the held-out text.

    Training and calibration read them.
    """
    return _manual("held_in.json.xz", "python-manual-train")


@lru_cache(maxsize=1)
def held_out() -> Texts:
    """Ten documents of Python's manual (PSF licence) that the embedded model was not trained on.

    They serve as the real-text haystack of the evaluation and for perplexity.
    """
    return _manual("held_out.json.xz", "python-manual")


def _manual(file: str, name: str) -> Texts:
    packed = (files("longctx") / "demo" / file).read_bytes()
    documents = cast(dict[str, str], json.loads(lzma.decompress(packed)))
    return Texts(tuple(documents.values()), name=name)


@dataclass(frozen=True, slots=True)
class Straw:
    """A haystack in token ids, with the positions at which a line or sentence begins."""

    ids: tuple[int, ...]
    breaks: tuple[int, ...]
    lines: tuple[int, ...]  # the breaks at which a line begins, and 0
    period: int  # from this many tokens before the end it repeats; 0: it does not repeat

    def start(self, size: int, name: str, seed: int) -> int:
        """Where a haystack of up to `size` tokens begins: a line that the seed chooses.

        Raises:
            DataError: the text is shorter than that.
        """
        if self.period:
            return 0
        if size > len(self.ids):
            raise DataError(
                f"haystack {name!r} has {len(self.ids)} tokens, the prompt needs {size}: pass more "
                "text, or ask for a shorter length."
            )
        fitting = bisect_right(self.lines, len(self.ids) - size)
        return self.lines[Random(f"haystack/{name}/{seed}").randrange(fitting)]

    def places(self, start: int, size: int, depths: list[float]) -> list[int]:
        """The free break nearest to each depth, in tokens after `start`; 0 and `size` count too.

        Raises:
            DataError: fewer breaks than depths.
        """
        free = [0, *(b - start for b in self._breaks(start, start + size))]
        if size:
            free.append(size)
        if len(free) < len(depths):  # a line longer than the haystack: any token will do
            free = list(range(size + 1))
        if len(free) < len(depths):
            raise DataError(
                f"a haystack of {size} tokens has no places for {len(depths)} needles: ask for a "
                "longer prompt or fewer pairs."
            )
        chosen: list[int] = []
        for depth in depths:
            place = min(free, key=lambda p: abs(p - depth * size))
            free.remove(place)
            chosen.append(place)
        return chosen

    def at_line(self, start: int, place: int) -> bool:
        """Whether a line begins at a place: at the haystack's beginning, or after a newline."""
        index = bisect_left(self.lines, start + place)
        return place == 0 or self.lines[index : index + 1] == (start + place,)

    def _breaks(self, start: int, end: int) -> list[int]:
        """Breaks strictly between two places."""
        breaks = self.breaks
        if self.period:
            last = [b for b in breaks if b > len(self.ids) - self.period]
            more = range(1, -(-end // self.period))
            breaks = (*breaks, *(b + self.period * i for i in more for b in last))
        return list(breaks[bisect_right(breaks, start) : bisect_left(breaks, end)])

    def span(self, start: int, size: int) -> tuple[int, ...]:
        """`size` tokens from `start` on."""
        if not self.period:
            return self.ids[start : start + size]
        rounds = max(0, -(-(size - len(self.ids)) // self.period))
        return (self.ids + self.ids[-self.period :] * rounds)[:size]


def bos_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The BOS if the tokenizer puts one before a text; having none is legal."""
    ids: list[int] = tokenizer("")["input_ids"]  # pyright: ignore[reportAssignmentType]
    return tuple(token for token in ids[:1] if token == tokenizer.bos_token_id)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokenise without special tokens and without the warning about long inputs."""
    if not text:
        return ()
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    """Turn ids into text as they stand, spaces included."""
    return cast(str, tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _breaks(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> tuple[list[int], set[int]]:
    """Return where a line or sentence begins in `ids`, and which of these follow a newline."""
    pieces = {token: decode(tokenizer, (token,)) for token in set(ids)}
    lines = {i for i in range(1, len(ids)) if pieces[ids[i - 1]].endswith("\n")}
    pair_breaks: dict[tuple[int, int], bool] = {}
    found: list[int] = []
    for i in range(1, len(ids)):
        if i in lines:
            found.append(i)
        elif pieces[ids[i - 1]].endswith((".", "!", "?")):
            pair = (ids[i - 1], ids[i])
            if pair not in pair_breaks:
                # A lone token may lose its leading space in decoding, a pair does not.
                rest = decode(tokenizer, pair)[len(pieces[pair[0]]) :]
                pair_breaks[pair] = rest[:1].isspace()
            if pair_breaks[pair]:
                found.append(i)
    return found, lines


@lru_cache(maxsize=16)
def tokenise(tokenizer: PreTrainedTokenizerBase, haystack: Haystack) -> Straw:
    """Tokenise a haystack once for all its prompts."""
    if isinstance(haystack, Grass):
        once = encode(tokenizer, haystack.line)
        ids = encode(tokenizer, f"{haystack.line} {haystack.line}")
        if not once or ids[: len(once)] != once or len(ids) == len(once):
            raise DataError(
                f"The tokenizer joins the end of {haystack.line!r} with its repetition; pass a "
                "Grass(line=...) of whole sentences that ends in a full stop."
            )
        period = len(ids) - len(once)
    else:
        ids = encode(tokenizer, "\n\n".join(haystack.documents))
        period = 0
    breaks, lines = _breaks(tokenizer, ids)
    return Straw(ids, tuple(breaks), (0, *sorted(lines)), period)
