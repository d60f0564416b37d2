"""Files of test cases: JSON lines, with what is wrong in them said by line."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from longctx.errors import DataError

__all__ = ["records_of"]


@lru_cache(maxsize=8)
def records_of(file: str) -> tuple[tuple[int, dict[str, Any]], ...]:
    """The records of a JSON-lines file, each with the number of its line; blank lines are skipped.

    Raises:
        DataError: not there, empty, or a line that is not a JSON object of Unicode text.
    """
    path = Path(file)
    if path.exists() and not path.is_file():  # reading a FIFO would wait for its writer
        raise DataError(f"{file} is not a regular file: pass JSON lines.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start}): pass JSON lines."
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; pass JSON lines.") from error
    if not text.strip():
        raise DataError(f"{file} is empty: fetch it again.")
    lines = text.rstrip().split("\n")
    records: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            cut_off = number == len(lines) and not text.endswith("\n")
            raise DataError(
                f"{file}:{number} breaks off: fetch the file again, or delete that line."
                if cut_off
                else f"{file}:{number} is not JSON ({error.msg}, column {error.colno}): pass JSON "
                "lines, one test case each."
            ) from error
        except (ValueError, RecursionError) as error:  # an endless number, or too deep
            raise DataError(f"{file}:{number} cannot be read ({error}): mend that line.") from error
        if not isinstance(record, dict):
            raise DataError(f"{file}:{number} is {record!r:.40}: expected a JSON object.")
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{file}:{number} has half a character ({error.object[error.start]!r}), which is "
                "not Unicode text: write it as a pair of \\u escapes, or leave it out."
            ) from error
        records.append((number, cast(dict[str, Any], record)))
    return tuple(records)
