"""The results file: append-only JSON lines, so that a run that was cut off goes on where it was.

The first line names model and tokenizer. Each further one is a unit of work under the digest of
all that it depends on; of several under one key the last counts. Failed units are tried again.
Scores of single tokens lie beside it, a parquet file per unit in the folder `tokens`.

One process writes to a file. Several that share a sweep (`torchrun`) have a file each, named after
the common one, and read all of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from longctx.errors import RunError
from longctx.folders import refuse_other_than_file, refuse_other_than_folder

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
                self._append(header_of(identity))
            else:
                self._own.open("ab").close()  # refuse what cannot be written before any work
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
        record = load_record(json.loads(text))
        self._records[record.key] = record
        if self.path is not None:
            try:
                if per_token is not None:
                    self._write_tokens(record.key, per_token)
                self._append(json.loads(text))
            except OSError as error:
                raise RunError(
                    f"cannot write to {self.path.parent}: {error}. Make room; the same call then "
                    f"goes on from the {len(self._records) - 1} results that are in there."
                ) from error
        return record

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

    def _append(self, value: dict[str, Any]) -> None:
        assert self._own is not None
        with self._own.open("ab") as file:
            file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _drop_cut_line(self, path: Path) -> None:
        """Drop what was being written when a run was cut off: complete lines end in a newline."""
        data = path.read_bytes() if path.exists() else b""
        whole, _, cut = data.rpartition(b"\n")
        if not cut:
            return
        if not whole and not json.dumps(header_of(self.identity)).encode().startswith(cut):
            check_header(path, cut.decode(errors="replace"), self.identity)
        os.truncate(path, len(data) - len(cut))
        self.notes.append(
            f"{path}: the last line was cut off ({len(cut)} bytes), dropped and computed again"
        )
