"""What longctx raises when the input, not the code, is at fault.

    ValueError
    └── LongctxError          catch this one to catch them all
        ├── MethodError       an unknown method or field, an impossible factor, a slot that is taken
        ├── ModelError        a model type, configuration or checkpoint that cannot be worked with
        ├── DataError         prompts, haystacks, documents or conversations that do not fit
        └── RunError          an output folder, a results file or a setting of a run

Every message names the value, what was expected, and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "LongctxError",
    "MethodError",
    "ModelError",
    "RunError",
    "nearest",
    "printable",
]


class LongctxError(ValueError):
    """Base of the errors that a user can mend."""


class MethodError(LongctxError):
    """A method or its settings cannot be used as asked."""


class ModelError(LongctxError):
    """A model or checkpoint cannot be worked with."""


class DataError(LongctxError):
    """Texts, prompts or conversations do not fit what is asked of them."""


class RunError(LongctxError):
    """A run's settings or its files stand in the way."""


def nearest(word: object, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def printable(text: object) -> str:
    r"""The text with what a terminal would act on as its escape; line ends stay.

    >>> printable("\x1b[31mred")
    '\\x1b[31mred'
    """
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode()
        for character in str(text).encode("utf-8", "replace").decode()
    )
