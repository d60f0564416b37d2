"""Seeded retrieval prompts of an exact token length, shared by training and evaluation.

    hay = held_out()                                    # or Grass()
    prompt = passkey(tokenizer, 2048, depth=0.25, seed=7, haystack=hay)
    prompt.input_ids[prompt.answer_start :]             # the ids of " 48213", teacher-forced

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

from ..errors import DataError
from .assembly import Prompt, assemble
from .haystacks import Grass, Haystack, Texts, held_out

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


def split_of(key: str) -> Split:
    """Return the key space that `key` belongs to, the same on every platform."""
    digest = hashlib.blake2b(key.encode(), digest_size=1).digest()
    return "eval" if digest[0] % 8 == 0 else "train"


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
    longest: int | None = None,
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
        haystack_seed: chooses where a `Texts` begins; defaults to `seed`.
        longest: lets prompts of one `haystack_seed` begin at the same place; see
            `longctx.prompts.assembly.assemble`.
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
    return assemble(
        tokenizer,
        length,
        haystack=haystack,
        needles=[wording.needle.format(name=n, key=k) for n, k in zip(names, keys, strict=True)],
        depths=[depth, *(rng.random() for _ in range(pairs - 1))],
        question=wording.question.format(name=names[0]),
        answer_prefix=wording.answer_prefix.format(name=names[0]),
        key=keys[0],
        intro=wording.intro,
        seed=seed,
        haystack_seed=haystack_seed,
        longest=longest,
        chat=chat,
        shorter="" if wording == SHORT else ", or in Python shorter sentences (wording=SHORT)",
    )
