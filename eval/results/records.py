"""The lines of a results file: a header that names model and tokenizer, then a record each.

Reading takes no lock and mends nothing, so that a sweep that is still writing is not disturbed;
what stands after the last newline is being written, or was cut off, and is left alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from longctx.errors import RunError
from longctx.folders import refuse_other_than_file
from longctx.schema import parse

from ..tasks.shared.protocol import Observation
from .schemas import ResultsHeader, StoredObservation, StoredRecord

__all__ = [
    "Record",
    "check_header",
    "dump_record",
    "header_of",
    "load_record",
    "parts_of",
    "read_parts",
    "read_records",
]

_VERSION = 2
_NEXT = "Delete that line, or name another results file."


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
    how: str
    """How prompts or windows were run."""
    observations: tuple[Observation, ...]
    failed: str | None = None
    """Why there are no observations."""
    per_token: bool = False
    """Whether the scores of single tokens lie in `tokens/KEY.parquet`."""
    cache_bytes: int | None = None
    """See `Measured`."""


def header_of(identity: Mapping[str, str]) -> dict[str, Any]:
    """The first line of a file with these digests of model and tokenizer."""
    return {"longctx": "results", "version": _VERSION, **identity}


def parts_of(path: Path) -> list[Path]:
    """The results file and those that further processes of the same sweep have written.

    Raises:
        RunError: one is not a file: reading a FIFO would wait for its writer.
    """
    others = path.parent.glob(f"{escape(path.stem)}.*of*{escape(path.suffix)}")
    found = [part for part in (path, *sorted(others)) if part.exists()]
    for part in found:
        refuse_other_than_file(part)
    return found


def read_parts(path: Path, identity: Mapping[str, str]) -> dict[str, Record]:
    """The records of a results file and its parts by key.

    Of several in one file the last counts. A process that failed does not hide what another found.

    Raises:
        RunError: a file of another model or tokenizer, or one that is not a results file or
            damaged.
        OSError: one cannot be read.
    """
    found: dict[str, Record] = {}
    for part in parts_of(path):
        for key, record in {one.key: one for one in read_records(part, identity)}.items():
            known = found.get(key)
            if known is None or known.failed is not None or record.failed is None:
                found[key] = record
    return found


def read_records(path: Path, identity: Mapping[str, str]) -> list[Record]:
    """The records of one file in its order.

    Raises:
        RunError: it belongs to another model or tokenizer, is not a results file, or is damaged.
        OSError: it cannot be read.
    """
    whole = path.read_bytes().rpartition(b"\n")[0]
    lines = whole.split(b"\n") if whole else []
    for line in lines[:1]:
        check_header(path, line, identity)
    return [load_record(line, f"{path}, line {n}") for n, line in enumerate(lines[1:], 2)]


def check_header(path: Path, line: bytes, identity: Mapping[str, str]) -> None:
    """Refuse a first line that is not that of a results file with these digests.

    Raises:
        RunError: it names what was found.
    """
    where, next_step = f"{path}, line 1", "It is not a results file of this release: name another."
    parse(line, ResultsHeader, where, next_step=next_step)
    found: dict[str, Any] = json.loads(line)
    for key, value in identity.items():
        if found.get(key) != value:
            raise RunError(
                f"{path} holds the results of another {key} ({found.get(key)}, this one is "
                f"{value}): name another file or folder, or delete it."
            )


def dump_record(record: Record) -> str:
    """Write a record as a line of JSON, which has no NaN and no infinity: both are null there."""
    value = dataclasses.asdict(record)
    if record.cache_bytes is None:
        del value["cache_bytes"]
    for observation in value["observations"]:
        _null(observation)
        _null(observation["detail"])
    return json.dumps(value, allow_nan=False)


def _null(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[key] = None


def load_record(line: str | bytes, where: str) -> Record:
    """Read a record from its line; a null is NaN.

    Args:
        line: the JSON.
        where: the file and the number of the line, for the error.

    Raises:
        RunError: no JSON, or a field that is missing, unknown or of another type.
    """
    stored = parse(line, StoredRecord, where, next_step=_NEXT)
    return Record(
        key=stored.key,
        method=stored.method,
        task=stored.task,
        lengths=tuple(stored.lengths),
        tokens=stored.tokens,
        seconds=stored.seconds,
        how=stored.how,
        observations=tuple(map(_observation, stored.observations)),
        failed=stored.failed,
        per_token=stored.per_token,
        cache_bytes=stored.cache_bytes,
    )


def _observation(stored: StoredObservation) -> Observation:
    return Observation(
        length=stored.length,
        item=stored.item,
        cluster=stored.cluster,
        nll=math.nan if stored.nll is None else stored.nll,
        targets=stored.targets,
        correct=stored.correct,
        detail={k: math.nan if v is None else v for k, v in stored.detail.items()},
    )
