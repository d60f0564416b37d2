"""Records from files, folders and the hub, one at a time, and never fewer than there are.

    records = Records("chats.json")           # .json .jsonl .parquet .txt, also .gz .xz .bz2 .zst
    records = Records("org/name", split="train")     # a hub id; a folder of shards likewise
    for record in records: ...
    records.notes                                    # what a reader of the report must know

JSON is decoded through a window that grows with its longest record (256 MiB at most), so that
memory does not grow with the file. A file that breaks off is refused with the byte and the number
of whole records; `salvage` goes on with those, and says so in the notes. Byte offsets count
decompressed bytes.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias, cast

from longctx.errors import DataError
from longctx.prompts.haystacks import held_in

from .streams import COMPRESSED, LONGEST, Stream, not_utf8, open_stream
from .turns import BadRecordError, shown
from .unwrapping import unwrapped

__all__ = ["MANUAL", "SAMPLE", "Records"]

SAMPLE = "sample"
"""Names the sample conversations that ship with the package."""
MANUAL = "manual"
"""Names the text that ships with it: parts of Python's manual that the evaluation does not use."""

Record: TypeAlias = dict[str, Any]

_JSON = (".json", ".jsonl", ".ndjson")
_CHUNK = 1 << 22  # bytes
_NEAR_THE_END = 16  # characters; an escape or a literal that is cut off is shorter


@dataclass(frozen=True, slots=True)
class Records:
    """The records of a source, to be iterated over."""

    source: str | os.PathLike[str]
    """A file, a folder, a hub id, "sample" or "manual"."""
    salvage: bool = False
    """Go on with the whole records of a file that breaks off."""
    split: str = "train"
    """Which split of a hub id or folder, or of a file that holds a list for each."""
    skip_bad: bool = False
    """Yield a `BadRecordError` for what is not a record, instead of raising it."""
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
            if not isinstance(record, dict | BadRecordError):
                record = BadRecordError(
                    f"{self.name}, record {count} is {shown(record)}: expected an object with "
                    "'conversations', 'messages' or 'text'.",
                    "not an object",
                )
            if isinstance(record, BadRecordError) and not self.skip_bad:
                raise record
            yield cast(Record, record)
        if not count:
            notes = "".join(f" ({note})" for note in self.notes)
            raise DataError(f"{self.name} holds no records{notes}: pass a file with conversations.")

    def _records(self) -> Iterator[Any]:
        if self.source == SAMPLE:
            yield from self._json(Path(str(files("longctx.train") / "sample.jsonl.xz")))
            return
        if self.source == MANUAL:
            yield from ({"text": text} for text in held_in().documents)
            return
        path = Path(self.source).expanduser()
        if path.is_dir() or (not path.exists() and _is_hub_id(str(self.source))):
            yield from self._dataset(path)
            return
        if not path.is_file():
            # Reading a FIFO or a device would wait, or never end; records are read more than once.
            why = "is not a regular file" if path.exists() else "does not exist"
            raise DataError(f"{path} {why}: expected a file, a folder or a hub id.")
        readers = dict.fromkeys(_JSON, self._json) | {
            ".parquet": self._parquet,
            ".txt": self._document,
            ".md": self._document,
            ".rst": self._document,
        }
        suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
        if suffix.lower() not in readers:
            known = ", ".join(readers)
            raise DataError(f"{path.name}: the ending {suffix!r} is not known; use {known}.")
        try:
            yield from readers[suffix.lower()](path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}.") from error

    def _json(self, path: Path) -> Iterator[Any]:
        with open_stream(path, salvage=self.salvage) as stream:
            for record in self._decode(_Window(stream, path.name)):
                yield from unwrapped(record, self.split, path.name, self._note)

    def _note(self, note: str) -> None:
        if note not in self.notes:  # records may be read more than once
            self.notes.append(note)

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
            except (ValueError, RecursionError) as error:
                whole = not isinstance(error, json.JSONDecodeError)
                at = window.at if whole else error.pos
                said = str(error) if whole else error.msg
                rest = len(window.text) - at
                if whole or (rest > _NEAR_THE_END and not said.startswith("Unterminated string")):
                    bad = BadRecordError(
                        f"{window.name} is not JSON at byte {window.byte(at):,}, in record "
                        f"{count + 1:,}: {said}. Mend or remove that record.",
                        "not JSON",
                    )
                    if array or not self.skip_bad:
                        raise bad from error
                    window.skip(re.compile(r"[^\n]*"))  # of the line that it begins on
                    count += 1
                    yield bad
                    continue
                if window.more():
                    continue
                self._broken_off(window, count)
                return
            count += 1
            yield record
        if window.broken or (array and not begins):
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
        self._note(
            f"salvaged {count:,} whole records; the file breaks off in what begins at byte {byte}"
            + (f" ({window.broken})" if window.broken else "")
        )

    def _parquet(self, path: Path) -> Iterator[Any]:
        import pyarrow
        from pyarrow import parquet

        if path.suffix.lower() != ".parquet":
            raise DataError(f"{path.name}: parquet is compressed in itself; unpack the file.")
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
                yield from map(_without_none, batch.to_pylist())
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path.name} is not a complete parquet file: {error}. Parquet keeps its index at "
                "the end, so nothing can be salvaged from a part: fetch it again."
            ) from error

    def _document(self, path: Path) -> Iterator[Any]:
        with open_stream(path, salvage=self.salvage) as stream:
            raw = stream.read(LONGEST + 1)
            if stream.broken:
                self._note(f"salvaged {len(raw):,} bytes of text ({stream.broken})")
        if len(raw) > LONGEST:
            raise DataError(f"{path.name} is a text of over {LONGEST:,} bytes: split it.")
        try:
            text = raw.decode("utf-8-sig", errors="ignore" if stream.broken else "strict")
        except UnicodeDecodeError as error:
            raise not_utf8(path.name, error.start) from error
        if text.strip():
            yield {"text": text}

    def _dataset(self, path: Path) -> Iterator[Any]:
        import datasets
        import pyarrow
        from datasets.exceptions import DatasetsError

        source = f"the data set {str(self.source)!r}"
        try:
            if any((path / f"{part}.json").exists() for part in ("dataset_dict", "dataset_info")):
                found: Any = datasets.load_from_disk(str(path))
                if isinstance(found, datasets.DatasetDict):
                    if self.split not in found:
                        raise DataError(
                            f"{source} has no split {self.split!r}, and has "
                            f"{', '.join(map(repr, found))}: pass one of them as split (--split)."
                        )
                    found = found[self.split]
            else:
                name = str(path) if path.exists() else str(self.source)
                found = datasets.load_dataset(name, split=self.split)
            yield from map(_without_none, found)
        except DataError:
            raise
        except (
            ValueError,
            OSError,
            KeyError,
            TypeError,
            AttributeError,
            DatasetsError,
            pyarrow.ArrowException,
        ) as error:
            raise DataError(f"cannot load {source}, split {self.split!r}: {error}") from error


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def _without_none(value: Any) -> Any:
    """Without the nulls by which Arrow fills up objects to one and the same set of fields."""
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value).items()
        return {key: _without_none(item) for key, item in fields if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in cast(list[Any], value)]
    return value


