"""What the layers of one forward pass work out together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

__all__ = ["Once"]

T = TypeVar("T")


class Once(Generic[T]):
    """Keeps the last value that was made from tensors, for as long as the same ones come again.

    Every layer of a forward pass is handed the same positions and the same mask.
    """

    def __init__(self) -> None:
        self._last: tuple[tuple[object, ...], T] | None = None

    def get(self, make: Callable[[], T], *inputs: object) -> T:
        """The value for these inputs: tensors by identity and version, the rest by equality."""
        last = self._last
        key = tuple((x, _version(x)) if isinstance(x, Tensor) else x for x in inputs)
        if last is not None and _same(last[0], key):
            return last[1]
        value = make()
        self._last = (key, value)
        return value

    def __deepcopy__(self, memo: object) -> Once[T]:
        return Once()

    def __reduce__(self) -> tuple[type[Once[T]], tuple[()]]:
        return Once, ()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if isinstance(a, tuple) and isinstance(b, tuple):
            if a[0] is not b[0] or a[1] != b[1]:
                return False
        elif isinstance(a, tuple) or isinstance(b, tuple) or a != b:
            return False
    return True
