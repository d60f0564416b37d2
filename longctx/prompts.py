"""Seeded retrieval prompts of an exact token length, shared by training and evaluation.

    hay = held_out()                                    # or Grass()
    prompt = passkey(tokenizer, 2048, depth=0.25, seed=7, haystack=hay)
    prompt.input_ids[prompt.answer_start :]             # the ids of " 48213", teacher-forced

A prompt is assembled in token ids: special tokens of the tokenizer (none is legal), introduction,
haystack with the needle at a line or sentence break, question, beginning of the answer, answer.
The haystack alone is cut to make the length exact; nothing else ever is.

The keys of the two splits are disjoint by construction: a key belongs to "eval" when the first
byte of its BLAKE2b digest is a multiple of 8, and to "train" otherwise. The same arguments give
the same prompt on every platform, since `random.Random` seeded with a string is portable.

Source: the wording is that of Mohtashami & Jaggi, "Landmark Attention" (2023), appendix A.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random
from typing import Literal

from transformers import PreTrainedTokenizerBase

from .errors import DataError
from .haystacks import Grass, Haystack, Texts, decode, encode, held_out, tokenise

__all__ = [
    "CLASSIC",
    "SHORT",
    "Grass",
    "Haystack",
    "Prompt",
    "Split",
    "Texts",
    "Wording",
    "held_out",
    "passkey",
    "split_of",
]

Split = Literal["eval", "train"]

_NAMES = ("red", "blue", "green", "gold", "iron", "moon", "north", "river", "stone", "winter")
_USER_TEXT = "\u241fUSER\u241f"  # stands for the user's message while a chat template is rendered


@dataclass(frozen=True, slots=True)
class Wording:
    """The fixed sentences of a prompt; `{name}` and `{key}` are filled in."""

    intro: str
    """Stands before the haystack; may be empty."""
    needle: str
    """States a key. Must hold `{name}` and `{key}`."""
    question: str
    """Stands after the haystack and ends the user's turn in a chat."""
    answer_prefix: str
    """Begins the answer, inside the assistant's turn in a chat; the key follows after a space."""


SHORT = Wording(
    intro="",
    needle="The {name} key is {key}. Remember it. {key} is the {name} key.",
    question="What is the {name} key?",
    answer_prefix="The {name} key is",
)
"""The classical needle and question without the introduction, for very short windows."""

CLASSIC = Wording(
    intro=(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "it. I will quiz you about the important information there."
    ),
    needle=SHORT.needle,
    question=SHORT.question,
    answer_prefix=SHORT.answer_prefix,
)
"""The classical passkey task."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A retrieval prompt with its answer."""

    input_ids: tuple[int, ...]
    """Exactly as many token ids as asked for, the answer included."""
    needle_start: int
    """Index of the asked needle's first token."""
    answer_start: int
    """Index of the answer's first token; the model is given `input_ids[:answer_start]`."""
    answer: str
    """Text of the answer's tokens: the key, after a space where that is no token of its own."""
    key: str
    """The digits to be found."""
    depth: float
    """Share of the haystack's tokens that stand before the asked needle, as realised."""
    haystack: str
    """Name of the haystack and, for real text, the token at which it begins: a cluster."""
    split: Split
    """The key space that the key belongs to."""
    seed: int
    """What the prompt was drawn with."""

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Token ids of the answer."""
        return self.input_ids[self.answer_start :]


def split_of(key: str) -> Split:
    """Return the key space that `key` belongs to, the same on every platform."""
    digest = hashlib.blake2b(key.encode(), digest_size=1).digest()
    return "eval" if digest[0] % 8 == 0 else "train"


def _special_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what the tokenizer puts before a text: a BOS, or nothing."""
    bare = encode(tokenizer, "a")
    full = tuple(tokenizer("a")["input_ids"])
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    return full[: starts[0]] if starts else ()


