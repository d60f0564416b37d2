"""The results file: append-only JSON lines, so that a run that was cut off goes on where it was.

The first line names model and tokenizer. Each further one is a unit of work under the digest of
all that it depends on; of several under one key the last counts. Failed units are tried again.
Scores of single tokens lie beside it, a parquet file per unit in the folder `tokens`, and what is
finished of a unit under way in NAME.part (`Journal`).

One process writes to a file. Several that share a sweep (`torchrun`) have a file each, named after
the common one, and read all of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.append_only import AppendOnlyFile
from longctx.errors import RunError

from .journal import Journal
from .records import Record, dump_record, header_of, load_record, read_parts

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Store"]


class Store:
    """Records by key, in memory and, with a path, in a file."""

    def __init__(
        self, path: Path | None, identity: dict[str, str], *, rank: int = 0, ranks: int = 1
    ) -> None:
        """Open or create the file, and keep other writers out until `close`.

        Args:
            path: of the JSON lines; None keeps the records in memory only.
            identity: what the whole file belongs to (digests of model and tokenizer, …).
            rank: the number of this process among `ranks`.
            ranks: processes that share the sweep.

        Raises:
            RunError: the file belongs to another model or tokenizer, is not a results file, is
                damaged elsewhere than at its end, is being written, or cannot be read or written.
        """
        self.path = path
        self.identity = identity
        self.notes: list[str] = []
        self._records: dict[str, Record] = {}
        self._own: AppendOnlyFile | None = None
        self._journal: Journal | None = None
        if path is None:
            return
        own = path.with_name(f"{path.stem}.{rank}of{ranks}{path.suffix}") if rank else path
        header = json.dumps(header_of(identity))
        self._own = AppendOnlyFile(own, first=header, holds="results")
        try:
            self.reload()
            if not self._own.count:
                self._own.append(header)
            if cut := self._own.cut:
                self.notes.append(
                    f"{own}: the last line was cut off ({len(cut)} bytes), dropped and computed "
                    "again"
                )
            self._journal = Journal(path, own, identity)
            for key in self._journal.units():
                if self.get(key) is not None:  # killed between its record and this
                    self._journal.drop(key)
        except OSError as error:
            self.close()
            raise RunError(
                f"cannot open the results file {path}: {error}; name another."
            ) from error
        except RunError:
            self.close()
            raise

    def close(self) -> None:
        """Let others write."""
        for file in (self._own, self._journal):
            if file is not None:
                file.close()

    def reload(self) -> None:
        """Read what all processes have written."""
        if self.path is not None:
            self._records = read_parts(self.path, self.identity)

    def last(self, key: str) -> Record | None:
        """The record under `key`, failed or not."""
        return self._records.get(key)

    def get(self, key: str) -> Record | None:
        """The record under `key` unless it failed: what failed is worth another try."""
        record = self._records.get(key)
        if record is None or record.failed is not None:
            return None
        if record.per_token and not self._tokens(key).exists():
            return None
        return record

    def put(self, record: Record, per_token: pa.Table | None = None) -> Record:
        """Keep a record, on the disk before this returns; returns it as it will be read back."""
        if self.path is not None and per_token is not None:
            record = dataclasses.replace(record, per_token=True)
        text = dump_record(record)
        record = load_record(text, "the record")
        self._records[record.key] = record
        if self._own is not None and self._journal is not None:
            try:
                if per_token is not None:
                    self._write_tokens(record.key, per_token)
                self._own.append(text)
                self._journal.drop(record.key)
            except OSError as error:
                raise self._no_room(error, len(self._records) - 1) from error
        return record

    def parts(self, key: str) -> Sequence[Record]:
        """What is finished of a unit that was cut off, as records of some prompts each."""
        return () if self._journal is None else self._journal.parts(key)

    def put_part(self, record: Record) -> None:
        """Keep what is finished of a unit under way; it may take a second to reach the disk."""
        if self._journal is not None:
            self._journal.add(record)

    def flush(self) -> None:
        """Have all parts on the disk before this returns."""
        if self._journal is not None:
            self._journal.flush()

    def drop_parts(self, key: str) -> None:
        """Forget what is finished of a unit that is measured otherwise now."""
        if self._journal is None:
            return
        try:
            self._journal.drop(key)
        except OSError as error:
            raise self._no_room(error, len(self._records)) from error

    def _no_room(self, error: OSError, known: int) -> RunError:
        assert self.path is not None
        return RunError(
            f"cannot write to {self.path.parent}: {error}. Make room; the same call then goes on "
            f"from the {known} results that are in there."
        )

    def _tokens(self, key: str) -> Path:
        assert self.path is not None
        return self.path.parent / "tokens" / f"{key}.parquet"

    def _write_tokens(self, key: str, table: pa.Table) -> None:
        from pyarrow import parquet

        path = self._tokens(key)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        try:
            parquet.write_table(table, part)  # pyright: ignore[reportUnknownMemberType]
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
