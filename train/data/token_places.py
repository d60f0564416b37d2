"""Which tokens stand for which characters of a rendered conversation.

    places = Places.of(rendered, encoding) or Places.of_pieces(rendered, [encoding], [0, len(text)])
    places.ids[places.firsts[0] : places.afters[0]]          # the tokens of the first answer

`Places.of` asks the tokenizer for the few tokens at the ends of spans. Where one of them does not
begin there it gives up, and `of_pieces` reads the characters of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from .chat_template import Rendered

__all__ = ["Places", "across_of"]

Ints: TypeAlias = NDArray[np.int64]
_MOST = 10_000_000  # tokens that the tokenizer looks through before arrays are the faster way


@dataclass(frozen=True, slots=True)
class Places:
    """The tokens of a text, and where its spans lie in them."""

    ids: Ints
    firsts: tuple[int, ...]
    """Of each span, the first token that begins in it."""
    afters: tuple[int, ...]
    """Of each span, the first token that begins after it."""
    characters: Callable[[int], tuple[int, int]]
    """First character of a token, and the one after its last."""

    @classmethod
    def of(cls, rendered: Rendered, found: Encoding) -> Places | None:
        """By the tokens at the ends of spans; None where a span does not begin or end with one."""
        if 2 * len(rendered.spans) * len(found) > _MOST:
            return None
        edges: list[int] = []
        for place in (edge for span in rendered.spans for edge in span):
            if place == len(rendered.text):
                edges.append(len(found))
                continue
            token = found.char_to_token(place)
            if token is None or _characters(found, token)[0] != place:
                return None
            edges.append(token)
        ids = np.array(found.ids, dtype=np.int64)
        return cls(ids, tuple(edges[::2]), tuple(edges[1::2]), partial(_characters, found))

    @classmethod
    def of_pieces(
        cls, rendered: Rendered, pieces: Sequence[Encoding], edges: Sequence[int]
    ) -> Places:
        """By the characters of all tokens, of a text that was tokenised in pieces between edges."""
        ids = np.concatenate([np.array(piece.ids, dtype=np.int64) for piece in pieces])
        offsets = np.concatenate(
            [_offsets(p) + begin for p, begin in zip(pieces, edges, strict=False)]
        )
        starts, stops = offsets.T
        firsts, afters = (np.searchsorted(starts, column) for column in np.array(rendered.spans).T)
        return cls(
            ids,
            tuple(map(int, firsts)),
            tuple(map(int, afters)),
            lambda at: (int(starts[at]), int(stops[at])),
        )


def across_of(rendered: Rendered, found: Encoding) -> list[int]:
    """The ends of prompts that a token lies across: prompts are tokenised alone when served."""
    starts, stops = _offsets(found).T
    begin = np.array([start for start, _ in rendered.spans])
    at = np.searchsorted(starts, begin, side="right") - 1
    return [int(place) for place in begin[(starts[at] < begin) & (stops[at] > begin)]]


def _characters(found: Encoding, token: int) -> tuple[int, int]:
    return cast(tuple[int, int], found.token_to_chars(token))


def _offsets(found: Encoding) -> Ints:
    return np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
