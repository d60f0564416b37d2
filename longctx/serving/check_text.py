"""The same question to a server that gives no log-probabilities: does it say what we say?

Greedy answers to the same texts are compared, and with those of the unextended model. Equal texts
prove less than equal log-probabilities: a model that differs little says the same for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RunError
from ..model import evaluating
from ..prompts.haystacks import held_out
from .check import CheckSettings, lengths_of, strip, window_of_model
from .clients import RefusedError, Transformers

__all__ = ["CheckedText", "check_text"]

_ANSWER = 48
"""Tokens of an answer."""


@dataclass(frozen=True, slots=True)
class CheckedText:
    """What a server says."""

    rows: tuple[tuple[int, str, str, str | None], ...]
    """Tokens of the prompt; the server's answer, ours, and the unextended model's."""
    faults: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the server says what we say."""
        return not self.faults

    def __str__(self) -> str:
        lines: list[str] = []
        for length, theirs, ours, plain in self.rows:
            same = "same as ours" if theirs == ours else f"ours {_short(ours)}"
            bare = "" if plain is None else f"; unextended {_short(plain)}"
            lines.append(f"{length:>8} tokens: server {_short(theirs)}; {same}{bare}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"FAULT {fault}" for fault in self.faults]
        return "\n".join([*lines, *(["the server's answers are this checkpoint's"] * self.ok)])


def check_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    client: Transformers,
    settings: CheckSettings,
    *,
    served_as: str,
    say: Callable[[str], None] = lambda _: None,
) -> CheckedText:
    """Hold a server's greedy answers against a model's.

    Args:
        model: as longctx.load gives it, in float32. It is used up: its patches are taken off.
        tokenizer: its tokenizer.
        client: of the server.
        settings: `lengths` and `seed` are read.
        served_as: the model's name at the server.
        say: takes a line about what is being done.

    Raises:
        RunError: no server there, an answer of another form, or lengths beyond the window.
    """
    window, original = window_of_model(model)
    room = window - _ANSWER
    lengths = settings.lengths or tuple(
        sorted({max(2, min(length, room)) for length in lengths_of(window, original)})
    )
    if not all(2 <= length <= room for length in lengths):
        raise RunError(
            f"lengths {[*lengths]}: expected 2 to {room} tokens, since an answer has {_ANSWER}."
        )
    faults: list[str] = []
    asked: list[tuple[str, str]] = []
    for text in (_text(tokenizer, length, settings.seed) for length in lengths):
        say("asking the server for an answer")
        try:
            asked.append((text, client.complete(text, _ANSWER, served_as)))
        except RefusedError as error:
            faults.append(f"it does not take {len(_ids(tokenizer, text))} tokens: {error}")
    say("answering the same by longctx")
    ours = [_answer(model, tokenizer, text) for text, _ in asked]
    plain: list[str | None] = [None] * len(asked)
    if strip(model):
        say("answering the same by the unextended model")
        plain = [_answer(model, tokenizer, text) for text, _ in asked]
    rows = [
        (len(_ids(tokenizer, text)), theirs, mine, bare)
        for (text, theirs), mine, bare in zip(asked, ours, plain, strict=True)
    ]
    wrong = [row for row in rows if row[1] != row[2]]
    if wrong and all(row[1] == row[3] for row in rows):
        faults.append("the scaling was dropped: the server says what the unextended model says")
    elif wrong:
        faults.append(f"{len(wrong)} of {len(rows)} answers are others than ours")
    elif rows and window > original and all(mine == bare for _, _, mine, bare in rows):
        faults.append(
            "undecided: the unextended model says the same to these texts: ask at longer --lengths"
        )
    told = any(mine != bare for _, _, mine, bare in rows if bare is not None)
    notes = ["this engine gives no log-probabilities: equal texts are the only evidence"]
    if wrong and not told and any(bare is not None for *_, bare in rows):
        notes.append("the unextended model says the same: these answers do not tell the two apart")
    return CheckedText(tuple(rows), tuple(faults), tuple(notes))


def _text(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> str:
    """A text of at most so many tokens, special ones included, by halving."""
    documents = held_out().documents
    whole = "\n\n".join(
        documents[(index + seed) % len(documents)] for index in range(len(documents))
    )
    low, high = 1, len(whole)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(_ids(tokenizer, whole[:middle])) <= length
        low, high = (middle, high) if fits else (low, middle - 1)
    return whole[:low]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = torch.tensor([_ids(tokenizer, text)], device=next(model.parameters()).device)
    with torch.no_grad(), evaluating(model):
        said = model.generate(  # pyright: ignore[reportCallIssue]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_ANSWER, do_sample=False
        )
    return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
