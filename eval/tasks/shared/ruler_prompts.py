"""RULER's thirteen tasks as prompts: what is drawn, and how a text around it is made.

Source: Hsieh et al., "RULER" (arXiv:2404.06654), section 3 and appendices A and B. Its generators
stop at a coarse step below the length; here the text is cut so that prompt and room for the answer
fill it exactly. Nothing that is asked for is ever cut: of documents, lists and haystacks it is what
stands last, or a document that does not hold the answer.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random
from string import ascii_lowercase
from typing import Literal, TypeAlias
from uuid import UUID

from longctx.prompts.haystacks import Grass

from .ruler_source import Family, corpus, essays, template, wordlist
from .vocabulary import draw, number, variable

__all__ = ["NEEDLES", "PARTS", "Drawn", "Part", "draw_part", "family_of", "steps_of"]

Part = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]
_Kind: TypeAlias = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True, slots=True)
class Needles:
    """What is hidden in which haystack, and how much of it is asked for."""

    haystack: Literal["repeat", "essay", "needle"]
    keys: int = 1
    values: int = 1
    """Values of each key."""
    queries: int = 1
    """Keys that are asked for."""
    key: _Kind = "words"
    value: _Kind = "numbers"


NEEDLES: dict[Part, Needles] = {
    "niah_single_1": Needles("repeat"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}
_FAMILIES: dict[Part, Family] = {
    "vt": "variable_tracking",
    "cwe": "common_words_extraction",
    "fwe": "freq_words_extraction",
    "qa_1": "qa",
    "qa_2": "qa",
}
PARTS: tuple[Part, ...] = (*NEEDLES, *_FAMILIES)
"""In RULER's order."""

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_DEPTHS = 40  # places of a needle in essays, evenly from end to end
_CHARACTERS = 8  # more than a token of English has
_HOPS = 4
_EXAMPLE_LINES = 10  # of the worked example of variable tracking: RULER's has 500 tokens
_COMMON = 10
_CODED = 6  # letters of a made-up word
_SHORT = 4096  # below, RULER's lists of common words repeat less


@dataclass(frozen=True, slots=True)
class Drawn:
    """A prompt whose length is still open."""

    text: Callable[[int, str], str]
    """The user's message with so many characters of what may be cut, and full stops after them."""
    most: int
    """Characters that may be kept."""
    prefix: str
    """Begins the answer."""
    references: tuple[str, ...]
    answer: str
    """A right answer in full, as it is likely to be said."""
    cluster: str
    holds: Callable[[int], bool] = lambda keep: True
    """Whether what is asked for is still the answer with so many characters."""
    question: str = ""
    """The end of the message, after its context."""


def family_of(part: Part) -> Family:
    """The family whose words a part has."""
    return _FAMILIES.get(part, "niah")