class _Window:
    """The part of a UTF-8 stream that is being decoded; `at` is the place in `text`."""

    def __init__(self, stream: Stream, name: str) -> None:
        self.name = name
        self.text = ""
        self.at = 0
        self._before = 0  # bytes of the stream before `text`
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read = 0

    @property
    def broken(self) -> str:
        """Why the stream ends early, or an empty text."""
        return self._stream.broken

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Move past what matches; return the character found there, "" at the end."""
        while True:
            match = pattern.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def more(self) -> bool:
        """Forget what lies behind and read on; False at the end of the stream.

        Raises:
            DataError: not UTF-8, or a record longer than `LONGEST`.
        """
        self._before = self.byte(self.at)
        self.text = self.text[self.at :]
        self.at = 0
        if len(self.text) > LONGEST:
            raise DataError(
                f"{self.name} has a record of more than {LONGEST:,} characters at byte "
                f"{self._before:,}: write one record a line (.jsonl), and split longer texts."
            )
        pending = len(self._decoder.getstate()[0])
        # Never less than there is: a record of any size is decoded a logarithmic number of times.
        chunk = self._stream.read(max(_CHUNK, len(self.text)))
        try:
            self.text += self._decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise not_utf8(self.name, self._read - pending + error.start) from error
        self._read += len(chunk)
        if not chunk and pending:  # cut off within a character: no JSON begins with this one
            self._decoder.reset()
            self.text += "\ufffd"
        return bool(chunk) or pending > 0

    def byte(self, at: int) -> int:
        """The byte offset in the stream of a place in `text`."""
        return self._before + len(self.text[:at].encode())
