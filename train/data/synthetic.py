"""Synthetic long conversations that can only be answered by looking back: topics and lines.

    for record in conversations(200, seed=1): ...             # ShareGPT records, as `Records` reads
    python -m longctx.train.data.synthetic chats.jsonl --count 200 --shortest 8000 --longest 60000

    topics    exchanges about one topic after another; then: which came first, which after this one?
    lines     named lines with a register's content each; then: what is in line torpid-kettle?

What is asked for is disjoint from the evaluation's by construction, as keys are in
`longctx.prompts.passkey_prompts`: contents, names of lines and topics are of the split that
`split_of` tells. The same arguments give the same conversations on every platform, and the first
of 10 are those of 100.

Source of the tasks: Li et al., "How long can open-source LLMs truly promise on context length?"
(LongChat, 2023), LongEval's topics and lines.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, TypeAlias, get_args

import tyro

from longctx.errors import DataError
from longctx.prompts.passkey_prompts import Split, split_of

__all__ = ["Kind", "Synthetic", "conversations"]

Kind = Literal["topics", "lines"]
Record: TypeAlias = dict[str, Any]
Exchange: TypeAlias = tuple[str, str]

_WORDS = {
    "adjective": (
        "blunt brave bright brisk calm cedar clever coral crisp crooked dapper dusty faint fierce "
        "frosty gentle giddy golden hasty hollow humble jolly keen lanky lucid mellow misty nimble "
        "pale plucky quiet rapid rustic silent sleek stout sturdy tame tawny tepid torpid vast "
        "velvet vivid wary windy young zesty"
    ),
    "noun": (
        "badger barrel basket beacon bottle branch bridge button candle carpet castle cellar clock "
        "comet copper cricket dragon falcon feather fiddle garden hammer harbor helmet kettle "
        "ladder lantern magnet meadow mirror needle pebble pencil pigeon pillow puddle rabbit "
        "ribbon saddle shovel spider teapot tunnel turnip violin walnut window"
    ),
    "subject": (
        "apprenticeships,aqueducts,bakeries,beekeeping,bicycles,botanical gardens,canals,"
        "cathedrals,ceramics,chess clubs,city parks,clockmaking,coffee houses,coral reefs,"
        "desert farming,dictionaries,ferries,fishing villages,folk songs,fountain pens,glaciers,"
        "glassblowing,harbours,hospitals,kites,letterpress printing,libraries,lighthouses,"
        "market halls,"
        "mountain railways,night trains,observatories,orchestras,paper mills,postage stamps,"
        "public baths,puppet theatres,quilts,rice terraces,river deltas,salt mines,school kitchens,"
        "seed banks,shipyards,silk weaving,sign languages,street lamps,tea gardens,town squares,"
        "typewriters,vineyards,volcanoes,walking trails,weather stations,windmills,wooden toys"
    ),
    "aspect": (
        "architecture,cost,daily routine,decline,early history,economics,etiquette,folklore,future,"
        "geography,legal side,maintenance,materials,mathematics,music,politics,public image,"
        "rediscovery,reform,safety,sounds,teaching,terminology,tools"
    ),
}
_REPLIES = (
    "People who study {topic} usually begin with one question: what changes first, and what stays?",
    "Much of what is written about {subject} leaves the {aspect} aside, which is a pity.",
    "A good place to start is a small {adjective} town, where everybody knows somebody involved.",
    "Some compare it with a {adjective} {noun}: simple from afar, less so once taken apart.",
    "Records are patchy, yet letters and ledgers show how {subject} were talked about at the time.",
    "The {aspect} is where opinions differ most, and where a visit teaches more than a book.",
    "Beginners tend to look at {subject} all at once; it helps to take the {aspect} by itself.",
    "There were setbacks too, among them a {adjective} winter that nobody had planned for.",
    "Two views are common: that {subject} shaped their surroundings, or that it was the reverse.",
    "An old saying likens such things to a {noun} left in the rain, and there is something in it.",
    "What surprises many is how little of the {aspect} was written down by those who knew it.",
    "For a short overview that is about all; the details of {topic} could fill a long evening.",
)
_OPENINGS = (
    "I would like to talk about {topic}.",
    "Let us turn to {topic}. What should I know?",
    "Next, please tell me something about {topic}.",
    "Could you give me an overview of {topic}?",
)
_LINES_INTRO = (
    "Below is a record of lines that I want you to remember. Each line begins with 'line <name>' "
    "and holds a REGISTER_CONTENT. I will ask you about some of them afterwards.\n\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """What conversations are drawn."""

    kinds: tuple[Kind, ...] = ("topics", "lines")
    """Taken in turn."""
    shortest: int = 2_000
    """Least length, as measured."""
    longest: int = 16_000
    """Greatest length, as measured; lengths between are drawn evenly on a logarithmic scale."""
    questions: int = 3
    """Asked at the end of each conversation."""
    split: Split = "train"
    """The key space. Training must never draw from "eval"."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in get_args(Kind)]
        if unknown or not self.kinds:
            raise DataError(f"kinds={self.kinds}: pass some of {', '.join(get_args(Kind))}.")
        if not 0 < self.shortest <= self.longest or self.questions < 1:
            raise DataError(
                f"shortest={self.shortest}, longest={self.longest}, questions={self.questions}: "
                "expected 0 < shortest ≤ longest, and a question at least."
            )
        if self.split not in get_args(Split):
            raise DataError(f"split={self.split!r} is not a key space; pass 'train' or 'eval'.")


