"""The results file: append-only JSON lines, so that a run that was cut off goes on where it was.

The first line names model and tokenizer. Each further one is a unit of work under the digest of
all that it depends on; of several under one key the last counts. Failed units are tried again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.errors import RunError

from .task import Observation

__all__ = ["Record", "Store"]

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """What one unit of work gave."""

    key: str
    """Digest of model, method, tokenizer, task and unit."""
    method: str
    task: str
    lengths: tuple[int, ...]
    tokens: int
    """Forwarded."""
    seconds: float
    observations: tuple[Observation, ...]
    failed: str | None = None
    """Why there are no observations."""


class Store:
    """Records by key, in memory and, with a path, in a file."""

    def __init__(self, path: Path | None, identity: dict[str, str]) -> None:
        """Open or create the file.

        Args:
            path: of the JSON lines; None keeps the records in memory only.
            identity: what the whole file belongs to ("model", "tokenizer": digests).

        Raises:
            RunError: the file belongs to another model or tokenizer, is no results file, is
                damaged elsewhere than at its end, or cannot be read or written.
        """
        self.path = path
        self.identity = identity
        self.notes: list[str] = []
        self._records: dict[str, Record] = {}
        if path is None:
            return
        header = {"longctx": "results", "version": _VERSION, **identity}
        try:
            if path.exists() and path.stat().st_size:
                self._read(path, header)
            if not path.exists() or not path.stat().st_size:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._append(header)
            else:
                path.open("ab").close()  # refuse a file that cannot be written before any work
        except OSError as error:
            raise RunError(
                f"cannot open the results file {path}: {error}; name another."
            ) from error

    def get(self, key: str) -> Record | None:
        """The record under `key` unless it failed: what failed is worth another try."""
        record = self._records.get(key)
        return record if record is not None and record.failed is None else None

    def put(self, record: Record) -> Record:
        """Keep a record, on the disk before this returns; returns it as it will be read back."""
        text = _dump(record)
        record = _load(json.loads(text))
        self._records[record.key] = record
        if self.path is not None:
            try:
                self._append(json.loads(text))
            except OSError as error:
                raise RunError(
                    f"cannot write to {self.path}: {error}. Make room; the same call then goes on "
                    f"from the {len(self._records) - 1} results that are in there."
                ) from error
        return record

    def _append(self, value: dict[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("ab") as file:
            file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        data = path.read_bytes()
        whole, _, cut = data.rpartition(b"\n")
        if cut:  # every complete record ends in a newline
            os.truncate(path, len(data) - len(cut))
            self.notes.append(
                f"{path}: the last line was cut off ({len(cut)} bytes), dropped and computed again"
            )
        lines = whole.split(b"\n") if whole else []
        for number, line in enumerate(lines, 1):
            try:
                value: dict[str, Any] = json.loads(line)
                if number == 1:
                    _check_header(path, value, header)
                else:
                    record = _load(value)
                    self._records[record.key] = record
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, RunError):
                    raise
                raise RunError(
                    f"{path}, line {number}, is no result of a sweep ({error}): delete that line, "
                    "or name another results file."
                ) from error


def _check_header(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found.get("longctx") != "results" or found.get("version") != _VERSION:
        raise RunError(
            f"{path} is no results file of this release (first line {str(found)[:80]}): name "
            "another one."
        )
    for key, value in wanted.items():
        if found.get(key) != value:
            raise RunError(
                f"{path} holds the results of another {key} ({found.get(key)}, this one is "
                f"{value}): name another file or folder, or delete it."
            )


def _dump(record: Record) -> str:
    value = dataclasses.asdict(record)
    for observation in value["observations"]:
        _null(observation)
        _null(observation["detail"])
    return json.dumps(value, allow_nan=False)


def _null(values: dict[str, Any]) -> None:
    """JSON has no NaN and no infinity: both are null there, and NaN when read back."""
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[key] = None


def _load(value: dict[str, Any]) -> Record:
    observations: list[Observation] = []
    for fields in value["observations"]:
        for name in [key for key, found in fields["detail"].items() if found is None]:
            fields["detail"][name] = math.nan
        if fields["nll"] is None:
            fields["nll"] = math.nan
        observations.append(Observation(**fields))
    value["lengths"] = tuple(value["lengths"])
    value["observations"] = tuple(observations)
    return Record(**value)
