"""Asking a document that is longer than the window: `longctx.read`.

    answer = longctx.read(model, tokenizer, document, "Who signed the treaty?")
    answer.text, document[slice(*answer.place)]

A document that fits into one piece is asked as a whole.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError, RunError, nearest
from ..generation.checks import check_text, check_whole
from ..generation.generate import ends_of
from ..generation.requests import reach
from ..model import unwrapped
from ..registry import parse_fields
from .answers import Answer, PieceAnswer
from .combine_map import answer_each, before_stop
from .combine_nbce import read_together
from .combine_windows import read_side_by_side, refuse_windows
from .pieces import Piece, split
from .question import Question

__all__ = ["Combine", "Reading", "answer_in_pieces", "parse_reading", "read"]

Combine = Literal["map", "nbce", "windows"]


@dataclass(frozen=True, slots=True)
class Reading:
    """How a document is read in pieces."""

    combine: Combine = "map"
    """map: every piece answers, and the surest is taken. nbce: all answer together, token by token.
    windows: pieces side by side, at the same positions."""
    chunk: int | None = None
    """Tokens of a piece, at most; None: what the window leaves beside question and answer."""
    overlap: int | None = None
    """Tokens that neighbouring pieces share, at least. What is sought must fit into it, or a cut
    may go through that. None: a quarter of the chunk, at most 256."""
    batch_size: int = 8
    """Pieces read at a time by map; nbce reads all at once."""

    name: ClassVar[str] = "read"

    def __post_init__(self) -> None:
        known = get_args(Combine)
        if self.combine not in known:
            raise RunError(
                f"combine={self.combine!r}{nearest(str(self.combine), known)}: expected one of "
                f"{', '.join(known)}."
            )
        if self.chunk is not None:
            check_whole("read", "chunk", self.chunk, least=1)
        if self.overlap is not None:
            check_whole("read", "overlap", self.overlap, least=0)
        check_whole("read", "batch_size", self.batch_size, least=1)

    def __str__(self) -> str:
        """As the command line writes it: "read:map,chunk=180"."""
        given = {key: getattr(self, key) for key in ("chunk", "overlap")}
        items = [f"{key}={value}" for key, value in given.items() if value is not None]
        return ",".join([f"{self.name}:{self.combine}", *items])

    def pieces(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        document: str,
        question: Question,
        max_new_tokens: int,
    ) -> tuple[Piece, ...]:
        """The pieces of a document.

        Raises:
            DataError: no room for any, or a chunk that the window does not hold.
        """
        most, what = reach(model)
        taken = question.size + max_new_tokens
        room = None if most is None else most - taken
        if room is not None and room < 1:
            raise DataError(
                f"the question has {question.size:,} tokens and max_new_tokens={max_new_tokens:,} "
                f"are to follow, and {what} is {most:,}: nothing is left for the document. Ask "
                "in fewer words, or lower max_new_tokens."
            )
        if self.chunk is not None and room is not None and self.chunk > room:
            raise DataError(
                f"chunk={self.chunk:,} tokens, the question's {question.size:,} and "
                f"max_new_tokens={max_new_tokens:,} are more than {what} of {most:,}: pass a chunk "
                f"of {room:,} at most."
            )
        chunk = self.chunk or room
        if chunk is None:
            raise RunError(
                "this model has no window that says how long a piece may be: pass chunk."
            )
        overlap = min(256, chunk // 4) if self.overlap is None else self.overlap
        return split(tokenizer, document, chunk, overlap)


def parse_reading(text: str) -> Reading:
    """Read a way of reading as the command line writes it.

    >>> parse_reading("read:nbce,chunk=180")
    Reading(combine='nbce', chunk=180, overlap=None, batch_size=8)

    Raises:
        RunError: unknown fields, or values that cannot be used.
    """
    name, fields = parse_fields(
        text, first="combine", example="read:map,chunk=2000", error=RunError
    )
    known = [field.name for field in dataclasses.fields(Reading)]
    for key in fields:
        if key not in known:
            raise RunError(
                f"{name} has no field {key!r}{nearest(key, known)} (fields: {', '.join(known)})"
            )
    return Reading(**fields)


def read(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    question: str,
    *,
    combine: Combine = "map",
    chunk: int | None = None,
    overlap: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    intro: str = "",
    answer_prefix: str | None = None,
    chat: bool | None = None,
    stop: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Answer:
    r"""Ask a document of any length.

    Each piece is put before the question as a prompt of its own: `intro`, the piece, the question,
    `answer_prefix`, in the tokenizer's chat template where it has one. An answer that needs what
    stands in two pieces is found by none of them under map.

    Args:
        model: in place; PEFT and other wrappers are looked through. A patch on it stays, and the
            window is the one that it promises.
        tokenizer: the model's.
        document: any text.
        question: stands after the piece.
        combine: "map", "nbce" or "windows": see `Reading`.
        chunk: tokens of a piece; None: what the window leaves.
        overlap: tokens that pieces share; None: a quarter of the chunk, at most 256.
        max_new_tokens: tokens of an answer, at most.
        batch_size: pieces read at a time.
        intro: stands before the piece.
        answer_prefix: begins the answer; None is "Answer:" without a chat template, else nothing.
        chat: use the chat template; None: if there is one.
        stop: text that an answer ends before; None is a line's end without a chat template, else
            the tokens that end a text alone. "" for those alone.
        progress: called with the pieces that are done and those there are.

    Raises:
        DataError: an empty document or question, or pieces that do not fit into the window.
        RunError: settings that cannot be used.
        ModelError: a model or method that `combine` does not work with.
    """
    reading = Reading(combine, chunk, overlap, batch_size)
    check_whole("read", "max_new_tokens", max_new_tokens, least=1)
    texts = {"document": document, "question": question, "intro": intro}
    texts |= {"answer_prefix": answer_prefix or "", "stop": stop or ""}
    for name, value in texts.items():
        check_text(name, value)
    chat = bool(tokenizer.chat_template) if chat is None else chat
    asked = Question.of(tokenizer, question, intro=intro, answer_prefix=answer_prefix, chat=chat)
    if stop is None:
        stop = "" if chat else "\n"
    return answer_in_pieces(
        unwrapped(model),
        tokenizer,
        document,
        asked,
        reading,
        max_new_tokens=max_new_tokens,
        stop=stop,
        progress=progress,
    )


def answer_in_pieces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    question: Question,
    reading: Reading,
    *,
    max_new_tokens: int,
    stop: str = "",
    progress: Callable[[int, int], object] | None = None,
) -> Answer:
    """The same for a question in tokens; see `read`."""
    if reading.combine == "windows":
        refuse_windows(model)
    pieces = reading.pieces(model, tokenizer, document, question, max_new_tokens)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(pieces))

    if reading.combine == "map":
        said = answer_each(
            model,
            tokenizer,
            question,
            pieces,
            max_new_tokens=max_new_tokens,
            batch_size=reading.batch_size,
            stop=stop,
            advance=advance,
        )
        best = max(range(len(said)), key=lambda index: said[index].surety)
        read_in = [_piece(p, each.text, each.surety) for p, each in zip(pieces, said, strict=True)]
        text, tokens = said[best].text, said[best].token_ids
        return _placed(document, text, tokens, reading.combine, read_in, best if text else None)
    if reading.combine == "nbce":
        tokens, surest = read_together(
            model,
            tokenizer,
            question,
            pieces,
            max_new_tokens=max_new_tokens,
            advance=advance,
        )
        text, kept = before_stop(tokenizer, tokens, stop)
        heard = Counter(surest[:kept])
        share = {index: heard[index] / max(1, kept) for index in range(len(pieces))}
        read_in = [_piece(piece, "", share[index]) for index, piece in enumerate(pieces)]
        best = max(share, key=share.__getitem__)
        return _placed(document, text, tokens[:kept], reading.combine, read_in, best)
    tokens = read_side_by_side(
        model,
        question,
        pieces,
        max_new_tokens=max_new_tokens,
        ends=ends_of(model, tokenizer),
        advance=advance,
    )
    text, kept = before_stop(tokenizer, tokens, stop)
    read_in = [_piece(piece, "", None) for piece in pieces]
    return _placed(document, text, tokens[:kept], reading.combine, read_in, None)


def _piece(piece: Piece, text: str, surety: float | None) -> PieceAnswer:
    return PieceAnswer(piece.start, piece.stop, len(piece.ids), text, surety)


def _placed(
    document: str,
    text: str,
    tokens: Sequence[int],
    combine: str,
    pieces: Sequence[PieceAnswer],
    best: int | None,
) -> Answer:
    """An answer with the place that it comes from."""
    if best is None:
        first, last = 0, len(document)
        known = len(pieces) == 1
    else:
        first, last = pieces[best].start, pieces[best].stop
        known = True
    sought = text.strip().rstrip(".!?")
    found = document.find(sought, first, last) if sought else -1
    place = (found, found + len(sought)) if found >= 0 else (first, last) if known else None
    return Answer(text, tuple(tokens), place, found >= 0, combine, tuple(pieces))
