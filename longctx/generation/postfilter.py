"""What is done with generated texts afterwards: repeated sentences, equal answers, human review.

    kept = drop_repeated_sentences(text).text
    same_texts(["Yes, of course.", "No.", "Yes of course"])        # ((0, 2),)
    marks = mark(texts)                                            # what a person should look at
    write_review(Path("review.jsonl"), prompts, texts, marks)      # decisions are written by hand
    chosen = read_review(Path("review.jsonl"), prompts, texts)

Sentences and texts are compared without case, punctuation and the spaces between words, by
rapidfuzz's normalised indel similarity: 100 is equal, 0 has no character in common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from msgspec import Struct
from rapidfuzz import fuzz, process, utils

from ..errors import DataError
from ..files import read_text, write_whole
from ..fingerprint import json_digest
from ..schema import conform

__all__ = [
    "Decision",
    "Marks",
    "Shortened",
    "drop_repeated_sentences",
    "mark",
    "read_review",
    "same_texts",
    "write_review",
]

NEAR = 90.0
"""Similarity from which sentences count as copies."""
_SENTENCE = re.compile(
    r".+?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+[\"'”’」』）)\]]*|(?=\n)|$)\s*", re.DOTALL
)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
"""A word, or a character of a script without spaces (kana, Chinese characters)."""
Decision = Literal["keep", "drop"]


@dataclass(frozen=True, slots=True)
class Shortened:
    """A text without the sentences that were said before in it."""

    text: str
    dropped: tuple[str, ...]
    """What was left out, in its order."""


def drop_repeated_sentences(text: str, *, threshold: float = NEAR, least: int = 3) -> Shortened:
    """Leave out sentences that nearly repeat an earlier one of the same text.

    Args:
        text: any.
        threshold: similarity from which a sentence is a copy, 0 to 100.
        least: words that a sentence needs to be compared: shorter ones ("Yes.") are kept. A Chinese
            character or kana counts as a word.

    Raises:
        DataError: a threshold or number that cannot be, or something that is not text.
    """
    _check(threshold)
    _check_texts([text])
    if type(least) is not int or least < 1:
        raise DataError(f"least={least!r}: expected a whole number of words, 1 or more.")
    kept: list[str] = []
    said: list[str] = []
    dropped: list[str] = []
    for sentence in _SENTENCE.findall(text):
        plain = utils.default_process(sentence)
        long = len(_WORD.findall(plain)) >= least
        if long and process.extractOne(plain, said, scorer=fuzz.ratio, score_cutoff=threshold):
            dropped.append(sentence.strip())
            continue
        kept.append(sentence)
        if long:
            said.append(plain)
    return Shortened("".join(kept), tuple(dropped))


def same_texts(texts: Sequence[str], *, threshold: float = 95.0) -> tuple[tuple[int, ...], ...]:
    """Groups of texts that say nearly the same, by index, each of two or more.

    A model that has fallen into one answer for different prompts shows itself so. Empty texts are
    a group too.

    Args:
        texts: one a prompt.
        threshold: similarity from which two are the same, 0 to 100. A text joins the group of any
            that it is like.

    Raises:
        DataError: a threshold that cannot be, or something that is not a list of texts.
    """
    _check(threshold)
    _check_texts(texts)
    plain = [utils.default_process(text) for text in texts]
    if len(plain) < 2:
        return ()
    alike = (
        process.cdist(plain, plain, scorer=fuzz.ratio, score_cutoff=threshold, dtype=np.uint8) > 0
    )
    empty = np.array([not text for text in plain])
    alike |= empty[:, None] & empty[None, :]
    groups: list[list[int]] = []
    left = set(range(len(plain)))
    while left:
        group, found = [], [min(left)]
        left.discard(found[0])
        while found:
            index = found.pop()
            group.append(index)
            new = [other for other in np.flatnonzero(alike[index]).tolist() if other in left]
            left.difference_update(new)
            found += new
        groups.append(sorted(group))
    return tuple(tuple(group) for group in groups if len(group) > 1)


@dataclass(frozen=True, slots=True)
class Marks:
    """What a person should look at."""

    reasons: tuple[tuple[str, ...], ...]
    """For each text why it is marked; empty where it is not."""

    @property
    def counts(self) -> dict[str, int]:
        """How many texts each reason marks."""
        found: dict[str, int] = {}
        for reason in (reason for those in self.reasons for reason in those):
            found[reason] = found.get(reason, 0) + 1
        return found

    @property
    def unmarked(self) -> tuple[int, ...]:
        """Indices of the texts that pass."""
        return tuple(index for index, those in enumerate(self.reasons) if not those)


def mark(texts: Sequence[str], *, repeated: float = 0.2, threshold: float = NEAR) -> Marks:
    """Mark texts that are empty, repeat themselves, or are the same for several prompts.

    Args:
        texts: one a prompt.
        repeated: share of a text's characters in repeated sentences from which it is marked.
        threshold: similarity of sentences and texts that count as copies, 0 to 100.

    Raises:
        DataError: a threshold or share that cannot be.
    """
    if not isinstance(repeated, int | float) or not 0 < repeated <= 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(f"repeated={repeated!r}: expected a share above 0 and at most 1.")
    same = {index for group in same_texts(texts, threshold=threshold) for index in group}
    reasons: list[tuple[str, ...]] = []
    for index, text in enumerate(texts):
        dropped = drop_repeated_sentences(text, threshold=threshold).dropped
        share = sum(map(len, dropped)) / max(1, len(text))
        checks = {
            "empty": not text.strip(),
            "repeats itself": share >= repeated,
            "the same for several prompts": bool(text.strip()) and index in same,
        }
        reasons.append(tuple(reason for reason, holds in checks.items() if holds))
    return Marks(tuple(reasons))


class _Line(Struct, forbid_unknown_fields=True):
    """A line of a review file."""

    row: int
    digest: str
    reasons: list[str]
    prompt: Any
    text: str
    decision: Decision | None
    """null until somebody decides."""


def write_review(path: Path, prompts: Sequence[Any], texts: Sequence[str], marks: Marks) -> int:
    """Write the marked texts for a person, one JSON line each with `"decision": null`.

    A file that is there already keeps its decisions, so that a review can be interrupted.

    Args:
        path: `.jsonl`.
        prompts: as JSON has them, one a text.
        texts: all that were generated.
        marks: of these texts.

    Returns:
        How many lines wait for a decision.

    Raises:
        DataError: another number of prompts or marks than texts, or a file that is not a review of
            these texts.
        RunError: something that is not a file stands at `path`.
        OSError: the disk refuses.
    """
    if not len(prompts) == len(texts) == len(marks.reasons):
        raise DataError(
            f"{len(prompts)} prompts, {len(texts)} texts and {len(marks.reasons)} marks: expected "
            "as many of each."
        )
    known = _decisions(path, prompts, texts) if path.is_file() else {}
    lines: list[str] = []
    for row, reasons in enumerate(marks.reasons):
        if reasons:
            line = {
                "row": row,
                "digest": json_digest([prompts[row], texts[row]]),
                "reasons": list(reasons),
                "prompt": prompts[row],
                "text": texts[row],
                "decision": known.get(row),
            }
            lines.append(json.dumps(line, ensure_ascii=False))
    # A lone surrogate becomes its JSON escape.
    whole = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    write_whole(path, lambda part: part.write_bytes(whole))
    return sum(bool(those) and known.get(row) is None for row, those in enumerate(marks.reasons))


def read_review(path: Path, prompts: Sequence[Any], texts: Sequence[str]) -> tuple[int, ...]:
    """The rows to keep, once all marked ones are decided; those that were not marked are kept.

    Args:
        path: what `write_review` wrote, with "keep" or "drop" in place of each null.
        prompts: those it was written for.
        texts: likewise.

    Raises:
        DataError: a file that is not a review of these texts, or that is not finished.
    """
    found = _decisions(path, prompts, texts)
    open_rows = [row for row, decision in found.items() if decision is None]
    if open_rows:
        raise DataError(
            f"{path}: {len(open_rows)} of {len(found)} rows are not decided, the first is row "
            f'{open_rows[0]}: write "keep" or "drop" for its decision.'
        )
    return tuple(row for row in range(len(texts)) if found.get(row) != "drop")


def _decisions(
    path: Path, prompts: Sequence[Any], texts: Sequence[str]
) -> dict[int, Decision | None]:
    found: dict[int, Decision | None] = {}
    # Not `splitlines`: a text may hold other line ends, which JSON does not escape.
    for number, text in enumerate(read_text(path, "a review").split("\n"), 1):
        where = f"{path}:{number}"
        if not text.strip():
            continue
        try:
            value: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error}): mend the line.") from error
        line = conform(
            value, _Line, where, next_step='A decision is "keep", "drop" or null.', error=DataError
        )
        known = 0 <= line.row < len(texts)
        if not known or line.digest != json_digest([prompts[line.row], texts[line.row]]):
            raise DataError(
                f"{where} is row {line.row} of other texts than those that were given: review "
                "these into another file."
            )
        if line.row in found:
            raise DataError(f"{where}: row {line.row} stands twice: leave one out.")
        found[line.row] = line.decision
    return found


def _check(threshold: float) -> None:
    if not isinstance(threshold, int | float) or not 0 < threshold <= 100:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(f"threshold={threshold!r}: expected a similarity above 0 and at most 100.")


def _check_texts(texts: Any) -> None:
    """Refuse what is not a list of texts: a single text would be taken letter by letter."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"texts={texts!r:.60}: expected a list of texts, one a prompt.")
