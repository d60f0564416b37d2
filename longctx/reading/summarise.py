"""Summing up a document of any length: pieces first, then their summaries (map and reduce)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, RunError
from ..generation.checks import check_text, check_whole
from ..model import unwrapped
from .combine_map import answer_each
from .question import Question
from .read import Reading

__all__ = ["INSTRUCTION", "Summary", "summarise"]

INSTRUCTION = "Summarise the text above in a few sentences."
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Summary:
    """A summary, and what it was made from."""

    text: str
    rounds: tuple[tuple[str, ...], ...]
    """The summaries of each round, in the order of the text; the last round has one."""


def summarise(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    *,
    instruction: str = INSTRUCTION,
    chunk: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    chat: bool | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Summary:
    """Sum up a document: each piece, then the summaries together, until they fit into one.

    Args:
        model: in place; PEFT and other wrappers are looked through.
        tokenizer: the model's.
        document: any text.
        instruction: stands after each piece.
        chunk: tokens of a piece, at most; None: what the window leaves.
        max_new_tokens: of each summary, at most.
        batch_size: pieces read at a time.
        chat: use the chat template; None: if there is one.
        progress: called with the pieces of a round that are done and those there are.

    Raises:
        DataError: an empty document or instruction, or pieces that do not fit into the window.
        RunError: settings that cannot be used, a piece of which nothing is said, or summaries that
            do not become shorter than what they sum up.
    """
    check_whole("summarise", "max_new_tokens", max_new_tokens, least=1)
    for name, value in (("document", document), ("instruction", instruction)):
        check_text(name, value)
    if not instruction.strip():
        raise DataError("the instruction is empty: say what is to be done with each piece.")
    inner = unwrapped(model)
    reading = Reading("map", chunk, 0, batch_size)
    question = Question.of(tokenizer, instruction, chat=chat)
    rounds: list[tuple[str, ...]] = []
    before: int | None = None
    while True:
        pieces = reading.pieces(inner, tokenizer, document, question, max_new_tokens)
        if (before is not None and len(pieces) >= before) or len(rounds) == _ROUNDS:
            raise RunError(
                f"after {len(rounds)} rounds the summaries still fill {len(pieces)} pieces: pass "
                f"a larger chunk, or max_new_tokens below {max_new_tokens}."
            )
        before, done = len(pieces), 0

        def advance(count: int, there: int = len(pieces)) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, there)

        said = answer_each(
            inner,
            tokenizer,
            question,
            pieces,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            stop=None,
            advance=advance,
        )
        texts = tuple(each.text for each in said)
        silent = [index for index, text in enumerate(texts) if not text]
        if silent:
            raise RunError(
                f"the model says nothing of piece {silent[0] + 1} of {len(texts)}: nothing is left "
                "out of a summary unsaid. Try another instruction, or a smaller chunk."
            )
        rounds.append(texts)
        if len(texts) == 1:
            return Summary(texts[0], tuple(rounds))
        document = "\n\n".join(texts)
