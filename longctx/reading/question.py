"""What stands around a piece of a document: an introduction before, the question after it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..prompts.assembly import frame
from ..prompts.haystacks import encode

__all__ = ["Question"]


@dataclass(frozen=True, slots=True)
class Question:
    """The tokens before and after a text that is asked about."""

    before: tuple[int, ...]
    """Special tokens, the beginning of a chat, the introduction."""
    after: tuple[int, ...]
    """The question, and what begins the answer."""

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        *,
        intro: str = "",
        answer_prefix: str | None = None,
        chat: bool | None = None,
    ) -> Question:
        """Put a question into words.

        Args:
            tokenizer: the model's.
            question: stands on a line of its own after the text, and ends the user's turn in a
                chat.
            intro: stands on a line of its own before the text.
            answer_prefix: begins the answer; None is "Answer:" without a chat template, else
                nothing.
            chat: use the tokenizer's chat template; None: if it has one.

        Raises:
            DataError: no question, or a chat template that is not there or fails.
        """
        if not question.strip():
            raise DataError("the question is empty: say what the document is to be asked.")
        chat = bool(tokenizer.chat_template) if chat is None else chat
        if answer_prefix is None:
            answer_prefix = "" if chat else "Answer:"
        before, after = frame(tokenizer, intro, question.strip(), answer_prefix, chat)
        return cls(before, encode(tokenizer, after))

    def about(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The prompt about a text of these tokens."""
        return (*self.before, *ids, *self.after)

    @property
    def size(self) -> int:
        """Tokens without any text."""
        return len(self.before) + len(self.after)
