"""Methods and tasks as the shell shows them: `longctx methods`, `longctx tasks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import fill

from ..catalogue import Entry, first_sentence
from ..errors import RunError, nearest

__all__ = ["print_entries"]


def print_entries(
    found: Sequence[Entry], names: Sequence[str], example: Callable[[Entry], str]
) -> None:
    """Print all in short or, of those that are named, all that their files say of their use.

    Args:
        found: methods or tasks.
        names: of those to be shown at length.
        example: the command line that uses one of them.

    Raises:
        RunError: a name that none has.
    """
    known = {entry.name: entry for entry in found}
    for name in names:
        if name not in known:
            raise RunError(f"no {name!r}{nearest(name, known)} (there are {', '.join(known)})")
    for entry in [known[name] for name in names] or found:
        if names:
            print(f"{entry.name}\n\n{entry.text}\n")
            for field in entry.fields:
                print(f"    {field}")
                print(fill(field.doc, 88, initial_indent=" " * 8, subsequent_indent=" " * 8))
        else:
            print(f"{entry.name:<18} {first_sentence(entry.text)}")
            print("\n".join(f"{'':20} {field}" for field in entry.fields))
        print(f"{'':18} {example(entry)}\n")
