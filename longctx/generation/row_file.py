"""A file of generated rows that grows line by line, and goes on where an interrupted call was."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from ..append_only import AppendOnlyFile
from ..errors import RunError

__all__ = ["RowFile"]


class RowFile:
    """JSON lines, one a row in the order of the prompts, each with the settings it was made by.

    Args:
        path: the file, there or not. What a killed process left of a last line is dropped.
        settings: all that a row depends on beside its prompt, as JSON has it.
        prompts: short names of the prompts, by content, in order.

    Raises:
        RunError: the file holds rows of other settings or prompts, or other lines; it is a folder,
            device or FIFO; another process writes to it; or the disk refuses.
    """

    def __init__(self, path: Path, settings: dict[str, Any], prompts: list[str]) -> None:
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._prompts = prompts
        self._file = AppendOnlyFile(path, first='{"row": 0, ', holds="generated rows")
        try:
            for index, line in enumerate(self._file.lines()):
                self._check(index, line)
        except BaseException:
            self._file.close()
            raise

    @property
    def done(self) -> int:
        """Rows that are there."""
        return self._file.count

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()  # and so let others write

    def add(self, row: dict[str, Any]) -> None:
        """Write the next row, on the disk before this returns.

        Raises:
            RunError: the disk refuses.
        """
        known = {"row": self.done, "prompt_digest": self._prompts[self.done]}
        self._file.append(json.dumps({**known, **row, "settings": self._settings}))

    def tokens(self) -> list[list[int]]:
        """The token ids of all rows that are there.

        Raises:
            RunError: a row without them.
        """
        found: list[list[int]] = []
        for number, line in enumerate(self._file.lines(), 1):
            ids: Any = json.loads(line).get("token_ids")
            if not isinstance(ids, list) or not all(type(token) is int for token in ids):
                raise RunError(f"{self._file.path}:{number} holds no token_ids: name another file.")
            found.append(ids)
        return found

    def _check(self, index: int, line: bytes) -> None:
        where = f"{self._file.path}:{index + 1}"
        try:
            row: Any = json.loads(line)
            made, number, digest = row["settings"], row["row"], row["prompt_digest"]
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise RunError(f"{where} is not a generated row: name another file.") from error
        if number != index or index >= len(self._prompts) or digest != self._prompts[index]:
            raise RunError(
                f"{where} is row {number!r} of other prompts than those that were given: name "
                "another file."
            )
        if made != self._settings:
            keys = [*self._settings, *(made if isinstance(made, dict) else ())]
            of: dict[str, Any] = made if isinstance(made, dict) else {}
            key = next(k for k in keys if of.get(k, ...) != self._settings.get(k, ...))
            there = of.get(key)
            raise RunError(
                f"{where} was made with {key}={there!r}, and this run has "
                f"{self._settings.get(key)!r}: name another file, or run with the same."
            )
