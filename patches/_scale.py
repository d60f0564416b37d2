"""How far a method extends: `factor` or `target`, validated the same way everywhere."""

from __future__ import annotations

import math

from longctx.errors import MethodError
from longctx.rope import Rope

__all__ = ["LONGEST", "check_number", "extended_length", "scale"]

_LARGEST = 1e6
LONGEST = 2**40
"""Tokens that no setting may exceed."""


def check_number(method: str, field: str, value: object, *, minimum: float = 0.0) -> None:
    """Refuse anything but a finite number > 0 and ≥ `minimum`."""
    number = value if isinstance(value, int | float) and value is not True else math.nan
    if not (0 < number < math.inf and number >= minimum):
        bound = f"≥ {minimum:g}" if minimum > 0 else "> 0"
        raise MethodError(f"{method}: {field}={value!r} must be a finite number {bound}.")


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
        if target > LONGEST:
            raise MethodError(
                f"{method}: target={target!r} tokens is beyond reason; expected ≤ {LONGEST:,}."
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
    if target < rope.length:
        raise MethodError(
            f"{method}: target={target} tokens is below the original window of {rope.length}; "
            "a window can only be extended."
        )
    return target / rope.length


def extended_length(factor: float | None, target: int | None, rope: Rope) -> int:
    """The new window in whole tokens."""
    if target is not None:
        return int(target)
    return rope.length if factor is None else int(rope.length * factor + 1e-9)
