"""Files of lines that only grow: a line is on the disk, or it was cut off and is dropped."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["append_line", "drop_cut_line"]


def append_line(path: Path, line: str) -> None:
    """Add a line, which is on the disk before this returns (OSError)."""
    with path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def drop_cut_line(path: Path) -> bytes:
    """Drop what was being written when a run was cut off: complete lines end in a newline.

    Returns:
        What was dropped; nothing where the file is whole, or not there.
    """
    data = path.read_bytes() if path.exists() else b""
    cut = data.rpartition(b"\n")[2]
    if cut:
        os.truncate(path, len(data) - len(cut))
    return cut
