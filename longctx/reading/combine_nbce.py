r"""nbce: all pieces answer together, token by token.

With pieces S_1 … S_n taken as independent given the answer T, Bayes' rule gives
p(T | S_1 … S_n) ∝ p(T)^(1−n) ∏ p(T | S_i). Of each next token, in Su's generalised form,

    log p = (1 + β) · P_i[log p(t | S_i)] − β · log p(t),

where log p(t) is what the model says to the question alone, and P takes the piece whose
distribution has the least entropy (with the mean over pieces and β = n − 1 it is the rule above).
Tokens that are all but impossible without a document (log p ≤ −100) are taken from that piece
alone.

Source: Su 2023, "NBCE: Naive Bayes-based Context Extension" (kexue.fm/archives/9617).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..generation.decoding import Call, Decoding
from ..generation.generate import generate
from .pieces import Piece
from .question import Question

__all__ = ["BETA", "merged", "read_together"]

BETA = 0.25
"""Su's setting."""
_IMPOSSIBLE = -100.0


def merged(scores: Tensor, beta: float = BETA) -> tuple[Tensor, int]:
    """Log-probabilities of the next token up to a constant, float32 [V], and the surest piece.

    Args:
        scores: logits [1 + pieces, V]; the first row has no document.
        beta: see above.
    """
    log_p = scores.float().log_softmax(-1)
    prior, pieces = log_p[0], log_p[1:]
    entropy = -(pieces.exp() * pieces.clamp(min=_IMPOSSIBLE)).sum(-1)
    surest = int(entropy.argmin())
    pooled = pieces[surest]
    both = (1 + beta) * pooled - beta * prior
    return torch.where(prior > _IMPOSSIBLE, both, pooled), surest


def read_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    pieces: Sequence[Piece],
    *,
    max_new_tokens: int,
    advance: Callable[[int], object],
) -> tuple[tuple[int, ...], list[int]]:
    """One answer of all pieces, greedily: its tokens, and the surest piece at each.

    All pieces are one batch, whose caches are as large as that of the whole document.

    Args:
        model: in place.
        tokenizer: the model's.
        question: what is asked.
        pieces: of the document.
        max_new_tokens: at most.
        advance: called with the number of pieces that are done.
    """
    merging = _Merged()
    prompts = [question.about(()), *(question.about(piece.ids) for piece in pieces)]
    said = generate(
        model,
        tokenizer,
        prompts,
        decoding=merging,
        max_new_tokens=max_new_tokens,
        batch_size=len(prompts),
    )
    advance(len(pieces))
    return said.token_ids[0], merging.surest[: len(said.token_ids[0])]


@dataclass(frozen=True, slots=True)
class _Merged(Decoding):
    """Greedy, from what all rows say together."""

    surest: list[int] = field(default_factory=list[int])
    """The surest piece at each step."""
    name: ClassVar[str] = "greedy"

    def processors(self, call: Call) -> Sequence[LogitsProcessor]:
        """One that gives all rows the same logits."""
        del call
        return [_Merge(self.surest)]


class _Merge(LogitsProcessor):
    def __init__(self, surest: list[int]) -> None:
        self._surest = surest

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del input_ids
        both, surest = merged(scores)
        self._surest.append(surest)
        return both.expand(len(scores), -1).contiguous()
