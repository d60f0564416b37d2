"""What is finished of units that are under way, so that a run that is killed loses little.

A file beside the results, NAME.part, has the form of the results: a header, then a record for some
prompts of a unit, under the unit's key. It is written every second at most. When the unit is
complete its one record goes to the results, and the records of its parts are dropped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from glob import escape
from pathlib import Path

from longctx.append_only import AppendOnlyFile
from longctx.files import write_whole
from longctx.folders import refuse_other_than_file

from .records import Record, dump_record, header_of, load_record, read_records

__all__ = ["Journal"]

_EVERY = 1.0  # seconds of work that may be lost, beside the prompts that run


class Journal:
    """Records of parts of units, in memory and in a file."""

    def __init__(self, results: Path, own: Path, identity: dict[str, str]) -> None:
        """Read what earlier runs left, of whatever number of processes.

        Args:
            results: the common results file.
            own: the results file of this process.
            identity: what they belong to.

        Raises:
            RunError: a file of another model, or a damaged one.
            OSError: one cannot be read.
        """
        self._path = own.with_name(f"{own.name}.part")
        self._header = json.dumps(header_of(identity))
        self._parts: dict[str, list[Record]] = defaultdict(list)
        self._waiting: Record | None = None
        self._written = time.monotonic()
        self._file: AppendOnlyFile | None = None
        refuse_other_than_file(self._path)
        several = f"{escape(results.stem)}.*of*{results.suffix}.part"
        for path in (results.with_name(f"{results.name}.part"), *results.parent.glob(several)):
            if path.exists():
                refuse_other_than_file(path)
                for record in read_records(path, identity):
                    self._parts[record.key].append(record)

    def units(self) -> list[str]:
        """The units that something is finished of."""
        return list(self._parts)

    def parts(self, key: str) -> Sequence[Record]:
        """What is finished of a unit."""
        return self._parts.get(key, ())

    def add(self, part: Record) -> None:
        """Keep further prompts of the unit that is under way.

        Raises:
            RunError: the disk refuses.
        """
        before = self._waiting
        if before is not None and before.key == part.key:
            part = dataclasses.replace(
                part,
                observations=(*before.observations, *part.observations),
                tokens=before.tokens + part.tokens,
                seconds=round(before.seconds + part.seconds, 3),
            )
        self._waiting = part
        if time.monotonic() - self._written >= _EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what was added.

        Raises:
            RunError: the disk refuses.
        """
        part, self._waiting = self._waiting, None
        self._written = time.monotonic()
        if part is None:
            return
        text = dump_record(part)
        self._parts[part.key].append(load_record(text, "the record"))
        if self._file is None:
            self._file = AppendOnlyFile(self._path, first=self._header, holds="results")
            if not self._file.count:
                self._file.append(self._header)
        self._file.append(text)

    def close(self) -> None:
        """Let others write, until the next part comes."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def drop(self, key: str) -> None:
        """Forget the parts of a unit that is complete, or that is measured otherwise (OSError)."""
        self._waiting = None
        if self._parts.pop(key, None) is None or not self._path.exists():
            return
        self.close()
        lines = self._path.read_bytes().rpartition(b"\n")[0].splitlines()
        kept = [line for line in lines[1:] if json.loads(line)["key"] != key]
        if kept:
            text = b"".join(line + b"\n" for line in (lines[0], *kept))
            write_whole(self._path, lambda part: part.write_bytes(text))
        else:
            self._path.unlink()