def conversations(
    count: int,
    *,
    seed: int = 0,
    settings: Synthetic | None = None,
    measure: Callable[[str], int] = len,
) -> Iterator[Record]:
    """Draw conversations in ShareGPT form.

    Args:
        count: how many.
        seed: chooses everything.
        settings: kinds, lengths, questions, split.
        measure: the length of a text: characters, or tokens with
            `lambda text: len(tokenizer(text).input_ids)`. A chat template adds some for each turn.

    Raises:
        DataError: a length too short for its questions, or more lines than there are names.
    """
    settings = settings or Synthetic()
    for number in range(count):
        kind = settings.kinds[number % len(settings.kinds)]
        rng = Random(f"synthetic/{kind}/{settings.split}/{seed}/{number}")
        size = math.exp(rng.uniform(math.log(settings.shortest), math.log(settings.longest)))
        draw = _topics if kind == "topics" else _lines
        exchanges = draw(rng, int(size), settings, measure)
        turns = [
            {"from": role, "value": text}
            for exchange in exchanges
            for role, text in zip(("human", "gpt"), exchange, strict=True)
        ]
        yield {"id": f"{kind}-{seed}-{number}", "conversations": turns}


def _topics(
    rng: Random, size: int, settings: Synthetic, measure: Callable[[str], int]
) -> list[Exchange]:
    pool = [
        f"the {aspect} of {subject}"
        for subject in _WORDS["subject"].split(",")
        for aspect in _WORDS["aspect"].split(",")
    ]
    topics = [topic for topic in pool if split_of(topic) == settings.split]
    rng.shuffle(topics)
    longest = max(topics, key=len)
    reserve = settings.questions * sum(map(measure, _about_topic([longest, longest], 1)))
    discussed: list[str] = []
    exchanges: list[Exchange] = []
    for topic in topics:
        exchange = _discussion(rng, topic, most=min(max(size // 800, 1), len(_REPLIES)))
        reserve += sum(map(measure, exchange))
        if reserve > size:
            break
        discussed.append(topic)
        exchanges.append(exchange)
    if len(discussed) < 2:
        raise DataError(f"a length of {size} holds no two topics and their questions: pass more.")
    places = _spread(rng, len(discussed), settings.questions)
    return exchanges + [_about_topic(discussed, place) for place in places]


def _discussion(rng: Random, topic: str, most: int) -> Exchange:
    aspect, subject = topic.removeprefix("the ").split(" of ", 1)
    chosen = rng.sample(_REPLIES, rng.randint(1, most))
    reply = " ".join(
        sentence.format(
            topic=topic,
            subject=subject,
            aspect=aspect,
            adjective=rng.choice(_WORDS["adjective"].split()),
            noun=rng.choice(_WORDS["noun"].split()),
        )
        for sentence in chosen
    )
    return rng.choice(_OPENINGS).format(topic=topic), reply


def _about_topic(topics: list[str], place: int) -> Exchange:
    if place == 0:
        asked = "Which topic did we discuss first? Give me its name only."
        return asked, f"The first topic was {topics[0]}."
    before = topics[place - 1]
    asked = f"Which topic did we discuss directly after {before}? Give me its name only."
    return asked, f"After {before} we discussed {topics[place]}."


def _lines(
    rng: Random, size: int, settings: Synthetic, measure: Callable[[str], int]
) -> list[Exchange]:
    pool = [
        f"{adjective}-{noun}"
        for adjective in _WORDS["adjective"].split()
        for noun in _WORDS["noun"].split()
    ]
    names = [name for name in pool if split_of(name) == settings.split]
    rng.shuffle(names)
    longest = max(names, key=len)
    reserve = measure(_LINES_INTRO) + settings.questions * sum(
        map(measure, _about_line(longest, "00000"))
    )
    contents: dict[str, str] = {}
    written = _LINES_INTRO
    for name in names:
        content = _content(rng, settings.split)
        line = f"line {name}: REGISTER_CONTENT is <{content}>\n"
        reserve += measure(line)
        if reserve > size:
            break
        contents[name] = content
        written += line
    else:
        raise DataError(f"a length of {size} asks for more lines than the {len(names)} names.")
    if len(contents) < 2:
        raise DataError(f"a length of {size} holds no two lines and their questions: pass more.")
    asked = [list(contents)[place] for place in _spread(rng, len(contents), settings.questions)]
    exchanges = [_about_line(name, contents[name]) for name in asked]
    return [(f"{written}\n{exchanges[0][0]}", exchanges[0][1]), *exchanges[1:]]


def _about_line(name: str, content: str) -> Exchange:
    question = f"What is the REGISTER_CONTENT in line {name}? Give me the content only."
    return question, f"The REGISTER_CONTENT in line {name} is <{content}>."


def _content(rng: Random, split: Split) -> str:
    while True:
        content = str(rng.randrange(10_000, 100_000))
        if split_of(content) == split:
            return content


def _spread(rng: Random, size: int, count: int) -> list[int]:
    """Places of which each lies in its own equal share of `size`, in random order."""
    edges = [round(i * size / count) for i in range(count + 1)]
    places = [rng.randrange(a, max(a + 1, b)) for a, b in pairwise(edges)]
    rng.shuffle(places)
    return [min(place, size - 1) for place in places]


@dataclass(frozen=True, slots=True)
class Write:
    """Write synthetic conversations to a JSONL file."""

    out: tyro.conf.Positional[Path]
    """File to write; .jsonl or .jsonl.xz."""
    count: int = 100
    """How many."""
    seed: int = 0
    """Chooses everything."""
    settings: Annotated[Synthetic, tyro.conf.arg(name="")] = field(default_factory=Synthetic)

    def run(self) -> None:
        """Write the file whole, or not at all."""
        drawn = conversations(self.count, seed=self.seed, settings=self.settings)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in drawn).encode()
        packed = lzma.compress(lines, preset=9) if self.out.suffix == ".xz" else lines
        self.out.write_bytes(packed)


if __name__ == "__main__":
    tyro.cli(Write, description=__doc__).run()
