"""Bytes and text out of files, compressed or not, in bounded memory.

    with open_stream(path, salvage=True) as stream:
        stream.read(1 << 20)          # as many bytes, fewer at the end alone
        stream.broken                 # why nothing more can be decompressed, or ""

A file that decompresses to more than 200 times its size is refused from 64 MiB on: it was made to
fill a disk or a memory. One record, and one text, is at most 256 MiB.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longctx.errors import DataError

__all__ = ["COMPRESSED", "LONGEST", "Stream", "not_utf8", "open_stream"]

LONGEST = 1 << 28
"""Most bytes of a text and characters of a record."""
_PIECE = 1 << 16  # bytes that are decompressed at a time
_RATIO, _HARMLESS = 200, 1 << 26


def _zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _zstd,
}
COMPRESSED = frozenset(_OPENERS)
"""Endings of compressed files, in small letters."""


class Stream:
    """What a file decompresses to."""

    def __init__(self, raw: Any, path: Path, *, salvage: bool) -> None:
        self.broken = ""
        self._raw = raw
        self._name = path.name
        self._salvage = salvage
        self._some: Callable[[int], bytes] = getattr(raw, "read1", raw.read)
        self._read = 0
        compressed = path.suffix.lower() in COMPRESSED
        self._most = max(_HARMLESS, _RATIO * path.stat().st_size) if compressed else None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def read(self, count: int) -> bytes:
        """As many bytes; fewer where the file ends, or breaks off and is salvaged.

        Raises:
            DataError: it does not decompress, or to far more than it should.
        """
        pieces: list[bytes] = []
        while count > 0 and not self.broken:
            try:
                # One read of the file at a time, so that what came before a fault is not lost.
                piece = self._some(min(count, _PIECE))
            except (EOFError, lzma.LZMAError, zlib.error, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                self._break(error)
                break
            if not piece:
                break
            pieces.append(bytes(piece))
            count -= len(piece)
            self._read += len(piece)
            if self._most is not None and self._read > self._most:
                raise DataError(
                    f"{self._name} decompresses to more than {self._most:,} bytes, over {_RATIO} "
                    "times its size, which no text does: unpack it, and look at it."
                )
        return b"".join(pieces)

    def _break(self, error: Exception) -> None:
        self.broken = str(error) or type(error).__name__
        if not self._salvage:
            raise DataError(
                f"{self._name} does not decompress: {self.broken}. It is cut off or damaged: fetch "
                "it again, or pass salvage=True (--salvage) to go on with the whole records."
            ) from error


def open_stream(path: Path, *, salvage: bool = False) -> Stream:
    """Open a file, decompressing it by its ending, however that is written.

    Raises:
        OSError: it cannot be opened.
    """
    opener = _OPENERS.get(path.suffix.lower(), lambda p: io.FileIO(p))
    return Stream(opener(path), path, salvage=salvage)


def not_utf8(name: str, byte: int) -> DataError:
    """The error about a byte that is no part of UTF-8 text."""
    return DataError(
        f"{name} is not UTF-8 text at byte {byte:,}: convert it (iconv -f … -t utf-8), or mend "
        "that byte."
    )
