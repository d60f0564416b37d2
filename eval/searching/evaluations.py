"""The losses of a search as JSON lines, so that one that was cut off goes on where it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from longctx.append_only import AppendOnlyFile
from longctx.errors import RunError
from longctx.fingerprint import json_digest

from .evolution import Divisors

__all__ = ["Evaluations"]


class Evaluations:
    """Losses by candidate and prompts, on the disk as soon as they are known.

    Args:
        path: the file, there or not; None keeps them in memory only.
        header: what they depend on (model, target, settings), as JSON has it.

    Raises:
        RunError: the file is of another search, is not such a file, is being written, or the disk
            refuses.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self._losses: dict[str, float] = {}
        self._file: AppendOnlyFile | None = None
        if path is None:
            return
        self._file = AppendOnlyFile(path, first='{"search"', holds="evaluations")
        try:
            self._read(self._file, json.loads(json.dumps(header)))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Evaluations:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, candidate: Divisors, prompts: str) -> float | None:
        """The loss on these prompts, None where it is not known."""
        return self._losses.get(_key(candidate, prompts))

    def put(self, candidate: Divisors, prompts: str, loss: float) -> None:
        """Keep a loss, on the disk before this returns.

        Raises:
            RunError: the disk refuses.
        """
        key = _key(candidate, prompts)
        self._losses[key] = loss
        if self._file is not None:
            entry = {
                "key": key,
                "prompts": prompts,
                "divisors": candidate.values,
                "attention_factor": candidate.attention_factor,
                "loss": loss if math.isfinite(loss) else None,
            }
            self._file.append(json.dumps(entry))

    def _read(self, file: AppendOnlyFile, header: dict[str, Any]) -> None:
        if not file.count:
            file.append(json.dumps({"search": header}))
            return
        path = file.path
        first, *rest = file.lines()
        try:
            made: Any = json.loads(first)["search"]
            found = [json.loads(line) for line in rest]
            self._losses = {one["key"]: _loss(one["loss"]) for one in found}
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise RunError(
                f"{path} is damaged, or not a file of evaluations ({error!r}): name another --out."
            ) from error
        if made != header:
            kinds = (made if isinstance(made, dict) else {}, header)
            key = next(k for k in {**kinds[0], **header} if kinds[0].get(k) != header.get(k))
            raise RunError(
                f"{path} is of a search with {key}={kinds[0].get(key)!r}, this one has "
                f"{header.get(key)!r}: name another --out."
            )


def _loss(value: Any) -> float:
    return math.inf if value is None else float(value)


def _key(candidate: Divisors, prompts: str) -> str:
    return json_digest([candidate.values, candidate.attention_factor, prompts])
