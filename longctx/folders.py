"""Output folders: never overwritten unasked, never half-written."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import RunError

__all__ = ["new_folder", "refuse_other_than_file", "refuse_other_than_folder", "refuse_taken"]

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFREG: "file",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def _refuse_other_than(expected: str, out: Path) -> None:
    link = "link to a " if out.is_symlink() else ""
    try:
        kind = _KINDS.get(stat.S_IFMT(out.stat().st_mode), "special file")
    except FileNotFoundError:
        kind = "missing file" if link else expected
    except OSError as error:
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


def refuse_taken(out: Path, overwrite: bool) -> None:
    """Refuse to replace what was not made by this program: before any work is done.

    Raises:
        RunError: `out` holds something and `overwrite` is off, or something else than a checkpoint,
            or is not a folder.
    """
    refuse_other_than_folder(out)
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise RunError(f"{out} exists and is not empty: choose another folder or pass overwrite.")
    if not (out / "config.json").is_file():
        raise RunError(
            f"{out} is not a checkpoint folder (no config.json in it), and overwriting would "
            "delete all that is there: choose another folder."
        )


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Generator[Path]:
    """Fill a folder beside `out`, then put it in its place: `out` is never half-written.

    Raises:
        RunError: `out` is taken and `overwrite` is off, holds something else than a checkpoint, or
            the disk refuses.
    """
    refuse_taken(out, overwrite)
    out = Path(os.path.realpath(out))  # "." and links have a parent and a name of their own
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise RunError(f"cannot write to {out.parent}: {error}") from error
    try:
        yield staging
        staging.chmod(0o755)
        for path in staging.rglob("*"):  # safetensors leaves weights that nobody else may read
            path.chmod(0o755 if path.is_dir() else 0o644)
        _replace(out, staging, overwrite)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {out}: {error}. Make room, or name another.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(out: Path, staging: Path, overwrite: bool) -> None:
    """Move the old aside, the new in, and only then delete the old."""
    refuse_taken(out, overwrite)  # again: another process may have been faster
    if not out.exists():
        staging.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent)) / out.name
    out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        old.rename(out)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)
