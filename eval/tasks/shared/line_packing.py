"""Texts of whole lines, put together to an exact number of tokens without cutting any."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.haystacks import Texts, tokenise

__all__ = ["cut", "exact", "fit"]

_AHEAD = 256  # blocks to choose from at the end
_BACK = 16  # blocks that may give way to others


def cut(tokenizer: PreTrainedTokenizerBase, blocks: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each block, as they are in one text; each ends with a newline.

    Raises:
        DataError: a tokenizer that gives newlines no tokens of which one is the last.
    """
    # Not at the beginning of a text, where some tokenizers put a space.
    straw = tokenise(tokenizer, Texts(("\n" + "".join(blocks),), name="lines"))
    ends = list(accumulate(block.count("\n") for block in blocks))
    if len(straw.lines) != ends[-1] + 1:
        raise DataError(
            f"The tokenizer joins lines: of {ends[-1] + 1} only {len(straw.lines)} begin at a "
            "token. Prompts of whole lines cannot be made with it; use task 'passkey' instead."
        )
    starts = [*straw.lines[1:], len(straw.ids)]
    return [straw.ids[starts[a] : starts[b]] for a, b in pairwise([0, *ends])]


def exact(sizes: Sequence[int], target: int) -> tuple[int, ...] | None:
    """Ascending indices of sizes that add up to the target, None if none do.

    >>> exact([5, 4, 7], 12)
    (0, 2)
    """
    reached: dict[int, tuple[int, ...]] = {0: ()}
    for index, size in enumerate(sizes):
        if target in reached:
            break
        for total, chosen in list(reached.items()):
            if total + size <= target:
                reached.setdefault(total + size, (*chosen, index))
    return reached.get(target)


def fit(sizes: Sequence[int], room: int) -> list[int] | None:
    """Indices of blocks that fill `room` tokens exactly: the first ones, then some that follow.

    None if none do.

    >>> fit([5, 5, 5, 4, 7], 21)
    [0, 1, 3, 4]
    """
    sums = [0, *accumulate(sizes)]
    most = bisect_right(sums, room) - 1
    for whole in range(most, max(0, most - _BACK) - 1, -1):
        rest = exact(sizes[whole : whole + _AHEAD], room - sums[whole])
        if rest is not None:
            return [*range(whole), *(whole + index for index in rest)]
    return None
