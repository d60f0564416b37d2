"""map: every piece is asked by itself, and the surest answer is taken.

How sure an answer is, is the mean log-probability of its own tokens. A piece that does not hold
what is asked for is asked all the same, and may answer something else, less surely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..generation.decoding import Call, Decoding
from ..generation.detokenize import text_of
from ..generation.generate import generate
from .pieces import Piece
from .question import Question

__all__ = ["PieceText", "answer_each"]


@dataclass(frozen=True, slots=True)
class PieceText:
    """What one piece says."""

    token_ids: tuple[int, ...]
    text: str
    surety: float
    """Mean log-probability of its tokens, in nats; −inf where it says nothing."""


def answer_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    pieces: Sequence[Piece],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: str | None,
    advance: Callable[[int], object],
) -> list[PieceText]:
    """Ask each piece, greedily.

    Args:
        model: in place.
        tokenizer: the model's.
        question: what is asked.
        pieces: of the document.
        max_new_tokens: of each answer, at most.
        batch_size: pieces read at a time.
        stop: text that an answer ends before.
        advance: called with the number of pieces that are done.
    """
    found: list[PieceText] = []
    for first in range(0, len(pieces), batch_size):
        prompts = [question.about(piece.ids) for piece in pieces[first : first + batch_size]]
        recorder = _Recorded()
        said = generate(
            model,
            tokenizer,
            prompts,
            decoding=recorder,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        logs = torch.stack(recorder.log_p, dim=1)  # [rows, steps]
        for tokens, own in zip(said.token_ids, logs.tolist(), strict=True):
            text, kept = before_stop(tokenizer, tokens, stop)
            surety = sum(own[:kept]) / kept if text else -torch.inf
            found.append(PieceText(tokens[:kept], text, surety))
        advance(len(prompts))
    return found


def before_stop(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stop: str | None
) -> tuple[str, int]:
    """The text before `stop`, without white space around it, and the tokens that it has."""
    text = text_of(tokenizer, tokens).strip()
    if not stop or stop not in text:
        return text, len(tokens)
    for count in range(1, len(tokens)):
        if stop in text_of(tokenizer, tokens[:count]).lstrip():
            break
    else:
        count = len(tokens)
    return text.partition(stop)[0].strip(), max(1, count - 1)


@dataclass(frozen=True, slots=True)
class _Recorded(Decoding):
    """Greedy, with the log-probability of each token that is taken."""

    log_p: list[Tensor] = field(default_factory=list[Tensor])
    """[rows] for each step."""
    name: ClassVar[str] = "greedy"

    def processors(self, call: Call) -> Sequence[LogitsProcessor]:
        """One that changes nothing."""
        del call
        return [_Record(self.log_p)]


class _Record(LogitsProcessor):
    def __init__(self, log_p: list[Tensor]) -> None:
        self._log_p = log_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del input_ids
        self._log_p.append((scores.amax(-1) - scores.logsumexp(-1)).double().cpu())
        return scores
