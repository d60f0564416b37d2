"""The losses of a search as JSON lines, so that one that was cut off goes on where it was."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from longctx.errors import RunError
from longctx.fingerprint import json_digest
from longctx.folders import refuse_other_than_file, refuse_other_than_folder

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
        self._path = path
        self._losses: dict[str, float] = {}
        if path is None:
            return
        refuse_other_than_folder(path.parent)
        refuse_other_than_file(path)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"another search writes to {path}: wait, or name another.") from error
        except OSError as error:
            raise RunError(f"cannot write to {path}: {error}. Name another --out.") from error
        try:
            self._read(path, json.loads(json.dumps(header)))
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Evaluations:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._path is not None:
            self._lock.release()

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
        self._append(
            {
                "key": key,
                "prompts": prompts,
                "divisors": candidate.values,
                "attention_factor": candidate.attention_factor,
                "loss": loss if math.isfinite(loss) else None,
            }
        )

    def _append(self, entry: dict[str, Any]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write to {self._path}: {error}. Make room; the same command then goes on."
            ) from error

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a last line without an end was cut off
        if not whole:
            if data and not data.startswith(b'{"search"'):
                raise RunError(f"{path} is not a file of evaluations: name another --out.")
            path.write_bytes(b"")
            self._append({"search": header})
            return
        first, *rest = whole.splitlines()
        try:
            made: Any = json.loads(first)["search"]
            found = [json.loads(line) for line in rest]
            losses = {one["key"]: _loss(one["loss"]) for one in found}
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
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        self._losses = losses


def _loss(value: Any) -> float:
    return math.inf if value is None else float(value)


def _key(candidate: Divisors, prompts: str) -> str:
    return json_digest([candidate.values, candidate.attention_factor, prompts])
