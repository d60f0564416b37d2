"""Text of tokens that come one by one, whose pieces join up to the text of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream", "text_of"]

_UNFINISHED = "\ufffd"
_CONTEXT = 8  # tokens before the new ones that are decoded with them: spaces depend on them


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    text: Any = tokenizer.decode(
        [*tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


class TextStream:
    """Shows settled text, each character once, and none that a later token would change.

    Args:
        tokenizer: the model's.
        show: called with each new piece.
        behind: tokens that the text follows on: many tokenizers write no space at the beginning of
            a text, and one in front of the same word behind others. Tokens that end inside a
            character do not count.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        show: Callable[[str], object],
        *,
        behind: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._show = show
        broken = text_of(tokenizer, behind[-_CONTEXT:]).endswith(_UNFINISHED)
        self._behind = [] if broken else [*behind[-_CONTEXT:]]
        self._done = len(self._behind)  # tokens whose text was shown

    def show(self, settled: Sequence[int], *, last: bool = False) -> None:
        """Show what is new.

        Args:
            settled: all tokens that stay, those shown before included.
            last: whether no more come, so that broken characters are shown as such.
        """
        settled = [*self._behind, *settled]
        if len(settled) <= self._done:
            return
        begin = max(0, self._done - _CONTEXT)
        before = text_of(self._tokenizer, settled[begin : self._done])
        whole = text_of(self._tokenizer, settled[begin:])
        if whole.endswith(_UNFINISHED) and not last:
            return  # the bytes of a character come in several tokens
        self._done = len(settled)
        if piece := whole[len(before) :]:
            self._show(piece)
