"""Where to cut a text so that the prompt around it has an exact number of tokens."""

from __future__ import annotations

from collections.abc import Callable

from longctx.errors import DataError

__all__ = ["exact_cut"]

_AROUND = 24  # cuts on either side that are tried where none of the search is exact
_PADS = tuple(f"{' .' * count}{end}" for count in range(25) for end in ("", ".") if count or end)


def exact_cut(count: Callable[[int, str], int], most: int, target: int) -> tuple[int, str] | None:
    """Return the characters to keep, and full stops to put after them; None if too few or many.

    The number of tokens grows with the characters, nearly evenly and by one at a time, so that a
    few counts find the cut. Where a character brings several tokens, full stops make up for what is
    left; no count of tokens is taken for granted.

    Args:
        count: tokens of the prompt with so many characters of the text and these full stops.
        most: characters that there are.
        target: tokens wanted.

    Raises:
        DataError: a tokenizer with which no cut is exact.
    """
    low, at_low = 0, count(0, "")
    keep = min(most, target - at_low)  # a character has a token at most, or nearly
    if at_low > target:
        return None
    while (found := count(keep, "")) < target:  # grow by the characters that a token has here
        if keep == most:
            return None
        each = keep / max(found - at_low, 1)
        low, keep = keep, min(most, keep + max(round(each * (target - found)), 1))
    high = keep
    while found != target and high - low > 1:
        keep = (low + high) // 2 if found < target else max(high - (found - target), low + 1)
        found = count(keep, "")
        low, high = (keep, high) if found < target else (low, keep)
    if found == target:
        return keep, ""
    near = range(max(0, low - _AROUND), min(most, low + _AROUND) + 1)
    for keep, pad in [*((keep, "") for keep in near), *((low, pad) for pad in _PADS)]:
        if count(keep, pad) == target:
            return keep, pad
    raise DataError(
        f"no cut of this text fills exactly the {target} tokens that are left beside the answer, "
        "with this tokenizer: ask for a length that is one token longer."
    )
