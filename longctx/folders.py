"""Output folders: never overwritten unasked, never half-written, never the input.

A folder is filled beside its place, as `.NAME-….part`, and then put there in one step. A process
that is killed leaves that folder behind, or, where the system cannot exchange two folders, at worst
the old one as `.NAME-old-….part`. The next one that writes to the place puts the old one back and
names the rest.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import RunError

__all__ = [
    "left_over",
    "new_folder",
    "refuse_inputs",
    "refuse_inside",
    "refuse_other_than_file",
    "refuse_other_than_folder",
    "refuse_taken",
    "refuse_taken_file",
]

_log = logging.getLogger(__name__)
_PART = ".part"
_CHECKPOINT = (
    "config.json", "generation_config.json", "adapter_config.json", "preprocessor_config.json",
    "processor_config.json", "model*.safetensors", "model*.safetensors.index.json",
    "adapter_model.*", "pytorch_model*.bin", "pytorch_model.bin.index.json", "training_args.bin",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.tiktoken",
    "sentencepiece*.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates", "configuration_*.py", "modeling_*.py", "tokenization_*.py",
    "README.md", "LICENSE*", "NOTICE*", "USE_POLICY.md", ".gitattributes",
)  # fmt: skip
"""Names of all files that a checkpoint may have."""
_SHOWN = 3  # names in a message

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFREG: "file",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def _refuse_other_than(expected: str, out: Path) -> None:
    link = ""
    try:
        link = "link to a " if out.is_symlink() else ""
        kind = _KINDS.get(stat.S_IFMT(out.stat().st_mode), "special file")
    except FileNotFoundError:
        kind = "missing file" if link else expected
    except (OSError, ValueError) as error:
        raise RunError(f"cannot write to {out}: {error}. Name another.") from error
    if kind != expected:
        raise RunError(
            f"{out} is a {link}{kind}, which longctx does not write to or replace: expected a "
            f"{expected}, or a name that is free. Name another."
        )


def refuse_other_than_folder(out: Path) -> None:
    """Refuse an output folder whose name a file, device, FIFO, socket or a link to one has.

    Raises:
        RunError: it has, it is a link to nothing, or it cannot be looked at.
    """
    _refuse_other_than("folder", out)


def refuse_other_than_file(out: Path) -> None:
    """Refuse an output file whose name a folder, device, FIFO, socket or a link to one has.

    Raises:
        RunError: it has, it is a link to nothing, or it cannot be looked at.
    """
    _refuse_other_than("file", out)


def refuse_taken_file(
    out: Path, overwrite: bool, *, inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Refuse an output file that is there already or has no folder: before any work is done.

    Args:
        out: the file to be written.
        overwrite: whether one that is there may be replaced.
        inputs: what is read; see `refuse_inputs`.

    Raises:
        RunError: it is there and `overwrite` is off, is an input, or is not a file.
    """
    refuse_other_than_file(out)
    if not out.absolute().parent.is_dir():
        raise RunError(f"the folder of {out} does not exist: make it first.")
    if out.exists() and not overwrite:
        raise RunError(f"{out} exists: name another file, or pass --overwrite.")
    refuse_inputs(out, inputs)


