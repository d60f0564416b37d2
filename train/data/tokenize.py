"""Token ids and labels of conversations and texts, cut to a length where conversations allow it.

    encoder = Encoder(tokenizer, chat_template(tokenizer), TokenizeSettings(max_length=16_384))
    rows = encoder({"record": [1], "roles": [["user", "assistant"]], "texts": [["Hi", "Hello!"]]})
    dataset.map(encoder, batched=True, num_proc=8, remove_columns=dataset.column_names)

A label is the token's own id where the model speaks, the end token included, and −100 elsewhere;
transformers shifts labels itself. White space after the end token is not a label: nobody generates
it. Every sample is rendered on its own, so that it is exactly what the template makes of its turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.rendering import EndlessTemplateError

from .chat_template import ChatTemplate, PrefixError, Rendered
from .conversations import REASONS, tidy
from .data_report import COUNTS
from .endings import IGNORED, control_tokens
from .token_places import Places, across_of
from .turns import Turn

__all__ = ["IGNORED", "Encoder", "Overflow", "TokenizeSettings"]

Ints: TypeAlias = NDArray[np.int64]
Overflow = Literal["continue", "drop", "cut"]


@dataclass(frozen=True, slots=True)
class TokenizeSettings:
    """How conversations become samples."""

    max_length: int = 16_384
    """Most tokens of a sample."""
    overflow: Overflow = "continue"
    """What happens to a longer conversation. It is cut between exchanges, its system turn kept, and
    the rest goes on as a new sample (continue) or is dropped (drop); an exchange too long on its
    own is left out. Or LongChat's: its first max_length tokens, wherever they end (cut)."""
    template: str | None = None
    """"vicuna", the path of a Jinja file, or the tokenizer's own."""
    strict: bool = False
    """Refuse conversations out of order or with blank turns, instead of tidying and counting."""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise DataError(
                f"max_length={self.max_length}: pass the tokens of a sample, 2 or more."
            )
        if self.overflow not in get_args(Overflow):
            known = ", ".join(get_args(Overflow))
            raise DataError(f"overflow={self.overflow!r} is not known; pass one of {known}.")


