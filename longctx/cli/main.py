"""The `longctx` command: the same dataclasses that the Python API takes, read from the shell.

A command is a file in this folder that defines `COMMAND`; only the one that is asked for is
imported.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, Protocol, TextIO

from .. import __version__
from ..catalogue import entries, first_sentence
from ..errors import LongctxError, RunError, nearest, printable

__all__ = ["main"]

FINE, USAGE, INTERRUPTED = 0, 2, 130


class Command(Protocol):
    """What a command's dataclass does."""

    def run(self) -> int:
        """Do it and return the exit code."""
        ...


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 fine, 1 found a problem, 2 bad usage."""
    arguments = sys.argv[1:] if argv is None else argv
    names = {entry.name.replace("_", "-"): entry.name for entry in entries(__package__, "COMMAND")}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if arguments else sys.stderr)
        return FINE if arguments else USAGE
    if arguments[0] == "--version":
        print(f"longctx {__version__}")
        return FINE
    name, *options = arguments
    if name not in names:
        known = ", ".join(names)
        print(f"longctx: no command {name!r}{nearest(name, names)} ({known})", file=sys.stderr)
        print("See longctx --help.", file=sys.stderr)
        return USAGE
    output: Any = _Output(sys.stdout)
    try:
        with redirect_stdout(output):
            code = _parsed(name, names[name], options).run()
        output.flush()
        return code
    except LongctxError as error:
        print(f"longctx {name}: {printable(error)}", file=sys.stderr)
        return USAGE
    except SystemExit as stop:  # help that was asked for, or options that cannot be read
        return stop.code if isinstance(stop.code, int) else FINE
    except KeyboardInterrupt:
        print("longctx: interrupted", file=sys.stderr)
        return INTERRUPTED


class _Output:
    """Standard output whose reader may go away (`| head -1`): the work goes on, unseen."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop what nobody reads."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what nobody reads."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


def _overview() -> str:
    """The help of `longctx` by itself: a line for each command."""
    found = entries(__package__, "COMMAND")
    names = [entry.name.replace("_", "-") for entry in found]
    width = max(map(len, names))
    lines = [
        f"  {name:{width}} {first_sentence(entry.class_text)}"
        for name, entry in zip(names, found, strict=True)
    ]
    return "\n".join(
        [
            "usage: longctx COMMAND …",
            "",
            "Extend, fine-tune, measure and ship long-context language models.",
            "",
            *lines,
            "",
            "longctx COMMAND --help   what it takes, with examples",
            "longctx --version        the version",
        ]
    )


def _parsed(name: str, module: str, options: Sequence[str]) -> Command:
    """The command with its options.

    Raises:
        RunError: an option that is given twice.
        SystemExit: help that was asked for, or options that cannot be read.
    """
    import tyro

    _refuse_repeated(name, options)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    command: type[Command] = importlib.import_module(f"{__package__}.{module}").COMMAND
    whole = inspect.cleandoc(command.__doc__ or "")  # tyro would drop its examples
    return tyro.cli(command, prog=f"longctx {name}", args=options, description=whole)


def _refuse_repeated(command: str, options: Sequence[str]) -> None:
    """Refuse an option that is given twice, of which tyro would take the last."""
    given: set[str] = set()
    for option in options:
        if not option.startswith("--") or option == "--":
            continue
        name = option[2:].partition("=")[0].replace("_", "-").removeprefix("no-")
        if name in given:
            raise RunError(
                f"--{name} is given twice: give it once; one that takes several values takes them "
                f"one after the other. See longctx {command} --help."
            )
        given.add(name)
