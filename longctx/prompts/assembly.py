"""Prompts of an exact token length, assembled in token ids.

In order: the tokenizer's special tokens (none is legal), introduction, haystack with the needles at
line or sentence breaks, question, beginning of the answer, answer. The haystack alone is cut to
make the length exact; nothing else ever is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import DataError, TooShortError
from .haystacks import Grass, Haystack, decode, encode, tokenise
from .rendering import render_chat

__all__ = ["Prompt", "answer_after", "assemble", "frame"]

_USER_TEXT = "\u241fUSER\u241f"  # stands for the user's message while a chat template is rendered


@dataclass(frozen=True, slots=True)
class Prompt:
    """A retrieval prompt with its answer."""

    input_ids: tuple[int, ...]
    """The token ids, the answer included."""
    answer_start: int
    """Index of the answer's first token; the model is given `input_ids[:answer_start]`."""
    answer: str
    """Text of the answer's tokens: the key, after a space where that is not a token of its own."""
    key: str
    """What is to be found."""
    needle_starts: tuple[int, ...]
    """Index of each needle's first token, in the order in which they were given."""
    depth: float
    """Share of the haystack's tokens that stand before the first needle, as realised."""
    haystack: str
    """Name of the haystack and, for real text, the token at which it begins."""
    seed: int
    """What the prompt was drawn with."""
    needle_stop: int | None = None
    """Index after the first needle's last token; None where it is not known."""
    document: tuple[int, int] | None = None
    """Index of the first token of what is asked about, and after its last; None if not known."""

    @property
    def distance(self) -> int | None:
        """Tokens from the first needle's last token to the one that predicts the answer."""
        return None if self.needle_stop is None else self.answer_start - self.needle_stop

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Token ids of the answer."""
        return self.input_ids[self.answer_start :]


def assemble(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    haystack: Haystack,
    needles: Sequence[str],
    depths: Sequence[float],
    question: str,
    answer_prefix: str,
    key: str,
    intro: str = "",
    seed: int = 0,
    haystack_seed: int | None = None,
    longest: int | None = None,
    chat: bool | None = None,
    shorter: str = "",
) -> Prompt:
    """Hide sentences in a haystack and ask for what they say.

    Args:
        tokenizer: any tokenizer that gives the key back.
        length: tokens of the whole prompt, the answer included.
        haystack: what the needles are hidden in.
        needles: sentences, each put on a line of its own.
        depths: wanted share (0 to 1) of the haystack before each needle. It goes to the nearest
            free beginning of a line or sentence.
        question: stands after the haystack and ends the user's turn in a chat.
        answer_prefix: begins the answer, inside the assistant's turn in a chat.
        key: the answer, after a space.
        intro: stands before the haystack.
        seed: is recorded, and chooses the haystack unless `haystack_seed` does.
        haystack_seed: chooses where a `Texts` begins.
        longest: with the same one and the same `haystack_seed`, prompts of up to so many tokens
            begin their haystack at the same place, so that a cache of it can be shared; None
            draws from all places that have room for this prompt alone.
        chat: use the chat template; None means if the tokenizer has one.
        shorter: ends the advice for a length that is too short: how to make the sentences shorter.

    Raises:
        TooShortError: a length below the minimum (named).
        DataError: a haystack that is too short for the length, a tokenizer that does not
            round-trip the key.
    """
    head, tail = frame(tokenizer, intro, question, answer_prefix, chat)
    tail_ids, answer_ids = answer_after(tokenizer, tail, key)
    forms = [_Needle(tokenizer, needle) for needle in needles]
    room = length - len(head) - len(tail_ids) - len(answer_ids)
    size = room - sum(len(form.in_line) for form in forms)
    if size < 0:
        raise TooShortError(
            f"length={length} is too short for this prompt; it needs at least {length - size} "
            f"tokens before any haystack. Ask for a longer one{shorter}."
        )
    hay = tokenise(tokenizer, haystack)
    reach = room if longest is None else max(room, min(longest, len(hay.ids)))
    start = hay.start(reach, haystack.name, seed if haystack_seed is None else haystack_seed)
    places = hay.places(start, size, list(depths))
    # Where a needle needs no newline before it, the haystack grows by what that saves.
    chosen = [
        form.at_line if hay.at_line(start, place) else form.in_line
        for form, place in zip(forms, places, strict=True)
    ]
    size = room - sum(map(len, chosen))
    straw = hay.span(start, size)
    ids, starts, done = [*head], dict.fromkeys(places, 0), 0
    for place, form in sorted(zip(places, chosen, strict=True)):
        ids += straw[done:place]
        starts[place] = len(ids)
        ids += form
        done = place
    ids += [*straw[done:], *tail_ids]
    return Prompt(
        input_ids=(*ids, *answer_ids),
        answer_start=len(ids),
        answer=decode(tokenizer, answer_ids),
        key=key,
        needle_starts=tuple(starts[place] for place in places),
        depth=places[0] / size if size else depths[0],
        haystack=haystack.name if isinstance(haystack, Grass) else f"{haystack.name}@{start}",
        seed=seed,
        needle_stop=starts[places[0]] + len(chosen[0]),
        document=(len(head), len(ids) - len(tail_ids)),
    )


class _Needle:
    """A sentence on a line of its own, in the middle of a line and at the beginning of one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.in_line = encode(tokenizer, f"\n{text}\n")
        self.at_line = encode(tokenizer, f"{text}\n")


