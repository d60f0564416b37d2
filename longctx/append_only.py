"""A file that only grows, by lines: each is on the disk, or was cut off and is dropped."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from .errors import RunError
from .folders import refuse_other_than_file, refuse_other_than_folder

__all__ = ["AppendOnlyFile"]


class AppendOnlyFile:
    """A file that one process appends lines to, until it is closed or nothing refers to it.

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
        self._close = weakref.finalize(self, self._file.close)
        try:
            self._lock()
            data = self._read()
        except BaseException:
            self.close()
            raise
        self._end = data.rfind(b"\n") + 1
        self.cut = data[self._end :]
        """What a killed process left of a last line."""
        self.count = data.count(b"\n")
        """Lines that are there."""
        begins = first.encode()
        if self.cut and not self.count and self.cut[: len(begins)] != begins[: len(self.cut)]:
            self.close()
            raise RunError(f"{path} is not a file of {holds}: name another.")
        self._torn = bool(self.cut)

    def lines(self) -> list[bytes]:
        """Those that are there, without their ends."""
        return self._read()[: self._end].splitlines()

    def append(self, line: str) -> None:
        """Add a line, which is on the disk before this returns.

        Raises:
            RunError: the disk refuses.
        """
        try:
            if self._torn:
                self._file.truncate(self._end)
            self._torn = True
            rest = line.encode() + b"\n"
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path}: {error}. Make room; the same command then goes on "
                f"after the {self.count} lines that are there."
            ) from error
        self._torn = False
        self._end = self._file.tell()
        self.count += 1

    def close(self) -> None:
        """Let others write."""
        self._close()

    def _read(self) -> bytes:
        self._file.seek(0)
        return self._file.read()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process writes to {self.path}: wait for it, or name another."
            ) from error
        except OSError:  # a file system without locks
            return
