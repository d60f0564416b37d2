"""Reading text, writing files that are complete or not there, and JSON that every reader takes."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DataError
from .folders import refuse_other_than_file

__all__ = ["finite", "read_text", "write_whole"]


def read_text(path: Path, expected: str) -> str:
    """The text of a UTF-8 file, its line ends as one character each.

    Args:
        path: of the file.
        expected: what it should hold, for the message: "a document".

    Raises:
        DataError: it is not a file, cannot be read, is not UTF-8, or holds NUL bytes.
    """
    if not path.is_file():  # reading a FIFO or a device would wait, or never end
        what = "a folder, a device or a FIFO" if path.exists() else "not there"
        raise DataError(f"{path} is {what}: expected a file with {expected}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): convert it.") from error
    if "\0" in text:
        raise DataError(f"{path} holds NUL bytes: it is binary, expected a file with {expected}.")
    return text


def write_whole(path: Path, writer: Callable[[Path], Any]) -> Path:
    """Let `writer` fill a file beside `path`, then put it in its place; returns `path`.

    Raises:
        OSError: the disk refuses; what was at `path` is still there.
        RunError: a folder, device, FIFO, socket or a link to one has that name.
    """
    refuse_other_than_file(path)
    place = Path(os.path.realpath(path))  # a link to a file stays one
    part = place.with_name(f".{place.name}.{secrets.token_hex(4)}.part")
    try:
        writer(part)
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)
    return path


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have, in all it holds."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
