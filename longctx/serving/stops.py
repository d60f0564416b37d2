"""Texts that end a continuation, found in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Stops"]


class Stops:
    """Passes text on until one of several texts stands in it, which is not passed on.

    >>> stops = Stops(["END"])
    >>> stops.add("one E"), stops.add("gg EN"), stops.add("D two"), stops.text
    ('one ', 'Egg ', '', 'one Egg ')

    Args:
        texts: none of them empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._seen = ""
        self._passed = 0  # characters
        self.found = False

    @property
    def text(self) -> str:
        """What was passed on."""
        return self._seen[: self._passed]

    def add(self, text: str) -> str:
        """Take a piece and return what can be passed on now, held back before or new."""
        if self.found:
            return ""
        before = len(self._seen)
        self._seen += text
        longest = max(map(len, self._texts), default=0)
        begin = max(0, before - longest + 1)
        places = [at for each in self._texts if (at := self._seen.find(each, begin)) >= 0]
        if places:
            self.found = True
            return self._pass(min(places))
        return self._pass(len(self._seen) - self._unsure())

    def rest(self) -> str:
        """What was held back, when no more comes."""
        return "" if self.found else self._pass(len(self._seen))

    def _pass(self, end: int) -> str:
        begin, self._passed = self._passed, max(self._passed, end)
        return self._seen[begin : self._passed]

    def _unsure(self) -> int:
        """Characters at the end that may begin one of the texts."""
        longest = max((len(each) for each in self._texts), default=0)
        for size in range(min(longest - 1, len(self._seen)), 0, -1):
            if any(each.startswith(self._seen[-size:]) for each in self._texts):
                return size
        return 0
