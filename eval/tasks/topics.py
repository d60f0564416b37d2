"""LongEval's topic retrieval: a conversation about many topics, of which the first is asked for.

Source: Li et al., "How Long Can Open-Source LLMs Truly Promise on Context Length?" (LongChat,
2023), coarse-grained topic retrieval.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.assembly import Prompt, answer_after, frame
from longctx.prompts.haystacks import decode

from .shared.line_packing import cut, exact
from .shared.longeval import Case, LongEval, field
from .shared.retrieval import PromptSpec
from .shared.vocabulary import topics

__all__ = ["TASK", "Topics"]

_INTRO = (
    "Below is a record of our previous conversation on different topics. You are the ASSISTANT, and"
    " I am the USER. At the beginning of each topic, the USER will say 'I would like to discuss the"
    " topic of <TOPIC>'. Memorize each <TOPIC>. At the end of the record, I will ask you to "
    "retrieve the first topic. Now the record starts."
)
_ANNOUNCED = "discuss the topic of "  # a topic, and not what <TOPIC> stands for
_QUESTION = (
    "Now the record ends. What is the first topic we discussed? Only give me the topic name."
)
_CHARACTERS = 8  # more than a token of English has
# A quotation, since a topic by itself may come with quotation marks or capitals.
_PREFIX = "The first topic began with 'I would like to discuss the topic of"
_OPENING = (
    "USER: I would like to discuss the topic of {topic}.\n"
    "ASSISTANT: Gladly. What would you like to know about it?\n"
)
_PAIRS = tuple(
    f"USER: {question}\nASSISTANT: {answer}\n"
    for question, answer in (
        (
            "Where should one begin?",
            "Most people begin with {subject} near home and go from there.",
        ),
        (
            "Is there a lot to read on it?",
            "There is. Most books on {subject} have a chapter on the {aspect}, though it is often "
            "a short one.",
        ),
        ("Who cares about it today?", "Clubs and schools do, and a growing number of families."),
        (
            "What is often misunderstood?",
            "That it is simple. Anyone who has looked into {subject} for a year or two will tell "
            "you that it takes patience.",
        ),
        (
            "How has it changed?",
            "Slowly at first, then quickly. Better transport and cheap printing brought {subject} "
            "to many more people.",
        ),
        ("Does it cost much?", "Not to start with. A notebook and some spare afternoons will do."),
        (
            "What do experts disagree on?",
            "They disagree on how much the {aspect} matters. Some put it first, others hardly "
            "mention it.",
        ),
        ("Can children take part?", "Yes, and many do: {subject} are a favourite of school trips."),
        (
            "Is there a good museum?",
            "Several. The smaller ones are the better choice, since the people there have time to "
            "answer questions.",
        ),
        (
            "What was the biggest surprise for you?",
            "How similar the accounts are from places that had nothing to do with each other.",
        ),
        ("Are there any dangers?", "Few, as long as one listens to those who know {subject} well."),
        (
            "What would you compare it to?",
            "To learning a language: the first steps are quick, the middle is long, and in the end "
            "one forgets that it was ever hard.",
        ),
        ("Does the weather matter?", "More than one would think. Rain has spoilt many a plan."),
        (
            "Do you have a favourite anecdote?",
            "A mayor once promised his town the finest {subject} in the country and had to borrow "
            "them from next door.",
        ),
        (
            "What will it look like in fifty years?",
            "Much as it does now, I suppose, with a few new tools and the same arguments.",
        ),
        ("Is it popular abroad?", "In some countries more than here, and in very different forms."),
        (
            "How do people learn it?",
            "By watching. Courses help with the {aspect}, but most of it is passed on in person.",
        ),
        ("What is the most common mistake?", "To hurry."),
        (
            "Which period was the most interesting?",
            "The decades in which nobody was sure yet what {subject} were good for.",
        ),
        ("That is really interesting.", "I think so too. There is always more to find out."),
        (
            "Could you sum that up?",
            "In short: look closely, ask around, and do not believe everything that is said about "
            "{subject}.",
        ),
        ("Is there anything you would leave out?", "The long lists of dates. Nobody needs those."),
    )
)


@dataclass(frozen=True, slots=True)
class Topics(LongEval):
    """Topic retrieval; the value of a cell is the share of first topics found.

    A generated conversation has whole exchanges only. Each prompt is a conversation of its own,
    since they differ in their first topic.
    """

    name: ClassVar[str] = "topics"

    @property
    def estimand(self) -> str:
        """What the table shows."""
        how = (
            "that greedy decoding returns after the answer's beginning (a prefix that LongEval "
            "itself does not give: there another model judges a free answer)"
        )
        if self.file:
            return (
                f"share of first topics {how}, over at most {self.samples} published prompts that "
                "have up to that many tokens, and more than the next shorter length"
            )
        return (
            f"share of {self.samples} first topics {how}, each of a conversation that fills the "
            "prompt to exactly that many tokens"
        )

    def prompt_spec(self, index: int, length: int, longest: int | None) -> PromptSpec:
        """A conversation of its own."""
        seed = self.base(length) + index
        return PromptSpec(index, seed, seed, longest if self.share_lengths else None)

    def generate(self, tokenizer: PreTrainedTokenizerBase, length: int, spec: PromptSpec) -> Prompt:
        """Whole discussions, and as much of a last one as makes the length exact."""
        size = spec.longest or length
        rng = Random(f"topics/{spec.seed}/{size}")
        order = rng.sample(topics(), len(topics()))
        first = "the {} of {}".format(*order[0])
        head, tail = frame(tokenizer, _INTRO, _QUESTION, _PREFIX, self.chat)
        tail_ids, answer_ids = answer_after(tokenizer, tail, first)
        room = length - len(head) - len(tail_ids) - len(answer_ids)
        # Longer conversations have longer discussions, up to a point.
        most = min(max(size // 400, 2), 12)
        said = [rng.sample(_PAIRS, rng.randint(most // 2 + 1, most)) for _ in order]
        written = 0
        texts: list[str] = []
        for topic, pairs in zip(order, said, strict=True):
            texts.append("".join(_fill(topic, [_OPENING, *pairs])))
            written += len(texts[-1])
            if written > _CHARACTERS * room:
                break
        ids = cut(tokenizer, texts)
        sums = [0, *accumulate(map(len, ids))]
        if sums[-1] < room and len(texts) == len(order):
            raise DataError(
                f"length={length} asks for more than the {len(order)} topics there are, which "
                f"reach to about {length - room + sums[-1]} tokens: ask for shorter ones."
            )
        for whole in range(bisect_right(sums, room) - 1, 0, -1):
            opening, *rest = cut(tokenizer, _fill(order[whole], [_OPENING, *_PAIRS]))
            chosen = exact(list(map(len, rest)), room - sums[whole] - len(opening))
            if chosen is None:
                continue
            parts = [*ids[:whole], opening, *(rest[i] for i in chosen)]
            record = (*head, *(token for part in parts for token in part), *tail_ids)
            return Prompt(
                input_ids=(*record, *answer_ids),
                answer_start=len(record),
                answer=decode(tokenizer, answer_ids),
                key=first,
                needle_starts=(len(head),),
                depth=0.0,
                haystack=f"topics@{spec.haystack_seed}",
                seed=spec.seed,
            )
        raise DataError(
            f"length={length} is too short for this prompt; it needs at least "
            f"{length - room + 2 * max(map(len, ids))} tokens with two topics. Ask for "
            "a longer one."
        )

    def case(self, record: dict[str, Any], where: str) -> Case:
        """A published prompt; its topic as the conversation spells it, which has no capital."""
        text = field(record, "prompt", str, where)
        topic = field(record, "topics", list, where)[0]
        if not isinstance(topic, str) or not topic.strip():
            raise DataError(
                f"{where} has {topic!r} as its first topic: expected a string that its prompt "
                "holds."
            )
        found = text.lower().find(topic.lower(), max(text.lower().find(_ANNOUNCED), 0))
        if found < 0:
            raise DataError(f"{where}: its prompt holds nothing of {topic!r}, its first topic.")
        return Case(text, _PREFIX, text[found : found + len(topic)], depth=found / len(text))


def _fill(topic: tuple[str, str], blocks: Sequence[str]) -> list[str]:
    """Put a topic into what is said about it."""
    aspect, subject = topic
    values = {"aspect": aspect, "subject": subject, "topic": f"the {aspect} of {subject}"}
    return [block.format(**values) for block in blocks]


TASK = Topics
