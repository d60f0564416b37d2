"""A file of JSON lines that only grows: a line is on the disk, or was cut off and is dropped."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from .errors import RunError
from .folders import refuse_other_than_file, refuse_other_than_folder

__all__ = ["JsonLines"]


class JsonLines:
    """A file of lines that one process writes to, until it is closed.

    Opening it changes nothing in it, so that its lines can be refused. What a killed process left
    of a last line goes when the next line is appended.

    Args:
        path: the file, there or not.
        first: what its first line begins with, whatever its settings.
        holds: what the lines are, for the messages: "generated rows".

    Raises:
        RunError: a folder, device or FIFO; another process writes to it; it holds nothing but the
            beginning of a line that is none of ours; or the disk refuses.
    """

    def __init__(self, path: Path, *, first: str, holds: str) -> None:
        refuse_other_than_folder(path.parent)
        refuse_other_than_file(path)  # opening a FIFO would wait for its reader
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)  # what a full disk refused is not kept
        except OSError as error:
            raise RunError(f"cannot write to {path}: {error}. Name another.") from error
        self.close = weakref.finalize(self, self._file.close)
        """Let others write; happens too when nothing refers to this any more."""
        try:
            self._lock()
            self._file.seek(0)
            data = self._file.read()
        except BaseException:
            self.close()
            raise
        whole, _, self.cut = data.rpartition(b"\n")
        self.lines: list[bytes] = whole.splitlines()
        """Those that are complete when it is opened, without their ends."""
        begins = first.encode()
        if self.cut and not self.lines and self.cut[: len(begins)] != begins[: len(self.cut)]:
            self.close()
            raise RunError(f"{path} is not a file of {holds}: name another.")
        self._end = len(data) - len(self.cut)
        self._count = len(self.lines)

    def append(self, line: str) -> None:
        """Add a line, which is on the disk before this returns.

        Raises:
            RunError: the disk refuses.
        """
        try:
            self._file.truncate(self._end)
            rest = line.encode() + b"\n"
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path}: {error}. Make room; the same command then goes on "
                f"after the {self._count} lines that are there."
            ) from error
        self._end = self._file.tell()
        self._count += 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process writes to {self.path}: wait for it, or name another."
            ) from error
        except OSError:  # a file system without locks
            return
