"""Settings that are validated the same way everywhere, how far a method extends among them."""

from __future__ import annotations

import math
import sys

from longctx.errors import MethodError
from longctx.rope import Rope

__all__ = [
    "check_extent",
    "check_flag",
    "check_number",
    "check_tokens",
    "extended_length",
    "scale",
]

_LARGEST = 1e6
_LARGEST_FLOAT = sys.float_info.max
_LONGEST = 2**40


def check_number(method: str, field: str, value: object, *, minimum: float = 0.0) -> None:
    """Refuse anything but a finite number > 0 and ≥ `minimum`."""
    number = value if isinstance(value, int | float) and value is not True else math.nan
    if not (0 < number <= _LARGEST_FLOAT and number >= minimum):
        bound = f"≥ {minimum:g}" if minimum > 0 else "> 0"
        raise MethodError(f"{method}: {field}={value!r} must be a finite number {bound}.")


def check_tokens(method: str, field: str, value: object, *, least: int = 1) -> None:
    """Refuse anything but a whole number of at least so many tokens."""
    if type(value) is not int or not least <= value <= _LONGEST:
        raise MethodError(
            f"{method}: {field}={value!r}: expected a whole number ≥ {least}, such as "
            f"{field}={max(least, 100)}, and at most {_LONGEST:,}."
        )


def check_flag(method: str, field: str, value: object) -> None:
    """Refuse anything but true and false."""
    if type(value) is not bool:
        raise MethodError(f"{method}: {field}={value!r}: expected True or False.")


def check_extent(method: str, factor: float | None, target: int | None) -> None:
    """Refuse both, and values that no model could take."""
    if factor is not None and target is not None:
        raise MethodError(
            f"{method}: factor={factor!r} and target={target!r} say the same thing: pass one."
        )
    if factor is not None:
        check_number(method, "factor", factor)
        if factor < 1:
            raise MethodError(
                f"{method}: factor={factor!r} would shrink the window; expected ≥ 1 "
                "(factor=4 extends four-fold)."
            )
        if factor > _LARGEST:
            raise MethodError(f"{method}: factor={factor!r} is beyond reason; expected ≤ 1e6.")
    if target is not None:
        check_number(method, "target", target)
        if target > _LONGEST:
            raise MethodError(
                f"{method}: target={target!r} tokens is beyond reason; expected ≤ {_LONGEST:,}."
            )
        if int(target) != target:
            raise MethodError(f"{method}: target={target!r} must be a whole number of tokens.")


def scale(method: str, factor: float | None, target: int | None, rope: Rope) -> float:
    """The factor s = target / L, from whichever of the two was given.

    Raises:
        MethodError: neither was given, or the target lies below the original window.
    """
    if factor is not None:
        return float(factor)
    if target is None:
        raise MethodError(
            f"{method} needs factor= (how many times longer) or target= (tokens); "
            f"the original window is {rope.length} tokens."
        )
    return extended_length(method, None, target, rope.length) / rope.length


def extended_length(method: str, factor: float | None, target: int | None, length: int) -> int:
    """The new window in whole tokens, from one of `length`.

    Raises:
        MethodError: the target lies below it.
    """
    if target is None:
        return length if factor is None else int(length * factor + 1e-9)
    if target < length:
        raise MethodError(
            f"{method}: target={target} tokens is below the window of {length}; a window can only "
            "be extended."
        )
    return int(target)
