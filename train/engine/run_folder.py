"""The folder of a run: what it is, its log, its checkpoints and its models; resumed, never mixed.

    runs/x/run.json       what the run is: model, method, data, settings
    runs/x/log.jsonl      a line for every update and evaluation
    runs/x/checkpoints/   what it can be resumed from
    runs/x/adapter/       LoRA's weights, where there are any
    runs/x/model/         the model to serve

A run is gone on with by the same settings alone, and never overwritten.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from msgspec import Struct
from safetensors import SafetensorError, safe_open

from longctx.errors import RunError
from longctx.files import write_whole
from longctx.folders import refuse_other_than_file, refuse_other_than_folder
from longctx.schema import conform, parse

__all__ = ["WHOLE", "RunFolder", "last_whole"]

_FORMAT = 2  # of run.json; counted up when settings get other names
WHOLE = "whole"
"""An empty file that the last thing written to a checkpoint leaves there."""


_LOCK = ".lock"
_ELSEWHERE = "Choose another folder."


class _TrainerState(Struct):
    """What a checkpoint's trainer_state.json holds at least."""

    global_step: int
    max_steps: int
    train_batch_size: int | None
    log_history: list[dict[str, Any]]


class _Run(Struct):
    """What every run.json holds beside the settings."""

    model: str
    weights: str
    """Their digest."""
    method: str


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that holds one run."""

    path: Path
    lock: FileLock | None = field(default=None, compare=False)
    """Held by the process that writes, until `close`; the system releases it after a kill."""

    @classmethod
    def open(cls, path: Path, record: Mapping[str, Any], *, resume: bool, first: bool) -> RunFolder:
        """Begin a run in a new folder, or go on with the one that is there.

        Args:
            path: the folder.
            record: what the run is, as JSON; a run is resumed with the same alone.
            resume: whether it may be there already.
            first: whether this process writes for all.

        Raises:
            RunError: the folder holds something else, another run, or this one and `resume` is
                off; another process writes to it; or it cannot be written.
        """
        wanted = json.loads(json.dumps({"format": _FORMAT, **record}))
        cls.refuse(path, resume=resume or not first)
        folder = cls(path, _locked(path) if first else None)
        try:
            cls.refuse(path, resume=resume or not first)  # again: another may have been faster
            if folder.run.is_file() and (folder._begun or not first):
                folder._refuse_other(wanted)
            elif first:
                text = json.dumps(wanted, indent=1, ensure_ascii=False) + "\n"
                write_whole(folder.run, lambda part: part.write_text(text, encoding="utf-8"))
        except OSError as error:
            folder.close()
            raise RunError(f"cannot write to {path}: {error}") from error
        except RunError:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        """Let others write."""
        if self.lock is not None:
            self.lock.release()

    @classmethod
    def refuse(cls, path: Path, *, resume: bool) -> None:
        """Refuse what `open` would whatever the run: before work is done.

        Raises:
            RunError: see there.
        """
        folder = cls(path)
        refuse_other_than_folder(path)
        try:
            there = {one.name for one in path.iterdir()} if path.is_dir() else set[str]()
        except OSError as error:
            raise RunError(f"cannot look into {path}: {error}. {_ELSEWHERE}") from error
        for place in (folder.checkpoints, folder.model, folder.unchecked, folder.adapter):
            refuse_other_than_folder(place)
        for place in (folder.run, folder.log, path / _LOCK):
            refuse_other_than_file(place)
        if there - {_LOCK} and not folder.run.is_file():
            raise RunError(f"{path} holds something that is not a run: choose another folder.")
        if folder.run.is_file():
            folder.read()  # of something else it is not ours to write over
        if folder.model.exists():
            raise RunError(
                f"{path} is finished: its model is {folder.model}. Choose another folder."
            )
        if folder.run.is_file() and folder._begun and not resume:
            raise RunError(
                f"{path} holds a run already: pass resume (--resume) to go on with it, or choose "
                "another folder."
            )

    @property
    def _begun(self) -> bool:
        """Whether anything was learnt: a run that was refused leaves run.json alone."""
        return any(path.name not in (self.run.name, _LOCK) for path in self.path.iterdir())

    def _refuse_other(self, wanted: dict[str, Any]) -> None:
        there = self.read()
        names = [n for n in sorted({*there, *wanted}) if there.get(n) != wanted.get(n)]
        # Where weights and data came from may change: their contents are compared.
        names = [n for n in names if not (n == "model" or (n == "data" and "content" in wanted))]
        if names:
            said = "; ".join(f"{n}: {there.get(n)} there, {wanted.get(n)} here" for n in names)
            raise RunError(
                f"{self.path} holds another run ({said}): ask for the same, or choose another "
                "folder."
            )

    def read(self) -> dict[str, Any]:
        """What run.json says.

        Raises:
            RunError: it is damaged.
        """
        try:
            text = self.run.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{self.run}: cannot be read ({error}). {_ELSEWHERE}") from error
        found: dict[str, Any] = parse(text, dict, self.run, next_step=_ELSEWHERE)
        if found.get("format") != _FORMAT:
            raise RunError(
                f"{self.path} holds a run of another version of longctx, whose settings have other "
                "names: finish it with that version, or choose another folder."
            )
        conform(found, _Run, self.run, next_step=_ELSEWHERE)
        return found

    @property
    def run(self) -> Path:
        """What the run is."""
        return self.path / "run.json"

    @property
    def log(self) -> Path:
        """A line for every update and evaluation."""
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """What it can be resumed from."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The model to serve."""
        return self.path / "model"

    @property
    def unchecked(self) -> Path:
        """The model before it was looked at again."""
        return self.path / "model-unchecked"

    @property
    def adapter(self) -> Path:
        """LoRA's weights."""
        return self.path / "adapter"

    def last_checkpoint(self, *, first: bool) -> Path | None:
        """The latest whole checkpoint; what was not written to its end is removed.

        Raises:
            RunError: it is damaged.
        """
        if first:
            for path in self.checkpoints.glob("checkpoint-*"):
                if not (path / WHOLE).exists():
                    shutil.rmtree(path)
            for name in (self.adapter.name, self.unchecked.name):
                for path in self.path.glob(f".{name}-*"):  # a kill while it was written
                    shutil.rmtree(path)
            if self.unchecked.exists():  # a kill before it was looked at
                shutil.rmtree(self.unchecked)
        last = last_whole(self.checkpoints)
        if last is not None:
            _refuse_damaged(last)
        return last


def _locked(path: Path) -> FileLock:
    """Take the folder's lock, which is a file in it.

    Raises:
        RunError: another process has it, or the folder cannot be written.
    """
    lock = FileLock(path / _LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(
            f"another process is writing to the run in {path}: wait for it, or choose another "
            "folder."
        ) from error
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error}") from error
    return lock


def _refuse_damaged(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files changed after they were written.

    Raises:
        RunError: it names the file, and what to do.
    """
    next_step = f"Delete {checkpoint}: the run then goes on from the checkpoint before it."
    state = checkpoint / "trainer_state.json"
    try:
        refuse_other_than_file(state)
        text = state.read_bytes()
    except OSError as error:
        raise RunError(f"{state} cannot be read ({error}). {next_step}") from error
    parse(text, _TrainerState, state, next_step=next_step)
    for weights in checkpoint.glob("*.safetensors"):
        try:
            with safe_open(weights, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise RunError(f"{weights} is damaged ({error}). {next_step}") from error


def last_whole(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{WHOLE}")]
    found = [path for path in found if path.name.rpartition("-")[2].isdecimal()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
