"""Continuations that end in a loop, to be read: what stood before, and where the loop begins."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from longctx.generation.detokenize import text_of

from ..tasks.shared.repetition_metrics import loop_onset
from .figures import Written
from .result import LoopExample

__all__ = ["loop_examples"]

_MOST = 3  # that are kept of each decoding
_BROKEN = "\ufffd"


def loop_examples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Written],
) -> tuple[LoopExample, ...]:
    """A few continuations that loop, evenly over all that do.

    Args:
        tokenizer: the model's.
        prompts: token ids of each.
        rows: continuations of them.
    """
    looped = [row for row in rows if loop_onset(row.tokens) is not None]
    count = min(_MOST, len(looped))
    return tuple(
        _example(tokenizer, prompts, looped[i * len(looped) // count]) for i in range(count)
    )


def _example(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], row: Written
) -> LoopExample:
    onset = loop_onset(row.tokens)
    whole = text_of(tokenizer, row.tokens)
    # The bytes of a character may lie on both sides of the onset.
    before = text_of(tokenizer, row.tokens[:onset]).rstrip(_BROKEN)
    if not whole.startswith(before):
        before = ""
    return LoopExample(
        row.document, text_of(tokenizer, prompts[row.prompt]), before, whole[len(before) :]
    )
