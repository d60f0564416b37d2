"""Writing files that are complete or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_whole"]


def write_whole(path: Path, writer: Callable[[Path], Any]) -> Path:
    """Let `writer` fill a file beside `path`, then put it in its place; returns `path`.

    Raises:
        OSError: the disk refuses; what was at `path` is still there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        writer(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