def _frame(
    tokenizer: PreTrainedTokenizerBase, wording: Wording, name: str, chat: bool | None
) -> tuple[tuple[int, ...], str]:
    """Return the ids of all that stands before the haystack, and the text after it."""
    intro = f"{wording.intro}\n" if wording.intro else ""
    question = "\n" + wording.question.format(name=name)
    answer_prefix = wording.answer_prefix.format(name=name)
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if not chat:
        head = (*_special_prefix(tokenizer), *encode(tokenizer, intro))
        return head, f"{question} {answer_prefix}"
    if not tokenizer.chat_template:
        raise DataError("chat=True, but the tokenizer has no chat template; pass chat=False.")
    message = [{"role": "user", "content": _USER_TEXT}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, found, after = str(rendered).partition(_USER_TEXT)
    if not found:
        raise DataError("The chat template drops the user's message; pass chat=False.")
    return encode(tokenizer, before + intro), f"{question}{after}{answer_prefix}"


def _answer(
    tokenizer: PreTrainedTokenizerBase, tail: str, key: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of `tail` and those that a tokenisation of tail and key adds to them.

    Where the space before the key is a token of its own it belongs to what the model is given:
    whether it would have said something else first is not what is asked.
    """
    ids, full = encode(tokenizer, tail), encode(tokenizer, f"{tail} {key}")
    added = full[len(ids) :]
    if full[: len(ids)] != ids or decode(tokenizer, added).strip() != key:
        raise DataError(
            f"The tokenizer does not round-trip the key {key!r} after {tail[-24:]!r}: it gives "
            f"{decode(tokenizer, added)!r}. Retrieval cannot be scored with it; use the "
            "tokenizer that the model was trained with."
        )
    spaces = next(i for i in range(len(added)) if decode(tokenizer, added[i : i + 1]).strip())
    return ids + added[:spaces], added[spaces:]


@dataclass(frozen=True, slots=True)
class _Needle:
    in_line: tuple[int, ...]
    at_line: tuple[int, ...]


def _needle(tokenizer: PreTrainedTokenizerBase, wording: Wording, name: str, key: str) -> _Needle:
    """The needle on a line of its own, in the middle of a line and at the beginning of one."""
    text = wording.needle.format(name=name, key=key)
    return _Needle(encode(tokenizer, f"\n{text}\n"), encode(tokenizer, f"{text}\n"))


def _draw_key(rng: Random, digits: int, split: Split) -> str:
    while True:
        key = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if split_of(key) == split:
            return key


def _check(depth: float, digits: int, pairs: int, split: str, wording: Wording) -> None:
    if not 0 <= depth <= 1:
        raise DataError(f"depth={depth} is not a share of the haystack; pass one from 0 to 1.")
    if not 3 <= digits <= 18:
        raise DataError(f"digits={digits}: pass 3 to 18, so that both key spaces hold enough keys.")
    if not 1 <= pairs <= len(_NAMES):
        raise DataError(f"pairs={pairs}: pass 1 to {len(_NAMES)}.")
    if split not in ("eval", "train"):
        raise DataError(f"split={split!r} is not a key space; pass 'eval' or 'train'.")
    if "{key}" not in wording.needle or (pairs > 1 and "{name}" not in wording.needle):
        raise DataError(f"The needle {wording.needle!r} must hold {{name}} and {{key}}.")


def passkey(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    depth: float,
    seed: int,
    haystack: Haystack,
    split: Split = "eval",
    haystack_seed: int | None = None,
    chat: bool | None = None,
    digits: int = 5,
    pairs: int = 1,
    wording: Wording = CLASSIC,
) -> Prompt:
    """Hide a key in a haystack and ask for it.

    Args:
        tokenizer: any tokenizer that keeps digits.
        length: tokens of the whole prompt, the answer included.
        depth: wanted share (0 to 1) of the haystack before the needle. The needle goes to the
            nearest beginning of a line or sentence; the prompt records the depth realised.
        seed: chooses the key, and the names and places of further pairs.
        haystack: what the key is hidden in.
        split: the key space; training must never draw from "eval".
        haystack_seed: chooses where a `Texts` begins; defaults to `seed`. With the same one,
            prompts share all ids before the first needle, so a cache of them can be shared too.
        chat: use the chat template; None means if the tokenizer has one.
        digits: digits of the key, 3 to 18.
        pairs: needles in all. With more than one, each has a name ("the red key") and the
            question asks for one of them.
        wording: the fixed sentences.

    Raises:
        DataError: a length below the minimum (named), a haystack that is too short for the
            length, a tokenizer that does not round-trip the key, a setting out of range.
    """
    _check(depth, digits, pairs, split, wording)
    rng = Random(f"passkey/{split}/{digits}/{pairs}/{seed}")
    names = rng.sample(_NAMES, pairs) if pairs > 1 else ["pass"]
    keys: list[str] = []
    while len(keys) < pairs:
        if (key := _draw_key(rng, digits, split)) not in keys:
            keys.append(key)
    depths = [depth, *(rng.random() for _ in range(pairs - 1))]

    head, tail = _frame(tokenizer, wording, names[0], chat)
    tail_ids, answer_ids = _answer(tokenizer, tail, keys[0])
    needles = [_needle(tokenizer, wording, n, k) for n, k in zip(names, keys, strict=True)]
    room = length - len(head) - len(tail_ids) - len(answer_ids)
    size = room - sum(len(needle.in_line) for needle in needles)
    if size < 0:
        raise DataError(
            f"length={length} is too short for this prompt; it needs at least {length - size} "
            "tokens before any haystack. Ask for a longer one or pass wording=SHORT."
        )
    hay = tokenise(tokenizer, haystack)
    start = hay.start(room, haystack.name, seed if haystack_seed is None else haystack_seed)
    places = hay.places(start, size, depths)
    # Where a needle needs no newline before it, the haystack grows by what that saves.
    forms = [
        needle.at_line if hay.at_line(start, place) else needle.in_line
        for needle, place in zip(needles, places, strict=True)
    ]
    size = room - sum(map(len, forms))
    straw = hay.span(start, size)
    ids, needle_start, done = [*head], 0, 0
    for place, form in sorted(zip(places, forms, strict=True)):
        ids += straw[done:place]
        if place == places[0]:
            needle_start = len(ids)
        ids += form
        done = place
    ids += [*straw[done:], *tail_ids]
    return Prompt(
        input_ids=(*ids, *answer_ids),
        needle_start=needle_start,
        answer_start=len(ids),
        answer=decode(tokenizer, answer_ids),
        key=keys[0],
        depth=places[0] / size if size else depth,
        haystack=haystack.name if isinstance(haystack, Grass) else f"{haystack.name}@{start}",
        split=split,
        seed=seed,
    )
