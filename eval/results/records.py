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
from pathlib import Path
from typing import Any

from longctx.errors import RunError

from ..tasks.protocol import Observation

__all__ = [
    "Record",
    "check_header",
    "dump_record",
    "header_of",
    "load_record",
    "parts_of",
    "read_parts",
]

_VERSION = 2
_NUMBER = (int, float)
_OBSERVATION: dict[str, tuple[type, ...]] = {
    "length": (int,),
    "item": (str,),
    "cluster": (str,),
    "nll": _NUMBER,
    "targets": (int,),
    "correct": (bool, type(None)),
    "detail": (dict,),
}
_RECORD: dict[str, tuple[type, ...]] = {
    "key": (str,),
    "method": (str,),
    "task": (str,),
    "lengths": (list,),
    "tokens": (int,),
    "seconds": _NUMBER,
    "how": (str,),
    "observations": (list,),
    "failed": (str, type(None)),
    "per_token": (bool,),
}
"""Types that JSON gives for each field."""


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


def header_of(identity: Mapping[str, str]) -> dict[str, Any]:
    """The first line of a file with these digests of model and tokenizer."""
    return {"longctx": "results", "version": _VERSION, **identity}


def parts_of(path: Path) -> list[Path]:
    """The results file and those that further processes of the same sweep have written."""
    others = path.parent.glob(f"{path.stem}.*of*{path.suffix}")
    return [part for part in (path, *sorted(others)) if part.exists()]


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
        for key, record in _read_records(part, identity).items():
            known = found.get(key)
            if known is None or known.failed is not None or record.failed is None:
                found[key] = record
    return found


def _read_records(path: Path, identity: Mapping[str, str]) -> dict[str, Record]:
    """The records of one file by key, in the order of the file; of several the last counts.

    Raises:
        RunError: it belongs to another model or tokenizer, is not a results file, or is damaged.
        OSError: it cannot be read.
    """
    whole = path.read_bytes().rpartition(b"\n")[0]
    found: dict[str, Record] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            value: Any = json.loads(line)
            record = None if number == 1 else load_record(value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == 1:
                value, record = ascii(line[:60])[1:], None
            else:
                raise RunError(
                    f"{path}, line {number}, is not a result of a sweep ({error}): delete that "
                    "line, or name another results file."
                ) from error
        if record is None:
            check_header(path, value, identity)
        else:
            found[record.key] = record
    return found


def check_header(path: Path, found: Any, identity: Mapping[str, str]) -> None:
    """Refuse a first line that is not that of a results file with these digests.

    Raises:
        RunError: it names what was found.
    """
    wanted = header_of(identity)
    values: dict[str, Any] = found if isinstance(found, dict) else {}
    if any(values.get(key) != wanted[key] for key in ("longctx", "version")):
        raise RunError(
            f"{path} is not a results file of this release (first line {str(found)[:80]}): name "
            "another one."
        )
    for key, value in identity.items():
        if values.get(key) != value:
            raise RunError(
                f"{path} holds the results of another {key} ({values.get(key)}, this one is "
                f"{value}): name another file or folder, or delete it."
            )


def dump_record(record: Record) -> str:
    """Write a record as a line of JSON, which has no NaN and no infinity: both are null there."""
    value = dataclasses.asdict(record)
    for observation in value["observations"]:
        _null(observation)
        _null(observation["detail"])
    return json.dumps(value, allow_nan=False)


def _null(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[key] = None


def load_record(value: dict[str, Any]) -> Record:
    """Read a record from what JSON gives; a null is NaN.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: a field that is missing, unknown or of
            another type.
    """
    _check(value, _RECORD)
    observations: list[Observation] = []
    for fields in value["observations"]:
        if fields["nll"] is None:
            fields["nll"] = math.nan
        _check(fields, _OBSERVATION)
        for name in [key for key, found in fields["detail"].items() if found is None]:
            fields["detail"][name] = math.nan
        observations.append(Observation(**fields))
    value["lengths"] = tuple(value["lengths"])
    value["observations"] = tuple(observations)
    return Record(**value)


def _check(value: dict[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> None:
    for name, found in value.items():
        expected = kinds.get(name, ())
        if type(found) not in expected:  # True is not a number
            names = " or ".join(kind.__name__ for kind in expected) or "no such field"
            raise ValueError(f"{name} is {found!r:.40}, expected {names}")
