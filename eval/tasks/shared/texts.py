"""The texts that tasks read, embedded or the user's files, and windows of them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.haystacks import Texts, encode, held_out

__all__ = ["digest", "documents_of", "spread", "texts_of"]


def texts_of(paths: str | tuple[str, ...]) -> Texts:
    """One document per file, of folders all files; the embedded texts if no path is given.

    Raises:
        DataError: a path that is not there, or a file that is empty or no UTF-8 text.
    """
    if not paths:
        return held_out()
    if isinstance(paths, str):
        paths = (paths,)
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
        elif path.is_file():
            files.append(path)
        else:
            why = "is not a regular file" if path.exists() else "does not exist"
            raise DataError(f"{path} {why}: expected a text file or a folder of them.")
    if not files:
        raise DataError(f"{', '.join(paths)}: no files in there; expected text files.")
    state = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _texts(state, Path(paths[0]).name or "texts")


@lru_cache(maxsize=8)
def _texts(state: tuple[tuple[str, int, int], ...], name: str) -> Texts:
    """Read files that have this time and size: one that is edited is read again."""
    return Texts(tuple(_read(Path(file)) for file, _, _ in state), name=name)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): pass plain text files only."
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
    if "\0" in text:
        raise DataError(f"{path} holds NUL bytes: it is binary. Pass plain text files only.")
    if not text.strip():
        raise DataError(f"{path} is empty: pass files with text, or leave it out.")
    return text


def digest(text: str) -> str:
    """A short name for a text by its content."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=4)
def documents_of(tokenizer: PreTrainedTokenizerBase, texts: Texts) -> dict[str, tuple[int, ...]]:
    """Token ids of each document by the digest of its text; a repeated one counts once."""
    return {digest(text): encode(tokenizer, text) for text in texts.documents}


def spread(sizes: dict[str, int], size: int, windows: int) -> list[tuple[str, int]]:
    """(document, first token) of at most `windows` windows that do not overlap.

    Every document gets its first window before any gets a second; those of one document lie
    evenly over it.
    """
    room = {name: length // size for name, length in sizes.items()}
    counts = dict.fromkeys(sizes, 0)
    left = min(windows, sum(room.values()))
    while left:
        for name in sizes:
            if left and counts[name] < room[name]:
                counts[name] += 1
                left -= 1
    return [
        (name, j * (sizes[name] // count)) for name, count in counts.items() for j in range(count)
    ]