def steps_of(part: Part, length: int) -> range:
    """The sizes in which a part is drawn: the smallest that is long enough is cut to length."""
    if part == "cwe":  # an entry, three times or once, has three tokens at least
        return range(2 * _COMMON, 3 * _COMMON + length // (9 if length >= _SHORT else 3), 4)
    return range(16, max(length, 32), 8) if part == "fwe" else range(1)


def draw_part(part: Part, length: int, rng: Random, name: str, size: int) -> Drawn:
    """Draw a prompt.

    Args:
        part: one of the thirteen.
        length: tokens that it is for.
        rng: draws it; the same for every size.
        name: its cluster, where it has nothing in common with others.
        size: of `steps_of`.

    Raises:
        DataError: no documents for questions about documents.
    """
    if part in NEEDLES:
        return _needles(NEEDLES[part], length, rng, name)
    if part == "vt":
        return _variables(length, rng, name)
    if part == "cwe":
        return _common_words(length, rng, name, size)
    if part == "fwe":
        return _coded_words(length, rng, name, size)
    return _documents("squad" if part == "qa_1" else "hotpotqa", length, rng)


def _drawn(kind: _Kind, rng: Random, taken: set[str]) -> str:
    """A key or value that was not drawn yet."""
    if kind == "numbers":
        found = number(rng, 7, taken)
    elif kind == "uuids":
        found = draw(lambda: str(UUID(int=rng.getrandbits(128), version=4)), taken)
    else:
        lists = wordlist("adjective"), wordlist("noun")
        found = draw(lambda: "-".join(map(rng.choice, lists)), taken)
    taken.add(found)
    return found


def _needles(needles: Needles, length: int, rng: Random, name: str) -> Drawn:
    taken: set[str] = set()
    pairs = [
        (_drawn(needles.key, rng, taken), [_drawn(needles.value, rng, taken) for _ in range(count)])
        for count in [needles.values] * needles.keys
    ]
    sentences = [_needle(needles, key, value) for key, values in pairs for value in values]
    rng.shuffle(sentences)
    asked = rng.sample(pairs, needles.queries)
    answers = tuple(value for _, values in asked for value in values)
    place = _in_lines
    if needles.haystack == "essay":
        hay, place = essays(), _in_sentences
        depths = [depth / (_DEPTHS - 1) for depth in rng.sample(range(_DEPTHS), len(sentences))]
    else:
        depths = [rng.random() for _ in sentences]
        hay = f"{Grass().line}\n"
        if needles.haystack == "needle":
            hay = _other_needles(needles, length, rng, taken)
        hay *= -(-_CHARACTERS * length // len(hay))
    depths.sort()
    keys = [key for key, _ in asked]
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    words, kind = template("niah"), needles.value
    text, prefix = words.text, words.prefix
    if len(answers) == 1:  # RULER's own way from several to one
        kind = kind[:-1]
        text, prefix = map(_singular, (text, prefix))

    def message(keep: int, pad: str) -> str:
        context = place(hay[:keep] + pad, sentences, depths)
        return text.format(context=context, query=query, type_needle_v=kind)

    asks = {"query": query, "type_needle_v": kind}
    prefix, question = prefix.format(**asks), _after_context(text).format(**asks)
    most = min(len(hay), _CHARACTERS * length)
    return Drawn(message, most, prefix, answers, ", ".join(answers), name, question=question)


def _after_context(text: str) -> str:
    """What a template says after the context."""
    return text.partition("{context}")[2]


def _singular(text: str) -> str:
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(old, new)
    return text


def _needle(needles: Needles, key: str, value: str) -> str:
    return _NEEDLE.format(kind=needles.value, key=key, value=value)


def _other_needles(needles: Needles, length: int, rng: Random, taken: set[str]) -> str:
    """Lines like the one that is asked for, enough for the length."""
    lines: list[str] = []
    written = 0
    while written < _CHARACTERS * length:
        pair = _drawn(needles.key, rng, taken), _drawn(needles.value, rng, taken)
        lines.append(_needle(needles, *pair))
        written += len(lines[-1]) + 1
    return "\n".join(lines)


def _in_sentences(hay: str, needles: Sequence[str], depths: Sequence[float]) -> str:
    """Needles between the sentences of a text."""
    found = re.split(r"(?<=[.!?])\s+", hay.strip())
    places = [0, *(int(len(found) * depth) for depth in depths), len(found)]
    parts = [" ".join(found[first:last]) for first, last in pairwise(places)]
    return " ".join(text for pair in zip(parts, [*needles, ""], strict=True) for text in pair)[:-1]


def _in_lines(hay: str, needles: Sequence[str], depths: Sequence[float]) -> str:
    """Needles on lines of their own, before the line that is cut."""
    lines = hay.split("\n")
    count = len(lines)
    for needle, depth in zip(reversed(needles), reversed(depths), strict=True):
        lines.insert(int(count * depth), needle)
    return "\n".join(lines)


def _variables(length: int, rng: Random, name: str) -> Drawn:
    words = template("variable_tracking")

    def chain(letters: int) -> tuple[str, list[str], list[str]]:
        names: list[str] = []
        for _ in range(_HOPS + 1):
            names.append(variable(rng, names, letters))
        value = number(rng, 5)
        hops = [f"VAR {later} = VAR {earlier} " for earlier, later in pairwise(names)]
        return value, names, [f"VAR {names[0]} = {value}", *hops]

    line = f"{Grass().line}\n"
    value, names, assignments = chain(3)
    places = sorted(rng.sample(range(_EXAMPLE_LINES), _HOPS + 1))
    depths = [place / _EXAMPLE_LINES for place in places]
    context = _among_noise(line * _EXAMPLE_LINES, assignments, depths)
    asked = {"query": value, "num_v": _HOPS + 1}
    example = (
        f"{words.text.format(context=context, **asked)} {words.prefix.format(**asked)} "
        f"{' '.join(names)}\n\n\n\n"
    )
    value, names, assignments = chain(5)
    depths = sorted(rng.random() for _ in assignments)
    asked = {"query": value, "num_v": _HOPS + 1}
    hay = line * -(-_CHARACTERS * length // len(line))

    def message(keep: int, pad: str) -> str:
        context = _among_noise(hay[:keep] + pad, assignments, depths)
        return example + words.text.format(context=context, **asked)

    prefix = words.prefix.format(**asked)
    question = _after_context(words.text).format(**asked)
    answer = " ".join(names)
    return Drawn(message, len(hay), prefix, tuple(names), answer, name, question=question)


def _among_noise(noise: str, sentences: Sequence[str], depths: Sequence[float]) -> str:
    """Sentences at the beginning of lines, in their order, before the line that is cut."""
    lines = noise.splitlines(keepends=True) or [""]
    count = len(lines)
    for sentence, depth in zip(reversed(sentences), reversed(depths), strict=True):
        lines.insert(int(count * depth), sentence)
    return " ".join(lines).replace(". \n", ".\n")


def _common_words(length: int, rng: Random, name: str, size: int) -> Drawn:
    words = template("common_words_extraction")
    known = list(dict.fromkeys((*wordlist("noun"), *wordlist("adjective"), *wordlist("verb"))))
    repeats, of_example = ((30, 3), (40, 10, 3)) if length >= _SHORT else ((6, 1), (20, 3, 1))
    more = -(-size // len(known))  # where the words run out, all of them stand there more often

    def listed(count: int, often: int, seldom: int) -> tuple[list[str], list[str]]:
        chosen = rng.sample(known, count)
        entries = chosen[:_COMMON] * often + chosen[_COMMON:] * seldom
        rng.shuffle(entries)
        return chosen[:_COMMON], entries

    common, entries = listed(*of_example)
    example = (
        f"{words.text.format(context=_numbered(entries), query='')} {words.prefix}"
        f"{_numbered(common)}\n"
    )
    often, seldom = (count * more for count in repeats)
    common, entries = listed(min(size, len(known)), often, seldom)
    hay = _numbered(entries)

    def message(keep: int, pad: str) -> str:
        return example + words.text.format(context=hay[:keep] + pad, query="")

    def check(keep: int) -> bool:
        return _is_common(re.split(r" ?\d+\. ", hay[:keep])[1:], common)

    answer = _numbered(common)
    question = _after_context(words.text).format(query="")
    references = tuple(common)
    return Drawn(message, len(hay), words.prefix, references, answer, name, check, question)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def _is_common(entries: Sequence[str], common: Sequence[str]) -> bool:
    """Whether each of some words stands more often than every other one."""
    counts = Counter(entries)
    most = max((count for word, count in counts.items() if word not in common), default=0)
    return min(counts[word] for word in common) > most


def _coded_words(length: int, rng: Random, name: str, size: int) -> Drawn:
    words = template("freq_words_extraction")
    kinds: list[str] = []
    while len(kinds) < max(length // 50, 5):
        word = "".join(rng.choices(ascii_lowercase, k=_CODED))
        if word not in kinds:
            kinds.append(word)
    kinds[0] = "..."  # which stands most often and is not asked for
    whole = math.pi**2 / 6  # the zeta function at RULER's exponent, 2
    entries = [
        word for rank, word in enumerate(kinds, 1) for _ in range(int(size / rank**2 / whole))
    ]
    rng.shuffle(entries)
    hay, asked = " ".join(entries), tuple(kinds[1:4])

    def message(keep: int, pad: str) -> str:
        return words.text.format(context=hay[:keep] + pad, query="")

    def check(keep: int) -> bool:
        return _is_common([word for word in hay[:keep].split() if word != "..."], asked)

    question = _after_context(words.text).format(query="")
    answer = ", ".join(asked)
    return Drawn(message, len(hay), words.prefix, asked, answer, name, check, question)


def _documents(name: Literal["squad", "hotpotqa"], length: int, rng: Random) -> Drawn:
    words, known = template("qa"), corpus(name)
    question, answers, own, more, cluster = rng.choice(known.questions)
    others = rng.sample(range(len(known.documents)), min(len(known.documents), length // 8 + 16))
    taken = {*own, *more}
    chosen = [*own, *rng.sample(more, len(more)), *(one for one in others if one not in taken)]
    order = {one: rng.random() for one in chosen}
    texts = [known.documents[one] for one in chosen]
    ends = [0, *accumulate(map(len, texts))]

    def message(keep: int, pad: str) -> str:
        whole = bisect_right(ends, keep) - 1
        shown = dict(zip(chosen[:whole], texts, strict=False))
        if whole < len(texts) and (cut := texts[whole][: keep - ends[whole]]):
            shown[chosen[whole]] = cut
        if shown:
            shown[next(reversed(shown))] += pad
        documents = [shown[one] for one in sorted(shown, key=order.__getitem__)]
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        return words.text.format(context=context, query=question)

    def check(keep: int) -> bool:
        return keep >= ends[len(own)]

    asks = _after_context(words.text).format(query=question)
    return Drawn(message, ends[-1], words.prefix, answers, answers[0], cluster, check, asks)
