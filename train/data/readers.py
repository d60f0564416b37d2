"""Records from files, folders and the hub, one at a time, and never fewer than there are.

    records = Records("chats.json")                  # .json .jsonl .parquet .txt, also .gz .xz .bz2
    records = Records("org/name", split="train")     # a hub id; a folder of shards likewise
    for record in records: ...
    records.notes                                    # what a reader of the report must know

JSON is decoded through a window that grows with its longest record, so that memory does not grow
with the file. A file that breaks off is refused with the byte and the number of whole records;
`salvage` goes on with those, and says so in the notes. Byte offsets count decompressed bytes.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from longctx.errors import DataError

from .passkeys import training_text

__all__ = ["MANUAL", "SAMPLE", "Records"]

SAMPLE = "sample"
"""Names the sample conversations that ship with the package."""
MANUAL = "manual"
"""Names the text that ships with it: parts of Python's manual that the evaluation does not use."""

Record: TypeAlias = dict[str, Any]

_JSON = (".json", ".jsonl", ".ndjson")
_CHUNK = 1 << 22  # bytes
_NEAR_THE_END = 16  # characters; an escape or a literal that is cut off is shorter
_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


@dataclass(frozen=True, slots=True)
class Records:
    """The records of a source, to be iterated over."""

    source: str | os.PathLike[str]
    """A file, a folder, a hub id, "sample" or "manual"."""
    salvage: bool = False
    """Go on with the whole records of a file that breaks off."""
    split: str = "train"
    """Which split of a hub id or folder."""
    notes: list[str] = field(default_factory=list, compare=False)
    """Filled while iterating."""

    @property
    def name(self) -> str:
        """Short name for messages."""
        return Path(self.source).name if Path(self.source).exists() else str(self.source)

    def __iter__(self) -> Iterator[Record]:
        """Yield the records in order.

        Raises:
            DataError: not there, unreadable, empty, broken off, or not what its name says.
        """
        count = 0
        for count, record in enumerate(self._records(), 1):
            if not isinstance(record, dict):
                raise DataError(
                    f"{self.name}, record {count} is {record!r:.40}: expected an object with "
                    "'conversations', 'messages' or 'text'."
                )
            yield cast(Record, record)
        if not count:
            raise DataError(f"{self.name} holds no records: pass a file with conversations.")

    def _records(self) -> Iterator[Any]:
        if self.source == SAMPLE:
            yield from self._json(Path(str(files("longctx.train") / "sample.jsonl.xz")))
            return
        if self.source == MANUAL:
            yield from ({"text": text} for text in training_text().documents)
            return
        path = Path(self.source).expanduser()
        if path.is_dir() or (not path.exists() and _is_hub_id(str(self.source))):
            yield from self._dataset(path)
            return
        if not path.is_file():
            raise DataError(f"{path} does not exist: expected a file, a folder or a hub id.")
        readers = dict.fromkeys(_JSON, self._json) | {
            ".parquet": self._parquet,
            ".txt": self._document,
            ".md": self._document,
            ".rst": self._document,
        }
        suffix = Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix
        if suffix.lower() not in readers:
            known = ", ".join(readers)
            raise DataError(f"{path.name}: the ending {suffix!r} is not known; use {known}.")
        try:
            yield from readers[suffix.lower()](path)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{path.name} does not decompress: {error}. It is cut off or damaged: fetch it "
                "again."
            ) from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}.") from error

    def _json(self, path: Path) -> Iterator[Any]:
        with _open(path) as stream:
            yield from self._decode(_Window(stream, path.name))

    def _decode(self, window: _Window) -> Iterator[Any]:
        decoder = json.JSONDecoder()
        array = window.skip(re.compile(r"\ufeff?\s*")) == "["
        separators = re.compile(r"[\s,]*" if array else r"\s*")
        if array:
            window.at += 1
        count = 0
        while (begins := window.skip(separators)) and not (array and begins == "]"):
            try:
                record, window.at = decoder.raw_decode(window.text, window.at)
            except json.JSONDecodeError as error:
                rest = len(window.text) - error.pos
                if rest > _NEAR_THE_END and not error.msg.startswith("Unterminated string"):
                    raise DataError(
                        f"{window.name} is not JSON at byte {window.byte(error.pos):,}, in record "
                        f"{count + 1:,}: {error.msg}. Mend or remove that record."
                    ) from error
                if window.more():
                    continue
                self._broken_off(window, count)
                return
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, say
                raise DataError(
                    f"{window.name} cannot be read in record {count + 1:,}: {error}. Mend or "
                    "remove that record."
                ) from error
            count += 1
            yield record
        if array and not begins:
            self._broken_off(window, count)
            return
        window.at += array
        if window.skip(re.compile(r"\s*")):
            raise DataError(
                f"{window.name} goes on after its closing ']' at byte {window.byte(window.at):,}: "
                "expected one array, or one object a line."
            )

    def _broken_off(self, window: _Window, count: int) -> None:
        byte = f"{window.byte(window.at):,}"
        if not self.salvage:
            raise DataError(
                f"{window.name} breaks off: after {count:,} whole records the file ends in the "
                f"midst of what begins at byte {byte}. Fetch it again, or pass salvage=True "
                "(--salvage) to go on with the whole ones."
            )
        note = (
            f"salvaged {count:,} whole records; the file breaks off in what begins at byte {byte}"
        )
        if note not in self.notes:  # records may be read more than once
            self.notes.append(note)

    def _parquet(self, path: Path) -> Iterator[Any]:
        import pyarrow
        from pyarrow import parquet

        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path.name} is not a complete parquet file: {error}. Parquet keeps its index at "
                "the end, so nothing can be salvaged from a part: fetch it again."
            ) from error

    def _document(self, path: Path) -> Iterator[Any]:
        with _open(path) as stream:
            raw = stream.read()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _no_utf8(path.name, error.start) from error
        if text.strip():
            yield {"text": text}

    def _dataset(self, path: Path) -> Iterator[Any]:
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            if any((path / f"{part}.json").exists() for part in ("dataset_dict", "dataset_info")):
                loaded = datasets.load_from_disk(str(path))
                whole = isinstance(loaded, datasets.DatasetDict)
                yield from loaded[self.split] if whole else loaded
                return
            name = str(path) if path.exists() else str(self.source)
            yield from datasets.load_dataset(name, split=self.split)
        except (ValueError, OSError, DatasetsError) as error:
            raise DataError(
                f"cannot load the data set {str(self.source)!r}, split {self.split!r}: {error}"
            ) from error


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def _open(path: Path) -> BinaryIO:
    return _OPENERS.get(path.suffix, lambda p: io.FileIO(p))(path)


