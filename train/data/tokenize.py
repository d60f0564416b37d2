"""Token ids and labels of conversations and texts, cut to a length where conversations allow it.

    encoder = Encoder(tokenizer, chat_template(tokenizer), TokenizeSettings(max_length=16_384))
    rows = encoder({"record": [1], "roles": [["user", "assistant"]], "texts": [["Hi", "Hello!"]]})
    dataset.map(encoder, batched=True, num_proc=8, remove_columns=dataset.column_names)

A label is the token's own id where the model speaks, the end token included, and −100 elsewhere;
transformers shifts labels itself. White space after the end token is not a label: nobody generates
it. Every sample is rendered on its own, so that it is exactly what the template makes of its turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError

from .chat_template import ChatTemplate, Rendered
from .conversations import REASONS, Turn, tidy
from .data_report import COUNTS

__all__ = ["IGNORED", "Encoder", "Overflow", "TokenizeSettings"]

Ints: TypeAlias = NDArray[np.int64]
Overflow = Literal["continue", "drop", "cut"]

IGNORED = -100
"""Label of a token that is not learnt."""


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


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A rendered conversation in tokens."""

    ids: Ints
    labels: Ints
    starts: Ints
    """First character of each token in the rendered text."""
    stops: Ints
    """The character after its last."""
    ends: Ints
    """Tokens up to the end of each exchange."""


