"""The texts that tasks read, embedded or the user's files, and windows of them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.haystacks import Texts, bos_of, encode, held_out

__all__ = [
    "bos_before",
    "digest",
    "documents_of",
    "place_windows",
    "spread",
    "texts_of",
]


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


def place_windows(
    task: str, sizes: dict[str, int], size: int, windows: int
) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Windows as `spread` lays them, and a note where documents are left out.

    Args:
        task: its name, for the note.
        sizes: tokens of each document.
        size: tokens of a window.
        windows: at most so many.

    Raises:
        DataError: no document is long enough for one.
    """
    places = spread(sizes, size, windows)
    if not places:
        raise DataError(
            f"no document is long enough for a window of {size} tokens: the longest of "
            f"{len(sizes)} has {max(sizes.values())}. Ask for shorter lengths or pass longer texts "
            "(one document per file)."
        )
    short = sum(count < size for count in sizes.values())
    note = f"{task}: {short} of {len(sizes)} documents are shorter than {size} tokens and left out"
    return places, (note,) if short else ()


def bos_before(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> tuple[int, ...]:
    """What stands before each window: a BOS or nothing; None: as the tokenizer does with a text.

    Raises:
        DataError: a BOS is asked for and the tokenizer has none.
    """
    if bos is None:
        return bos_of(tokenizer)
    if not bos:
        return ()
    if not isinstance(tokenizer.bos_token_id, int):
        raise DataError("bos=True, but the tokenizer has no BOS: leave it out.")
    return (tokenizer.bos_token_id,)
