"""LongEval's line retrieval: a record of named lines, of which one is asked for.

Source: Li et al., "How Long Can Open-Source LLMs Truly Promise on Context Length?" (LongChat,
2023), fine-grained line retrieval.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.assembly import Prompt, answer_after, frame
from longctx.prompts.haystacks import decode
from longctx.scoring.continuations import continue_prompts

from .shared.answering import said_by, stops_of
from .shared.line_packing import cut, fit
from .shared.longeval import Case, LongEval, field
from .shared.protocol import Measured, Observation, UnderWay, Unit
from .shared.retrieval import PromptSpec, depth_grid, details_of, names_of, thin_grid, turn_of
from .shared.vocabulary import names, number

__all__ = ["TASK", "Lines"]

_INTRO = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' "
    "and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line"
    " index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will ask "
    "you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record "
    "start:\n"
)
_QUESTION = (
    "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {}? I need the number."
)
_FREE = 100  # tokens of a free answer: LongEval's
_PREFIX = "The <REGISTER_CONTENT> in line {} is <"  # whether brackets are repeated is not asked


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    content: str
    ids: tuple[int, ...]


@lru_cache(maxsize=4)
def _record(
    tokenizer: PreTrainedTokenizerBase, size: int, seed: int
) -> tuple[_Line, tuple[_Line, ...]]:
    """The last line of a record, and those before it: more than `size` tokens if names suffice."""
    rng = Random(f"lines/{seed}/{size}")
    drawn = rng.sample(names(), len(names()))
    pairs = [(name, number(rng, 5)) for name in drawn]
    texts = [f"line {name}: REGISTER_CONTENT is <{content}>\n" for name, content in pairs]
    shortest = min(map(len, cut(tokenizer, texts[:64])))
    texts = texts[: size // shortest + 256]  # more to choose from
    ids = cut(tokenizer, texts)
    last, *lines = (_Line(*pair, tokens) for pair, tokens in zip(pairs, ids, strict=False))
    return last, tuple(lines)


@dataclass(frozen=True, slots=True)
class Lines(LongEval):
    """Line retrieval; the value of a cell is the share of contents found.

    A generated record has whole lines only. Its prompts ask for a line at each depth and share all
    lines but the last few, which make the length exact.
    """

    depths: int | None = 10
    """So many depths, evenly from the first line to the last. Prompts go through them in one record
    before the next record is begun. None draws each at random, in a record of its own."""
    free: bool = False
    """As published: the model answers freely, in up to 100 tokens and without a beginning given,
    and the last number of what it says counts. Else the answer's beginning is given, and the number
    must follow at once, which takes no generating."""

    name: ClassVar[str] = "lines"

    def __post_init__(self) -> None:
        LongEval.__post_init__(self)
        if self.depths is not None and self.depths < 1:
            raise DataError(f"depths={self.depths}: expected at least one, or None for random.")

    @property
    def estimand(self) -> str:
        """What the table shows."""
        how = (
            "whose number is the last one of a free greedy answer of up to 100 tokens (LongEval's "
            "rule)"
            if self.free
            else "that greedy decoding returns after the answer's beginning (a prefix that LongEval"
            " itself does not give)"
        )
        if self.file:
            return (
                f"share of line contents {how}, over at most {self.samples} published prompts that "
                "have up to that many tokens, and more than the next shorter length"
            )
        count = len(self._grid())
        where = "random depths" if self.depths is None else f"{count} depth{'s' * (count > 1)}"
        return (
            f"share of {self.samples} line contents {how}, at {where} of a record that fills the "
            "prompt to exactly that many tokens"
        )

    def cache_key(self) -> dict[str, Any]:
        """All settings; those of results from before `free` was one stay as they were."""
        key = LongEval.cache_key(self)
        return key if self.free else {name: key[name] for name in key if name != "free"}

    def measure_from(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        under_way: UnderWay,
        *,
        batch_tokens: int,
        length_invariant: bool,
    ) -> Measured:
        """Score the contents of a unit's prompts, or let the model answer freely."""
        how: Any = {"batch_tokens": batch_tokens, "length_invariant": length_invariant}
        if not self.free:
            return LongEval.measure_from(self, model, tokenizer, unit, under_way, **how)
        cases = self.cases(tokenizer, unit)
        prompts, asked = [prompt for _, _, prompt in cases], names_of(cases)

        def finished(row: int, said: tuple[int, ...] | None, tokens: int) -> None:
            under_way.add([self._answered(tokenizer, *cases[row], said)], tokens)

        found = continue_prompts(
            model,
            [prompt.input_ids[: prompt.answer_start] for prompt in prompts],
            new_tokens=[_FREE] * len(prompts),
            stop=stops_of(model, tokenizer),
            drafts=[prompt.answer_ids for prompt in prompts],
            length_invariant=length_invariant,
            known=under_way.known(asked),
            finished=finished,
        )
        return under_way.measured(asked, f"generated, {found.how}")

    def _answered(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        spec: PromptSpec,
        prompt: Prompt,
        said: tuple[int, ...] | None,
    ) -> Observation:
        """A free answer, of which the last number counts."""
        detail = {**details_of(length, spec, prompt), "new_tokens": _FREE}
        correct = None
        if said is not None:
            text = said_by(tokenizer, said)
            numbers = re.findall(r"\d+", text)
            correct = bool(numbers) and int(numbers[-1]) == int(prompt.key)
            detail |= {"said": text, "said_ids": list(said)}
        nll = math.nan if said is None else 0.0
        cluster = self.cluster(spec, prompt)
        return Observation(length, str(spec.index), cluster, nll, 0, correct, detail)

    def prompt_spec(self, index: int, length: int, longest: int | None) -> PromptSpec:
        """A line at each depth of one record, then the next record."""
        seed = self.base(length)
        record, depth = turn_of(index, seed + index, self._grid())
        return PromptSpec(
            index=index,
            seed=seed + index,
            haystack_seed=seed + record,
            longest=longest if self.share_lengths else None,
            depth=depth,
        )

    def generate(self, tokenizer: PreTrainedTokenizerBase, length: int, spec: PromptSpec) -> Prompt:
        """A line of its own for each depth, put there in a record of whole lines.

        Raises:
            DataError: too few lines for that, or more than there are.
        """
        last, lines = _record(tokenizer, spec.longest or length, spec.haystack_seed)
        sizes = [len(line.ids) for line in lines]
        head, tail, answer = self._around(tokenizer, last)
        room = length - len(head) - len(tail) - len(answer) - len(last.ids)
        count = bisect_right(list(accumulate(sizes)), room)
        least = max(len(self._grid()) - 1, 1)  # so that each depth has a line of its own
        too_short = (
            f"length={length} is too short for this prompt; it needs about "
            f"{length - room + max(least + 1, 8) * max(sizes)} tokens, which whole lines can fill, "
            "with one of its own for each depth. Ask for a longer one, or for fewer samples."
        )
        if count < least:
            raise DataError(too_short)
        row = round(spec.depth * count)
        asked = last if row == count else lines[row]
        head, tail, answer = self._around(tokenizer, asked)
        room = length - len(head) - len(tail) - len(answer) - len(last.ids)
        others = list(lines)
        if asked is not last:
            del others[row]
            room -= len(asked.ids)
        sizes = [len(line.ids) for line in others]
        if room > sum(sizes):
            raise DataError(
                f"length={length} asks for more lines than the {len(names())} names there are, "
                f"which reach to about {length - room + sum(sizes)} tokens: ask for shorter ones."
            )
        chosen = fit(sizes, room)
        if chosen is None:
            raise DataError(too_short)
        record = [*(others[i] for i in chosen), last]
        if asked is not last:
            sums = [0, *accumulate(len(line.ids) for line in record)]
            wanted = spec.depth * sums[-1]
            record.insert(min(range(len(record)), key=lambda i: abs(sums[i] - wanted)), asked)
        before = sum(len(line.ids) for line in record[: record.index(asked)])
        ids = [*head, *(token for line in record for token in line.ids), *tail]
        return Prompt(
            input_ids=(*ids, *answer),
            answer_start=len(ids),
            answer=decode(tokenizer, answer),
            key=asked.content,
            needle_starts=(len(head) + before,),
            depth=before / sum(len(line.ids) for line in record if line is not asked),
            haystack=f"lines@{spec.haystack_seed}",
            seed=spec.seed,
            needle_stop=len(head) + before + len(asked.ids),
        )

    def _around(
        self, tokenizer: PreTrainedTokenizerBase, asked: _Line
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """What stands before the record and after it, and the answer."""
        question, prefix = _QUESTION.format(asked.name), self._prefix(asked.name)
        head, tail = frame(tokenizer, _INTRO, question, prefix, self.chat)
        tail = tail if prefix else tail.rstrip(" ")
        return head, *answer_after(tokenizer, tail, asked.content, space=self._space(tail))

    def _prefix(self, name: str) -> str:
        """What the answer begins with."""
        return "" if self.free else _PREFIX.format(name)

    def _space(self, tail: str) -> str:
        """What stands between the end of a prompt and the number, were it said at once."""
        return " " if self.free and not tail[-1:].isspace() else ""

    def case(self, record: dict[str, Any], where: str) -> Case:
        """A published prompt."""
        text = field(record, "prompt", str, where)
        name = str(field(record, "random_idx", list, where)[0])
        content = field(record, "expected_number", int, where)
        found = text.find(f"line {name}:")
        if found < 0:
            raise DataError(f"{where}: its prompt holds no 'line {name}:', which it asks for.")
        line = text[found:].partition("\n")[0]
        if f"<{content}>" not in line:
            raise DataError(
                f"{where}: it expects {content}, but its prompt says {line!r:.80}: fetch the file "
                "again, or delete that test case."
            )
        space = " " if self.free else ""
        return Case(text, self._prefix(name), f"{content}", space, depth=found / len(text))

    def plan_notes(self) -> list[str]:
        """Whether all depths are reached."""
        return thin_grid(self.name, self.samples, self.depths)

    def _grid(self) -> list[float]:
        return [] if self.depths is None else depth_grid(self.depths, self.samples)


TASK = Lines