class Encoder:
    """Turns batches of conversations into rows of ids and labels; a function for `datasets.map`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | None,
        settings: TokenizeSettings,
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} cannot say which characters a token stands for: use "
                "a fast tokenizer (tokenizer.json)."
            )
        self.settings = settings
        self._tokenizer = tokenizer
        self._template = template
        added = tokenizer.added_tokens_decoder
        ends = {number: str(token.content) for number, token in added.items() if token.special}
        if tokenizer.eos_token_id is not None:
            ends[int(cast(int, tokenizer.eos_token_id))] = str(tokenizer.eos_token)
        self._end_ids = frozenset(ends)
        self._special = re.compile("|".join(map(re.escape, ends.values()))) if ends else None

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Encode conversations.

        Args:
            batch: columns "record" (a number), "roles" and "texts" (of its turns).

        Returns:
            Columns "record", "input_ids", "labels", "length" and "counts". A conversation has at
            least one row, for its counts, if need be with no tokens.

        Raises:
            DataError: names the record.
        """
        rows: dict[str, list[Any]] = {
            name: [] for name in ("record", "input_ids", "labels", "length", "counts")
        }
        records = zip(batch["record"], batch["roles"], batch["texts"], strict=True)
        for record, roles, texts in records:
            turns = tuple(map(Turn, roles, texts))
            counts = dict.fromkeys(COUNTS, 0) | {"conversations": 1}
            samples: list[tuple[Ints, Ints]] = []
            try:
                for ids, labels in self._samples(turns, counts):
                    supervised = int((labels[1:] != IGNORED).sum())
                    if not supervised:
                        counts["unsupervised"] += 1
                        counts["dropped"] += len(ids)
                        continue
                    counts["samples"] += 1
                    counts["kept"] += len(ids)
                    counts["supervised"] += supervised
                    samples.append((ids, labels))
            except DataError as error:
                raise DataError(f"record {record}: {error}") from error
            empty = np.empty(0, dtype=np.int64)
            totals = np.array([counts[name] for name in COUNTS], dtype=np.int64)
            for ids, labels in samples or [(empty, empty)]:
                rows["record"].append(record)
                rows["input_ids"].append(ids.astype(np.int32))
                rows["labels"].append(labels.astype(np.int32))
                rows["length"].append(len(ids))
                rows["counts"].append(totals)
                totals = np.zeros_like(totals)
        return rows

    def _samples(
        self, turns: tuple[Turn, ...], counts: dict[str, int]
    ) -> Iterator[tuple[Ints, Ints]]:
        if turns and turns[0].role == "document":
            yield from self._document(turns[0].text, counts)
            return
        tidied = tidy(turns, special=self._special)
        for reason, index in tidied.left_out:
            if self.settings.strict:
                raise DataError(
                    f"turn {index + 1} of {len(turns)} is {REASONS[reason]}: expected an optional "
                    "system turn, then questions and answers in turn. Mend it, or leave strict "
                    "off to have such turns left out and counted."
                )
            counts[reason] += 1
        if not tidied.turns:
            if self.settings.strict:
                raise DataError("no assistant turn: there is nothing to learn from; remove it.")
            counts["untaught"] += 1
            return
        whole = self._encode(tidied.turns)
        counts["tokens"] += len(whole.ids)
        if len(whole.ids) <= self.settings.max_length:
            yield whole.ids, whole.labels
        elif self.settings.overflow == "cut":
            yield from self._cut(whole.ids, whole.labels, counts)
        else:
            yield from self._divide(tidied.turns, whole, counts)

    def _cut(self, ids: Ints, labels: Ints, counts: dict[str, int]) -> Iterator[tuple[Ints, Ints]]:
        size = self.settings.max_length
        counts["cut"] += 1
        counts["dropped"] += len(ids) - size
        yield ids[:size], labels[:size]

    def _divide(
        self, turns: tuple[Turn, ...], whole: _Tokens, counts: dict[str, int]
    ) -> Iterator[tuple[Ints, Ints]]:
        """Cut between exchanges; as many to a sample as fit."""
        system = turns[: turns[0].role == "system"]
        sizes = np.diff(whole.ends, prepend=0)
        first, done, kept = 0, 0, 0
        while first < len(sizes):
            # An estimate from the whole, with room for what the template puts before a first turn.
            room = self.settings.max_length + 64
            last = first + int(np.searchsorted(np.cumsum(sizes[first:]), room, side="right")) - 1
            sample = None
            while last >= first:
                part = system + turns[len(system) + 2 * first : len(system) + 2 * (last + 1)]
                sample = self._encode(part)
                if len(sample.ids) <= self.settings.max_length:
                    break
                last -= 1
            if sample is not None and last >= first:
                kept += int(sizes[first : last + 1].sum())
                yield sample.ids, sample.labels
                done += 1
                first = last + 1
            else:
                counts["too_long"] += 1
                first += 1
            if self.settings.overflow == "drop":
                break
        counts["continued"] += done > 1
        counts["dropped"] += len(whole.ids) - kept

    def _encode(self, turns: tuple[Turn, ...]) -> _Tokens:
        if self._template is None:
            raise DataError("a conversation needs a chat template, and none was given.")
        rendered = self._template.render(turns)
        tokens = self._tokenise(rendered, ())
        # A token across the end of a prompt: the prompt is tokenised alone, as it is when served.
        begin = np.array([start for start, _ in rendered.spans])
        at = np.searchsorted(tokens.starts, begin, side="right") - 1
        across = begin[(tokens.starts[at] < begin) & (tokens.stops[at] > begin)]
        return self._tokenise(rendered, tuple(map(int, across))) if len(across) else tokens

    def _tokenise(self, rendered: Rendered, borders: tuple[int, ...]) -> _Tokens:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        edges = [0, *borders, len(rendered.text)]
        for begin, end in pairwise(edges):
            encoded = self._tokenizer(
                rendered.text[begin:end],
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            ids += cast(list[int], encoded["input_ids"])
            found = cast(list[tuple[int, int]], encoded["offset_mapping"])
            offsets += [(a + begin, b + begin) for a, b in found] if begin else found
        flat = np.array(ids, dtype=np.int64)
        starts, stops = np.array(offsets, dtype=np.int64).T
        labels = np.full_like(flat, IGNORED)
        ends: list[int] = []
        for start, end in rendered.spans:
            first = int(np.searchsorted(starts, start))
            after = int(np.searchsorted(starts, end))
            last = self._end_token(rendered.text, flat, starts, stops, first, after)
            labels[first : last + 1] = flat[first : last + 1]
            ends.append(after)
        return _Tokens(flat, labels, starts, stops, np.array(ends))

    def _end_token(
        self, text: str, ids: Ints, starts: Ints, stops: Ints, first: int, after: int
    ) -> int:
        """The last token that the model writes: what follows it is white space, if anything."""
        last = after - 1
        while last > first and int(ids[last]) not in self._end_ids:
            if not text[starts[last] : stops[last]].isspace():
                break
            last -= 1
        if int(ids[last]) not in self._end_ids:
            raise DataError(
                f"the chat template of {cast(ChatTemplate, self._template).name} ends an answer "
                f"with {text[starts[first] : stops[after - 1]][-24:]!r}, no end token: the model "
                "would not learn to stop. Pass a template that does (--template vicuna)."
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
