"""Output folders: never overwritten unasked, never half-written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .errors import RunError

__all__ = ["new_folder", "refuse_taken"]


def refuse_taken(out: Path, overwrite: bool) -> None:
    """Raise RunError if `out` holds something and `overwrite` is off: before any work is done."""
    if not overwrite and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise RunError(f"{out} exists and is not empty: choose another folder or pass overwrite.")


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Generator[Path]:
    """Fill a folder beside `out`, then move it there: `out` is never half-written.

    Raises:
        RunError: `out` is taken and `overwrite` is off, or the disk refuses.
    """
    refuse_taken(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise RunError(f"cannot write to {out.parent}: {error}") from error
    try:
        yield staging
        staging.chmod(0o755)
        if out.is_dir():
            shutil.rmtree(out)
        elif out.exists():
            out.unlink()
        staging.rename(out)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error}; nothing was changed there.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