Settings = TokenizeSettings  # the earlier name, kept for scripts that were written against it


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A rendered conversation in tokens."""

    ids: Ints
    labels: Ints
    ends: Ints
    """Tokens up to the end of each exchange."""


@dataclass(slots=True)
class _Job:
    """A conversation on its way to samples."""

    record: int
    turns: tuple[Turn, ...]
    variables: dict[str, Any]
    counts: dict[str, int]
    unused: list[str]
    whole: Rendered | None = None
    """The conversation in one text."""
    answers: list[int] | None = None
    """The turns that become a sample each, where the template does not preserve prefixes."""


class Encoder:
    """Turns batches of conversations into rows of ids and labels; a function for `datasets.map`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | None,
        settings: TokenizeSettings,
        *,
        skip_bad: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} cannot say which characters a token stands for: use "
                "a fast tokenizer (tokenizer.json)."
            )
        self.settings = settings
        self._tokenizer = tokenizer
        self._template = template
        self._skip_bad = skip_bad
        ends = control_tokens(tokenizer)
        self._end_ids = frozenset(ends)
        self._special = re.compile("|".join(map(re.escape, ends.values()))) if ends else None

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Encode conversations.

        Args:
            batch: columns "record" (a number), "roles" and "texts" (of its turns). Where they are
                there, also "learnt" and "fields" (of its turns, see `Turn`; empty lists for none),
                "variables" (JSON of what the template is given beside) and "unused" (names).

        Returns:
            Columns "record", "input_ids", "labels", "length", "counts" and "unused" (names of
            fields that nothing was made of). A conversation has at least one row, for its counts,
            if need be with no tokens.

        Raises:
            DataError: names the record.
        """
        jobs = list(map(self._read, *_columns(batch)))
        whole = iter(self._encoded([job.whole.text for job in jobs if job.whole]))
        rows: dict[str, list[Any]] = {
            name: [] for name in ("record", "input_ids", "labels", "length", "counts", "unused")
        }
        for job in jobs:
            found = next(whole) if job.whole else None
            samples: list[tuple[Ints, Ints]] = []
            try:
                for ids, labels in self._samples(job, found):
                    supervised = int((labels[1:] != IGNORED).sum())
                    if not supervised:
                        job.counts["unsupervised"] += 1
                        job.counts["dropped"] += len(ids)
                        continue
                    job.counts["samples"] += 1
                    job.counts["kept"] += len(ids)
                    job.counts["supervised"] += supervised
                    samples.append((ids, labels))
            except DataError as error:
                self._refuse(job, error)
                samples = []
            empty = np.empty(0, dtype=np.int64)
            totals = np.array([job.counts[name] for name in COUNTS], dtype=np.int64)
            for ids, labels in samples or [(empty, empty)]:
                rows["record"].append(job.record)
                rows["input_ids"].append(ids.astype(np.int32))
                rows["labels"].append(labels.astype(np.int32))
                rows["length"].append(len(ids))
                rows["counts"].append(totals)
                rows["unused"].append(job.unused)
                totals, job.unused = np.zeros_like(totals), []
        return rows

    def _read(
        self,
        record: int,
        roles: list[Any],
        texts: list[str],
        learnt: list[bool],
        fields: list[str],
        variables: str,
        unused: list[str],
    ) -> _Job:
        """Tidy and render a conversation, or find what becomes of it instead."""
        turns = tuple(
            map(Turn, roles, texts, learnt or [True] * len(roles), fields or [""] * len(roles))
        )
        given: dict[str, Any] = json.loads(variables) if variables else {}
        counts = dict.fromkeys(COUNTS, 0) | {"conversations": 1}
        job = _Job(record, turns, given, counts, list(unused))
        if turns and turns[0].role == "document":
            return job
        try:
            self._tidy(job, variables)
            if job.turns:
                self._render(job)
        except DataError as error:
            self._refuse(job, error)
        return job

    def _refuse(self, job: _Job, error: DataError) -> None:
        """Leave a conversation out if that is wanted, or name it in the error."""
        if isinstance(error, EndlessTemplateError) or not self._skip_bad:
            raise DataError(f"record {job.record}: {error}") from error
        job.turns, job.whole, job.answers = (), None, None
        job.counts = dict.fromkeys(COUNTS, 0) | {"conversations": 1, "refused": 1}

    def _tidy(self, job: _Job, variables: str) -> None:
        count, strict = len(job.turns), self.settings.strict
        tidied = tidy(job.turns, special=self._special)
        for reason, index in tidied.left_out:
            if strict:
                raise DataError(
                    f"turn {index + 1} of {count} is {REASONS[reason]}: expected an optional "
                    "system turn, then questions and answers in turn. Mend it, or leave strict "
                    "off to have such turns left out and counted."
                )
            job.counts[reason] += 1
        job.turns = tidied.turns
        if job.turns and self._special and self._special.search(variables):
            if strict:
                raise DataError("its tools spell one of the tokenizer's special tokens.")
            job.counts["special"] += len(job.turns)
            job.turns = ()
        answers = [turn for turn in job.turns if turn.role == "assistant"]
        job.counts["masked"] += sum(not turn.learnt for turn in answers)
        if not any(turn.learnt for turn in answers):
            if strict and not answers:
                raise DataError("no assistant turn: there is nothing to learn from; remove it.")
            job.counts["untaught"] += 1
            job.turns = ()

    def _render(self, job: _Job) -> None:
        """Render a conversation whole, or find that each answer needs a text of its own."""
        tools = "tools" in job.variables or any(
            turn.role == "tool" or "tool_calls" in turn.extra for turn in job.turns
        )
        template = self._template
        if template is None:
            raise DataError("a conversation needs a chat template, and none was given.")
        unused: list[str] = []
        try:
            try:
                job.whole = template.render(job.turns, job.variables)
                unused = self._unused(job, job.turns, job.whole.text)
            except PrefixError:
                roles = [turn.role == "assistant" and turn.learnt for turn in job.turns]
                job.answers = [index for index, answer in enumerate(roles) if answer]
                for index in job.answers:  # what one sample does not use, another may
                    turns = job.turns[: index + 1]
                    text = template.render_last(turns, job.variables).text
                    found = self._unused(job, turns, text)
                    unused = found if index == job.answers[0] else [n for n in unused if n in found]
        except EndlessTemplateError:
            raise
        except DataError:
            if not tools or self.settings.strict:
                raise
            unused = ["tool"]
        if "tool" in unused or "call" in unused:
            if self.settings.strict:
                raise DataError("the chat template does not write the tools that it uses.")
            job.counts["unwritten"] += 1
            job.turns, job.whole, job.answers = (), None, None
            return
        job.unused += ["a system turn" if name == "system" else name for name in unused]

    def _unused(self, job: _Job, turns: tuple[Turn, ...], text: str) -> list[str]:
        plain = all(turn.role in ("user", "assistant") and not turn.fields for turn in turns)
        if plain and not job.variables:
            return []
        found = cast(ChatTemplate, self._template).unused(turns, job.variables, text)
        return list(dict.fromkeys(found))

    def _samples(self, job: _Job, found: Encoding | None) -> Iterator[tuple[Ints, Ints]]:
        counts, turns = job.counts, job.turns
        if turns and turns[0].role == "document":
            yield from self._document(turns[0].text, counts)
        elif job.answers:
            yield from self._singly(job)
        elif job.whole and found is not None:
            whole = self._tokens(job.whole, turns, found)
            counts["tokens"] += len(whole.ids)
            if len(whole.ids) <= self.settings.max_length:
                yield whole.ids, whole.labels
            elif self.settings.overflow == "cut":
                yield from self._cut(whole.ids, whole.labels, counts)
            else:
                yield from self._divide(job, whole)

    def _cut(self, ids: Ints, labels: Ints, counts: dict[str, int]) -> Iterator[tuple[Ints, Ints]]:
        size = self.settings.max_length
        counts["cut"] += 1
        counts["dropped"] += len(ids) - size
        yield ids[:size], labels[:size]

    def _divide(self, job: _Job, whole: _Tokens) -> Iterator[tuple[Ints, Ints]]:
        """Cut between exchanges; as many to a sample as fit."""
        system, exchanges = _exchanges(job.turns)
        sizes = np.diff(whole.ends, prepend=0)
        first, done, kept = 0, 0, 0
        while first < len(sizes):
            # An estimate from the whole, with room for what the template puts before a first turn.
            room = self.settings.max_length + 64
            last = first + int(np.searchsorted(np.cumsum(sizes[first:]), room, side="right")) - 1
            sample = None
            while last >= first:
                part = (*system, *chain.from_iterable(exchanges[first : last + 1]))
                sample = self._encode(part, job.variables)
                if len(sample.ids) <= self.settings.max_length:
                    break
                last -= 1
            if sample is not None and last >= first:
                kept += int(sizes[first : last + 1].sum())
                yield sample.ids, sample.labels
                done += 1
                first = last + 1
            else:
                job.counts["too_long"] += 1
                first += 1
            if self.settings.overflow == "drop":
                break
        job.counts["continued"] += done > 1
        job.counts["dropped"] += len(whole.ids) - kept

    def _singly(self, job: _Job) -> Iterator[tuple[Ints, Ints]]:
        """A sample for each answer, after as many of the exchanges before it as fit."""
        size, overflow = self.settings.max_length, self.settings.overflow
        job.counts["single"] += 1
        first = 0  # exchange of the sample before: the next has no more room
        for index in cast(list[int], job.answers):
            system, exchanges = _exchanges(job.turns[: index + 1])
            whole = sample = self._encode(job.turns[: index + 1], job.variables, last=True)
            job.counts["tokens"] += len(whole.ids)
            while overflow == "continue" and len(sample.ids) > size and first < len(exchanges):
                part = (*system, *chain.from_iterable(exchanges[first:]))
                sample = self._encode(part, job.variables, last=True) if first else whole
                first += len(sample.ids) > size
            if len(sample.ids) <= size:
                job.counts["dropped"] += len(whole.ids) - len(sample.ids)
                yield sample.ids, sample.labels
            elif overflow == "cut":
                yield from self._cut(sample.ids, sample.labels, job.counts)
            else:
                job.counts["too_long"] += 1
                job.counts["dropped"] += len(whole.ids)

    def _encode(
        self, turns: tuple[Turn, ...], variables: dict[str, Any], *, last: bool = False
    ) -> _Tokens:
        template = cast(ChatTemplate, self._template)
        rendered = (template.render_last if last else template.render)(turns, variables)
        (found,) = self._encoded([rendered.text])
        return self._tokens(rendered, turns[-1:] if last else turns, found)

    def _encoded(self, texts: list[str]) -> list[Encoding]:
        """Tokens of texts, on all cores."""
        if not texts:
            return []
        found = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return cast(list[Encoding], found.encodings)

    def _tokens(self, rendered: Rendered, turns: tuple[Turn, ...], found: Encoding) -> _Tokens:
        """Ids and labels. Where a token lies across the end of a prompt, it is tokenised in two."""
        places = Places.of(rendered, found)
        across = [] if places else across_of(rendered, found)
        if across:
            edges = [0, *across, len(rendered.text)]
            pieces = self._encoded([rendered.text[a:b] for a, b in pairwise(edges)])
            places = Places.of_pieces(rendered, pieces, edges)
        places = places or Places.of_pieces(rendered, [found], [0, len(rendered.text)])
        labels = np.full_like(places.ids, IGNORED)
        answers = [turn for turn in turns if turn.role == "assistant"]
        for turn, first, after in zip(answers, places.firsts, places.afters, strict=True):
            if turn.learnt:
                last = self._end_token(rendered.text, places, first, after)
                labels[first : last + 1] = places.ids[first : last + 1]
        ends = [
            place for answer, place in zip(_closing(turns), places.afters, strict=True) if answer
        ]
        return _Tokens(places.ids, labels, np.array(ends))

    def _end_token(self, text: str, places: Places, first: int, after: int) -> int:
        """The last token that the model writes: what follows it is white space, if anything."""
        name = cast(ChatTemplate, self._template).name
        if after <= first:
            raise DataError(
                f"the chat template of {name} writes nothing of an answer: there is nothing to "
                "learn. Pass another template (--template vicuna, or a Jinja file)."
            )
        last = after - 1
        while last > first and int(places.ids[last]) not in self._end_ids:
            if not text[slice(*places.characters(last))].isspace():
                break
            last -= 1
        if int(places.ids[last]) not in self._end_ids:
            begin, end = places.characters(first)[0], places.characters(after - 1)[1]
            raise DataError(
                f"the chat template of {name} ends an answer with {text[begin:end][-24:]!r}, no "
                "end token: the model would not learn to stop. Pass a template that does "
                "(--template vicuna)."
            )
        return last

    def _document(self, text: str, counts: dict[str, int]) -> Iterator[tuple[Ints, Ints]]:
        """Plain text, all of it learnt, with the tokenizer's BOS before each piece and EOS last."""
        if not text or text.isspace():
            counts["blank"] += 1
            counts["untaught"] += 1
            return
        tokenised = self._tokenizer(text, verbose=False, split_special_tokens=True)
        encoded = cast(list[int], tokenised["input_ids"])
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        head = encoded[:1] if encoded[:1] == [bos] else []
        body = encoded[len(head) :] + ([] if eos is None or encoded[-1:] == [eos] else [eos])
        room = self.settings.max_length - len(head)
        counts["tokens"] += len(head) + len(body)
        pieces = [body[i : i + room] for i in range(0, len(body), room)]
        if len(pieces) > 1 and self.settings.overflow != "continue":
            counts["cut"] += 1
            counts["dropped"] += len(body) - room
            del pieces[1:]
        counts["continued"] += len(pieces) > 1
        for piece in pieces:
            ids = np.array(head + piece, dtype=np.int64)
            yield ids, np.concatenate([[IGNORED], ids[1:]])  # nothing predicts the first token


def _columns(batch: Mapping[str, list[Any]]) -> Iterator[list[Any]]:
    """The columns of a batch in the order of `Encoder._read`, empty where they are not there."""
    count = len(batch["record"])
    for name in ("record", "roles", "texts", "learnt", "fields", "variables", "unused"):
        yield batch.get(name) or [[] if name != "variables" else ""] * count


def _exchanges(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], list[list[Turn]]]:
    """The system turn, if there is one, and each question with all that answers it."""
    system = turns[: turns[0].role == "system"]
    exchanges: list[list[Turn]] = []
    for turn in turns[len(system) :]:
        if turn.role == "user":
            exchanges.append([])
        exchanges[-1].append(turn)
    return system, exchanges


def _closing(turns: tuple[Turn, ...]) -> list[bool]:
    """For each answer, whether it is the last one of its exchange."""
    return [
        index + 1 == len(turns) or turns[index + 1].role == "user"
        for index, turn in enumerate(turns)
        if turn.role == "assistant"
    ]