def refuse_inputs(out: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse an output that is one of the inputs or holds one, also by way of links.

    Args:
        out: a file or folder, there or not.
        inputs: files and folders; what does not exist (a hub id) is passed over.

    Raises:
        RunError: it is, or does.
    """
    if not out.exists():
        return
    for source in inputs:
        for real in _real_places(Path(source)):
            if any(os.path.samefile(out, place) for place in (real, *real.parents)):
                raise RunError(
                    f"{out} is or holds the input {source}, which would be lost: choose another "
                    "output."
                )


def refuse_inside(out: Path, source: str | os.PathLike[str]) -> None:
    """Refuse results that would be written into the checkpoint that they are of.

    Raises:
        RunError: `out` is the folder `source`, or inside it.
    """
    folder, place = Path(source), Path(os.path.realpath(out))
    if folder.is_dir() and place.is_relative_to(folder.resolve()):
        raise RunError(
            f"{out} is the input {source}, or inside it: a checkpoint holds no results, choose "
            "another output."
        )


def _real_places(source: Path) -> list[Path]:
    """Where an input lies, and where the links in its folder point."""
    try:
        links = [p for p in source.iterdir() if p.is_symlink()] if source.is_dir() else []
        return [path.resolve() for path in (source, *links) if path.exists()]
    except OSError:  # what cannot be read is said when it is
        return []


def refuse_taken(
    out: Path, overwrite: bool, *, inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Refuse to replace what was not made by this program: before any work is done.

    Args:
        out: the folder to be written.
        overwrite: whether a checkpoint there may be replaced.
        inputs: what is read; see `refuse_inputs`.

    Raises:
        RunError: `out` holds something and `overwrite` is off, or files that no checkpoint has, or
            an input, or is not a folder.
    """
    refuse_other_than_folder(out)
    _put_back(out)
    try:
        if not out.exists() or not any(out.iterdir()):
            return
        if overwrite:
            refuse_inputs(out, inputs)
            _refuse_other_than_checkpoint(out)
    except OSError as error:
        raise RunError(f"cannot look into {out}: {error}. Name another.") from error
    if not overwrite:
        raise RunError(f"{out} exists and is not empty: choose another folder or pass overwrite.")


def _refuse_other_than_checkpoint(out: Path) -> None:
    way_out = "overwriting would delete all that is there: choose another folder."
    if not (_has(out / "config.json", "model_type") or _has(out / "adapter_config.json", "peft")):
        raise RunError(
            f"{out} is not a checkpoint folder (no config.json of a model in it), and {way_out}"
        )
    foreign = sorted(path.name for path in out.iterdir() if not _of_checkpoint(path))
    if foreign:
        shown = ", ".join(foreign[:_SHOWN]) + (", …" if len(foreign) > _SHOWN else "")
        raise RunError(f"{out} holds {shown}, which no checkpoint has, and {way_out}")


def _has(path: Path, start: str) -> bool:
    """Whether a file is a JSON object with a key that starts so, and a name under it."""
    if not path.is_file():
        return False
    try:
        value: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and any(
        key.startswith(start) and isinstance(name, str) for key, name in value.items()
    )


def _of_checkpoint(path: Path) -> bool:
    named = any(fnmatchcase(path.name, pattern) for pattern in _CHECKPOINT)
    if path.name == "additional_chat_templates" and path.is_dir() and not path.is_symlink():
        return all(inner.suffix == ".jinja" and inner.is_file() for inner in path.iterdir())
    return named and path.is_file()


@contextmanager
def new_folder(
    out: Path, *, overwrite: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Generator[Path]:
    """Fill a folder beside `out`, then put it in its place: `out` is never half-written.

    Args:
        out: the folder's place.
        overwrite: replace the checkpoint that is there.
        inputs: what is read; see `refuse_inputs`.

    Raises:
        RunError: `out` is taken and `overwrite` is off, holds something else than a checkpoint, or
            the disk refuses.
    """
    refuse_taken(out, overwrite, inputs=inputs)
    out = Path(os.path.realpath(out))  # "." and links have a parent and a name of their own
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in left_over(out):
            _log.warning("%s was left by a run that was killed: delete it.", path)
        prefix = f".{out.name}-"
        staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=_PART, dir=out.parent))
    except OSError as error:
        raise RunError(f"cannot write to {out.parent}: {error}") from error
    with _held(staging):
        try:
            yield staging
            staging.chmod(0o755)
            for path in staging.rglob("*"):  # safetensors leaves weights that nobody else may read
                path.chmod(0o755 if path.is_dir() else 0o644)
            refuse_taken(out, overwrite)  # again: another process may have been faster
            _replace(out, staging)
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot write {out}: {error}. Make room, or name another.") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _replace(out: Path, staging: Path) -> None:
    """Put a new folder in its place; what was there is in `staging` then, or deleted."""
    if not out.exists() or not any(out.iterdir()):
        staging.rename(out)
        return
    if _exchange(staging, out):
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", suffix=_PART, dir=out.parent))
    with _held(out):  # the lock goes along to the new name
        out.rename(old)
        try:
            staging.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system cannot."""
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextmanager
def _held(folder: Path) -> Generator[None]:
    """Hold a lock on a folder, which the system releases whatever becomes of this process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open folder; False if another process holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def left_over(out: Path) -> list[Path]:
    """Folders beside `out` that a killed process left there; the old `out` is `.NAME-old-….part`.

    Raises:
        OSError: the folder above cannot be read.
    """
    found: list[Path] = []
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else ():
        if fnmatchcase(path.name, f".{_escaped(out.name)}-*{_PART}") and path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                if _lock(handle):
                    found.append(path)
            finally:
                os.close(handle)
    return found


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _put_back(out: Path) -> None:
    """Put the old folder back where a process was killed between moving it aside and the new in."""
    out = Path(os.path.realpath(out))
    if out.exists():
        return
    try:
        old = [path for path in left_over(out) if path.name.startswith(f".{out.name}-old-")]
        whole = [path for path in old if any(path.iterdir())]
        if whole:
            latest = max(whole, key=lambda path: path.stat().st_ctime)
            latest.rename(out)
            _log.warning("%s: a run was killed while it was replaced; the old one is back.", out)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error}. Name another.") from error