def frame(
    tokenizer: PreTrainedTokenizerBase,
    intro: str,
    question: str,
    answer_prefix: str,
    chat: bool | None,
) -> tuple[tuple[int, ...], str]:
    """Return the ids of all that stands before the haystack, and the text after it.

    Raises:
        DataError: a chat template that is asked for and not there, that fails, drops the message
            or is not the same twice.
    """
    intro = f"{intro}\n" if intro else ""
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if not chat:
        head = (*_special_prefix(tokenizer), *encode(tokenizer, intro))
        return head, f"\n{question} {answer_prefix}"
    if not tokenizer.chat_template:
        raise DataError("chat=True, but the tokenizer has no chat template; pass chat=False.")
    message = [{"role": "user", "content": _USER_TEXT}]
    rendered = render_chat(tokenizer, message, generation=True)
    if rendered != render_chat(tokenizer, message, generation=True):
        raise DataError(
            "The chat template writes something else each time: prompts could not be compared. "
            "Pass chat=False."
        )
    before, found, after = rendered.partition(_USER_TEXT)
    if not found:
        raise DataError("The chat template drops the user's message; pass chat=False.")
    return encode(tokenizer, before + intro), f"\n{question}{after}{answer_prefix}"


def _special_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what the tokenizer puts before a text: a BOS, or nothing."""
    bare = encode(tokenizer, "a")
    full = tuple(tokenizer("a")["input_ids"])
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    return full[: starts[0]] if starts else ()


def answer_after(
    tokenizer: PreTrainedTokenizerBase, tail: str, key: str, *, space: str = " "
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of `tail` and those that a tokenisation of tail and key adds to them.

    Where the space before the key is a token of its own it belongs to what the model is given:
    whether it would have said something else first is not what is asked.

    Raises:
        DataError: the added tokens are not the key.
    """
    ids, full = encode(tokenizer, tail), encode(tokenizer, f"{tail}{space}{key}")
    added = full[len(ids) :]
    if full[: len(ids)] != ids or decode(tokenizer, added).strip() != key:
        raise DataError(
            f"The tokenizer does not round-trip the key {key!r} after {tail[-24:]!r}: it gives "
            f"{decode(tokenizer, added)!r}. Retrieval cannot be scored with it; use the "
            "tokenizer that the model was trained with."
        )
    spaces = next(i for i in range(len(added)) if decode(tokenizer, added[i : i + 1]).strip())
    return ids + added[:spaces], added[spaces:]
