"""Perplexity at each length, read off one pass wherever that is exact.

A window of the longest length is scored once per document. Where a token's logits do not depend on
what follows (`length_invariant`), its first L tokens are scored exactly as they would be alone, so
that the figures of all shorter lengths can be read off. The figure at L is taken over the `last`
tokens before L; the mean over all tokens before L stands beside it, and dilutes a collapse.

With `stride` the same target tokens are scored at every length, in windows that slide over them
(Press et al. 2021, arXiv:2108.12409, section B), at the price of a pass per length and window. With
`last=None` these are all tokens of a document, as papers print it, S = 256 in Position
Interpolation (Chen et al. 2023, arXiv:2306.15595, section 3.2) and in YaRN (Peng et al. 2023,
arXiv:2309.00071, section 4.3.1). What YaRN's script computes, over a document's first L tokens in
one window, is the prefix perplexity, which has a line of its own; it averages the perplexities of
documents (`average="windows"`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.scoring.batching import score_batches
from longctx.scoring.compressed_caches import CompressedCache
from longctx.scoring.over_cache import score_over_cache
from longctx.scoring.token_scores import TokenScores

from ..stats.intervals import mean_interval, perplexity_of, too_few
from .shared.protocol import Measured, Observation, Plan, Summary, Unit
from .shared.sliding import score_last
from .shared.texts import bos_before, digest, documents_of, place_windows, texts_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["TASK", "Perplexity"]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of real text; the value of a cell is exp(mean NLL), every token counting alike."""

    last: int | None = 128
    """Target tokens per window: the last ones before each length. None: all of them, which with
    `stride` are all tokens of a document, from its first."""
    windows: int = 10
    """Windows at most, spread over the documents. None reaches into a second document, and no two
    share a token."""
    stride: int | None = None
    """None: the targets are those before each length, other tokens at each. A number of tokens: the
    same targets at every length, in windows that slide by so many, so that each target has at least
    length − stride tokens before it (or all there are)."""
    limit: int | None = None
    """With last=None and a stride: tokens of a document that are read at most."""
    bos: bool | None = None
    """Put a BOS before each window, which then has a token of text less; None: if the tokenizer
    puts one before a text."""
    average: Literal["tokens", "windows"] = "tokens"
    """"tokens": exp of the mean NLL, every token counting alike. "windows": the mean of each
    window's perplexity, as YaRN's script has it with a window per document."""
    text: tuple[str, ...] = ()
    """Files or folders, a document per file; none means the embedded held-out documents."""

    name: ClassVar[str] = "perplexity"
    scale: ClassVar[Literal["share", "perplexity"]] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    figure: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for name in ("last", "windows", "stride", "limit"):
            value = getattr(self, name)
            if value is None and name != "windows":
                continue
            if type(value) is not int or value < 1:
                raise DataError(f"{name}={value!r}: expected a whole number, 1 or more.")
        if self.average not in ("tokens", "windows"):
            raise DataError(f"average={self.average!r}: expected tokens or windows.")
        if self.limit is not None and not self._whole:
            raise DataError(
                f"limit={self.limit} is for whole documents: pass last=None and a stride, or leave "
                "it out."
            )

    @property
    def _whole(self) -> bool:
        """Whether windows slide over whole documents."""
        return self.last is None and self.stride is not None

    @property
    def estimand(self) -> str:
        """What the table shows."""
        last = "all" if self.last is None else f"the last {self.last}"
        if self._whole:
            upto = "" if self.limit is None else f", up to its token {self.limit:,}"
            targets = (
                f"all tokens of each document{upto}, the same at every length, in windows of that "
                f"many tokens which slide by {self.stride} (stride S = {self.stride})"
            )
        elif self.stride is None:
            targets = (
                f"{last} tokens before each length: at one length all methods are scored on the "
                "same tokens, different lengths on different tokens of the same documents"
            )
        else:
            targets = (
                f"the same {self.last} tokens per window at every length, each after at least "
                f"length − {self.stride} tokens (stride {self.stride})"
            )
        with_bos = {None: "", True: "; a BOS before each window", False: "; without a BOS"}
        over = (
            "mean over windows of exp(mean NLL)" if self.average == "windows" else "exp(mean NLL)"
        )
        return f"{over} over {targets}{with_bos[self.bos]}"

    def cache_key(self) -> dict[str, Any]:
        """Settings that a unit's figures depend on; its text is in the unit's own spec."""
        settings = dataclasses.asdict(self)
        since = {key: settings[key] for key in ("bos", "limit") if settings[key] is not None}
        return {**{key: settings[key] for key in ("last", "stride")}, **since}

    def report_identity(self) -> dict[str, Any]:
        """Beside those settings, how many windows of which documents."""
        documents = [digest(document) for document in texts_of(self.text).documents]
        summed = {} if self.average == "tokens" else {"average": self.average}
        return {**self.cache_key(), "windows": self.windows, "text": documents, **summed}

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """One unit per window (all lengths) or, where it must be, per window and length."""
        if self.last is not None and min(lengths) <= self.last:
            raise DataError(
                f"a length of {min(lengths)} tokens is too short for last={self.last} targets: "
                f"ask for more than {self.last}, or pass a smaller `last`."
            )
        longest, bos = max(lengths), bos_before(tokenizer, self.bos)
        documents = documents_of(tokenizer, texts_of(self.text))
        size = longest - len(bos)
        sizes = {name: len(ids) for name, ids in documents.items()}
        if self._whole:
            sizes = {name: min(count, size) for name, count in sizes.items()}  # one each
            if self.limit is not None and self.limit < size:
                raise DataError(
                    f"limit={self.limit} is below the longest length, {longest}: pass more."
                )
        elif self.last is not None and self.stride is not None:
            size += max(self.last - self.stride, 0)
        places, notes = place_windows(self.name, sizes, size, self.windows)
        units: list[Unit] = []
        for name, start in places:
            spec: dict[str, Any] = {"document": name}
            if self._whole:
                tokens = self._read(documents[name])
                for length in lengths:
                    count = len(list(self._windows(len(tokens), length, bos)))
                    units.append(Unit((length,), length * count, spec))
            elif self.stride is not None:
                assert self.last is not None
                spec["end"] = start + longest - len(bos)  # of the first window
                count = -(-self.last // self.stride)
                units += [Unit((length,), length * count, spec) for length in lengths]
            else:
                whole = Unit(tuple(lengths), longest, {**spec, "start": start})
                units += [whole] if length_invariant else whole.by_length()
        return Plan(tuple(units), notes)

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        *,
        batch_tokens: int,
        length_invariant: bool,
    ) -> Measured:
        """Score one window at all its lengths."""
        del length_invariant  # the plan has seen to it
        documents, bos = (
            documents_of(tokenizer, texts_of(self.text)),
            bos_before(tokenizer, self.bos),
        )
        ids = documents[unit.spec["document"]]
        if self._whole:
            return self._slide_over_all(model, unit, self._read(ids), bos, batch_tokens)
        if self.stride is not None:
            return self._slide(model, unit, ids, bos, batch_tokens)
        name, start, longest = unit.spec["document"], unit.spec["start"], max(unit.lengths)
        window = (*bos, *ids[start : start + longest - len(bos)])
        scores = score_batches(model, torch.tensor([window]), start=1, batch_tokens=batch_tokens)
        nll = scores.nll[0].double()  # nll[i] belongs to position i + 1
        found = [
            Observation(
                length,
                item=f"{name}@{start}",
                cluster=name,
                nll=float(nll[length - 1 - (self.last or length - 1) : length - 1].sum()),
                targets=self.last or length - 1,
                detail={
                    "start": start,
                    "prefix_nll": float(nll[: length - 1].sum()),
                    "prefix_targets": length - 1,
                },
            )
            for length in unit.lengths
        ]
        context = torch.arange(1, longest)
        table = _per_token(name, longest, context + start - len(bos), context, scores)
        return Measured(tuple(found), longest, "one pass", table)

    def cache_obstacle(self, tokenizer: PreTrainedTokenizerBase, unit: Unit) -> str | None:
        """Targets that are not the last ones of one window."""
        del tokenizer, unit
        if self.stride is None and self.last is not None:
            return None
        return "only the tokens before a length (stride=None, a number as last) have one context"

    def measure_over_cache(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        cache: CompressedCache,
    ) -> Measured:
        """Score the last tokens over what the cache keeps of those before them, one by one."""
        assert self.last is not None, "the sweep refuses other settings"
        documents, bos = (
            documents_of(tokenizer, texts_of(self.text)),
            bos_before(tokenizer, self.bos),
        )
        (length,) = unit.lengths
        name, start = unit.spec["document"], unit.spec["start"]
        window = (*bos, *documents[name][start : start + length - len(bos)])
        first = length - self.last  # a target; the token before it is read over the cache
        if first < 2:
            raise DataError(
                f"length={length} leaves no context before last={self.last} targets to be kept in "
                f"{cache}: ask for at least {self.last + 2} tokens."
            )
        scores = score_over_cache(model, window, cache, context_end=first - 1, start=first)
        nll = float(scores.nll.double().sum())
        one = Observation(length, f"{name}@{start}", name, nll, self.last, detail={"start": start})
        how = f"context in {cache}"
        return Measured((one,), scores.tokens, how, cache_bytes=scores.cache_bytes)

    def _slide(
        self,
        model: PreTrainedModel,
        unit: Unit,
        ids: tuple[int, ...],
        bos: tuple[int, ...],
        batch_tokens: int,
    ) -> Measured:
        assert self.stride is not None
        assert self.last is not None
        (length,) = unit.lengths
        name, first = unit.spec["document"], unit.spec["end"]
        stride = min(self.stride, self.last)
        begin = first - stride  # the first target
        ends = [*range(first, begin + self.last, stride), begin + self.last]
        windows = [(*bos, *ids[end - length + len(bos) : end]) for end in ends]
        new = [stride] * (len(ends) - 1) + [self.last - stride * (len(ends) - 1)]
        scores = score_last(model, windows, new, batch_tokens)
        item = f"{name}@{first}"
        found = Observation(
            length, item, name, float(scores.nll.double().sum()), self.last, detail={"end": first}
        )
        context = torch.cat([torch.arange(length - count, length) for count in new])
        table = _per_token(name, length, torch.arange(begin, begin + self.last), context, scores)
        return Measured((found,), length * len(windows), "sliding windows", table)

    def _slide_over_all(
        self,
        model: PreTrainedModel,
        unit: Unit,
        ids: tuple[int, ...],
        bos: tuple[int, ...],
        batch_tokens: int,
    ) -> Measured:
        """Each window scores what the one before it did not reach; nothing predicts token 0."""
        (length,) = unit.lengths
        name = unit.spec["document"]
        places = list(self._windows(len(ids), length, bos))
        windows = [(*bos, *ids[first:last]) for first, last, _ in places]
        new = [count for *_, count in places]
        new[0] -= not bos
        scores = score_last(model, windows, new, batch_tokens)
        targets = sum(new)
        nll = float(scores.nll.double().sum())
        found = Observation(length, f"{name}@0", name, nll, targets, detail={"end": len(ids)})
        context = torch.cat(
            [
                torch.arange(len(window) - count, len(window))
                for window, count in zip(windows, new, strict=True)
            ]
        )
        index = torch.arange(len(ids) - targets, len(ids))
        table = _per_token(name, length, index, context, scores)
        return Measured((found,), sum(map(len, windows)), "sliding windows", table)

    def _windows(
        self, tokens: int, length: int, bos: tuple[int, ...]
    ) -> Iterator[tuple[int, int, int]]:
        """First token, token after the last, and tokens that no window before it holds.

        Before the first of these stands a BOS or a token that the window before it holds: where
        the stride is no shorter than a window, windows slide by less.
        """
        assert self.stride is not None
        done = 0
        for first in range(0, tokens, min(self.stride, length - 1)):
            last = min(first + length - len(bos), tokens)
            yield first, last, last - done
            done = last
            if last == tokens:
                return

    def _read(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """What is read of a document."""
        return ids if self.limit is None else ids[: self.limit]

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        """Exponential of the token-weighted mean NLL and of its interval's ends, or their mean."""
        clusters = [o.cluster for o in observations]
        documents = len(set(clusters))
        name = too_few(documents, "document") or f"t over {documents} documents, 95%"
        whole = [(o.nll, o.targets) for o in observations]
        figures = self._averaged(whole, clusters)
        prefix = None
        if observations and all("prefix_nll" in o.detail for o in observations):
            before = [(o.detail["prefix_nll"], o.detail["prefix_targets"]) for o in observations]
            prefix = self._averaged(before, clusters)[0]
        return Summary(*figures, name, prefix)

    def _averaged(
        self, sums: Sequence[tuple[float, float]], clusters: Sequence[str]
    ) -> tuple[float, float, float]:
        """Perplexity and its interval, from NLL and targets of each window."""
        if self.average == "windows":
            each = [perplexity_of(nll / targets) for nll, targets in sums]
            mean, low, high = mean_interval(each, [1.0] * len(each), clusters)
            return mean, low if math.isnan(low) else max(low, 1.0), high
        nll, targets = [a for a, _ in sums], [b for _, b in sums]
        mean, low, high = mean_interval(nll, targets, clusters)
        low = low if math.isnan(low) else max(low, 0.0)  # no perplexity is below 1
        return perplexity_of(mean), perplexity_of(low), perplexity_of(high)


def _per_token(
    document: str, length: int, index: Tensor, context: Tensor, scores: TokenScores
) -> pa.Table:
    """A row per target: where it stands, how much was before it, what it is, its NLL."""
    import pyarrow as pa

    columns = {
        "index": index.to(torch.int32),
        "context": context.to(torch.int32),
        "token": scores.targets.flatten().to(torch.int32),
        "nll": scores.nll.flatten(),
    }
    table = pa.table({name: column.numpy() for name, column in columns.items()})
    constant = {"document": pa.repeat(document, len(index))}
    constant["length"] = pa.repeat(pa.scalar(length, pa.int32()), len(index))
    for place, (name, column) in enumerate(constant.items()):
        table = table.add_column(place, name, column)
    return table


TASK = Perplexity
