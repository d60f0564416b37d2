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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from longctx.errors import RunError
from longctx.folders import refuse_other_than_file, refuse_other_than_folder

from .append import append_line, drop_cut_line
from .journal import Journal
from .records import Record, check_header, dump_record, header_of, load_record, read_parts

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
        self._own = path
        self._journal: Journal | None = None
        if path is None:
            return
        if rank:
            self._own = path.with_name(f"{path.stem}.{rank}of{ranks}{path.suffix}")
        assert self._own is not None
        refuse_other_than_folder(path.parent)
        refuse_other_than_file(self._own)  # opening a FIFO would wait for its reader
        self._lock = FileLock(self._own.with_name(f".{self._own.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self.reload()
            self._drop_cut_line(self._own)
            if not self._own.exists() or not self._own.stat().st_size:
                append_line(self._own, json.dumps(header_of(identity)))
            else:
                self._own.open("ab").close()  # refuse what cannot be written before any work
            self._journal = Journal(path, self._own, identity)
            for key in self._journal.units():
                if self.get(key) is not None:  # killed between its record and this
                    self._journal.drop(key)
        except Timeout as error:
            raise RunError(
                f"another sweep is writing to {self._own}: wait for it, or name another folder."
            ) from error
        except OSError as error:
            self._lock.release()
            raise RunError(
                f"cannot open the results file {path}: {error}; name another."
            ) from error
        except RunError:
            self._lock.release()
            raise

    def close(self) -> None:
        """Let others write."""
        if self.path is not None:
            self._lock.release()

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
                append_line(self._own, text)
                self._journal.drop(record.key)
            except OSError as error:
                raise self._no_room(error, len(self._records) - 1) from error
        return record

    def parts(self, key: str) -> Sequence[Record]:
        """What is finished of a unit that was cut off, as records of some prompts each."""
        return () if self._journal is None else self._journal.parts(key)

    def put_part(self, record: Record) -> None:
        """Keep what is finished of a unit under way; it may take a second to reach the disk."""
        self._on_journal(lambda journal: journal.add(record))

    def flush(self) -> None:
        """Have all parts on the disk before this returns."""
        self._on_journal(Journal.flush)

    def drop_parts(self, key: str) -> None:
        """Forget what is finished of a unit that is measured otherwise now."""
        self._on_journal(lambda journal: journal.drop(key))

    def _on_journal(self, do: Callable[[Journal], None]) -> None:
        if self._journal is None:
            return
        try:
            do(self._journal)
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

    def _drop_cut_line(self, path: Path) -> None:
        """Say so where a line was cut off; refuse a file whose only line is not the header's."""
        data = path.read_bytes() if path.exists() else b""
        header = json.dumps(header_of(self.identity)).encode()
        if data and b"\n" not in data and not header.startswith(data):
            check_header(path, data, self.identity)
        if cut := drop_cut_line(path):
            self.notes.append(
                f"{path}: the last line was cut off ({len(cut)} bytes), dropped and computed again"
            )
