"""What longctx raises when the input, not the code, is at fault.

    ValueError
    └── LongctxError          catch this one to catch them all
        ├── MethodError       an unknown method or field, an impossible factor, a slot that is taken
        ├── ModelError        a model type, configuration or checkpoint that cannot be worked with
        ├── DataError         prompts, haystacks, documents or conversations that do not fit
        │   └── TooShortError a length that has no room for what must stand in it
        └── RunError          an output folder, a results file or a setting of a run

Every message names the value, what was expected, and the next step.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "DataError",
    "LongctxError",
    "MethodError",
    "ModelError",
    "RunError",
    "TooShortError",
    "nearest",
    "printable",
]

# Control characters but for line breaks and tabs, line separators, and those that reorder a line.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: object) -> str:
    r"""The text with control characters spelt out: data cannot steer a terminal.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


class LongctxError(ValueError):
    """Base of the errors that a user can mend."""

    def __str__(self) -> str:
        """The message, in which control characters of the data are spelt out."""
        return printable(super().__str__())


class MethodError(LongctxError):
    """A method or its settings cannot be used as asked."""


class ModelError(LongctxError):
    """A model or checkpoint cannot be worked with."""


class DataError(LongctxError):
    """Texts, prompts or conversations do not fit what is asked of them."""


class TooShortError(DataError):
    """A length has no room for what must stand in it."""


class RunError(LongctxError):
    """A run's settings or its files stand in the way."""


def nearest(word: object, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    # Of a word as long as a file, the comparison would take minutes.
    close = difflib.get_close_matches(str(word)[:200], list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