def _no_utf8(name: str, byte: int) -> DataError:
    return DataError(
        f"{name} is not UTF-8 text at byte {byte:,}: convert it (iconv -f … -t utf-8), or mend "
        "that byte."
    )


class _Window:
    """The part of a UTF-8 stream that is being decoded; `at` is the place in `text`."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.name = name
        self.text = ""
        self.at = 0
        self._before = 0  # bytes of the stream before `text`
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read = 0

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Move past what matches; return the character found there, "" at the end."""
        while True:
            match = pattern.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def more(self) -> bool:
        """Forget what lies behind and read on; False at the end of the stream."""
        self._before = self.byte(self.at)
        self.text = self.text[self.at :]
        self.at = 0
        pending = len(self._decoder.getstate()[0])
        # Never less than there is: a record of any size is decoded a logarithmic number of times.
        chunk = self._stream.read(max(_CHUNK, len(self.text)))
        try:
            self.text += self._decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise _no_utf8(self.name, self._read - pending + error.start) from error
        self._read += len(chunk)
        if not chunk and pending:  # cut off within a character: no JSON begins with this one
            self._decoder.reset()
            self.text += "\ufffd"
        return bool(chunk) or pending > 0

    def byte(self, at: int) -> int:
        """The byte offset in the stream of a place in `text`."""
        return self._before + len(self.text[:at].encode())
