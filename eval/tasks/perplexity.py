"""Perplexity at each length, read off one pass wherever that is exact.

A window of the longest length is scored once per document. Where a token's logits do not depend on
what follows (`length_invariant`), its first L tokens are scored exactly as they would be alone, so
that the figures of all shorter lengths can be read off. The figure at L is taken over the `last`
tokens before L; the mean over all tokens before L stands beside it, and dilutes a collapse.

With `stride` the same target tokens are scored at every length, in windows that slide over them
(Press et al. 2021, arXiv:2108.12409, section B), at the price of a pass per length and window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.haystacks import bos_of
from longctx.scoring.batching import score_batches
from longctx.scoring.token_scores import TokenScores

from ..stats.intervals import mean_interval, perplexity_of
from .protocol import Measured, Observation, Plan, Summary, Unit
from .texts import digest, documents_of, spread, texts_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Perplexity"]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of real text; the value of a cell is exp(mean NLL), every token counting alike."""

    last: int = 128
    """Target tokens per window: the last ones before each length."""
    windows: int = 10
    """Windows at most, spread over the documents. None reaches into a second document, and no two
    share a token."""
    stride: int | None = None
    """None: the targets are those before each length, other tokens at each. A number of tokens
    that divides `last`: the same targets at every length, each with at least length − stride
    tokens before it."""
    text: tuple[str, ...] = ()
    """Files or folders, a document per file; none means the embedded held-out documents."""

    name: ClassVar[str] = "perplexity"
    scale: ClassVar[Literal["share", "perplexity"]] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    figure: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for name in ("last", "windows"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise DataError(
                    f"{name}={getattr(self, name)!r}: expected a whole number, 1 or more."
                )
        if self.stride is not None and (self.stride < 1 or self.last % self.stride):
            raise DataError(
                f"stride={self.stride} does not divide last={self.last}: pass a number of tokens "
                "that does."
            )

    @property
    def estimand(self) -> str:
        """What the table shows."""
        if self.stride is None:
            targets = (
                f"the last {self.last} tokens before each length: at one length all methods are "
                "scored on the same tokens, different lengths on different tokens of the same "
                "documents"
            )
        else:
            targets = (
                f"the same {self.last} tokens per window at every length, each after at least "
                f"length − {self.stride} tokens (stride {self.stride})"
            )
        return f"exp(mean NLL) over {targets}"

    def cache_key(self) -> dict[str, Any]:
        """Settings that a unit's figures depend on; its text is in the unit's own spec."""
        settings = dataclasses.asdict(self)
        return {key: settings[key] for key in ("last", "stride")}

    def report_identity(self) -> dict[str, Any]:
        """Beside those settings, how many windows of which documents."""
        documents = [digest(document) for document in texts_of(self.text).documents]
        return {**self.cache_key(), "windows": self.windows, "text": documents}

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """One unit per window (all lengths) or, where it must be, per window and length."""
        if min(lengths) <= self.last:
            raise DataError(
                f"a length of {min(lengths)} tokens is too short for last={self.last} targets: "
                f"ask for more than {self.last}, or pass a smaller `last`."
            )
        longest = max(lengths)
        documents = documents_of(tokenizer, texts_of(self.text))
        size = longest - len(bos_of(tokenizer)) + (self.last - self.stride if self.stride else 0)
        places = spread({name: len(ids) for name, ids in documents.items()}, size, self.windows)
        short = sum(len(ids) < size for ids in documents.values())
        if not places:
            raise DataError(
                f"no document is long enough for a window of {size} tokens: the longest of "
                f"{len(documents)} has {max(map(len, documents.values()))}. Ask for shorter "
                "lengths or pass longer texts (one document per file)."
            )
        notes = (
            f"perplexity: {short} of {len(documents)} documents are shorter than {size} tokens and "
            "left out",
        )
        units: list[Unit] = []
        for name, start in places:
            spec: dict[str, Any] = {"document": name}
            if self.stride is not None:
                spec["end"] = start + longest - len(bos_of(tokenizer))  # of the first window
                count = self.last // self.stride
                units += [Unit((length,), length * count, spec) for length in lengths]
            else:
                whole = Unit(tuple(lengths), longest, {**spec, "start": start})
                units += [whole] if length_invariant else whole.by_length()
        return Plan(tuple(units), notes if short else ())

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
        documents, bos = documents_of(tokenizer, texts_of(self.text)), bos_of(tokenizer)
        ids = documents[unit.spec["document"]]
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
                nll=float(nll[length - 1 - self.last : length - 1].sum()),
                targets=self.last,
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

    def _slide(
        self,
        model: PreTrainedModel,
        unit: Unit,
        ids: tuple[int, ...],
        bos: tuple[int, ...],
        batch_tokens: int,
    ) -> Measured:
        assert self.stride is not None
        (length,) = unit.lengths
        name, first = unit.spec["document"], unit.spec["end"]
        ends = range(first, first + self.last - self.stride + 1, self.stride)
        windows = [(*bos, *ids[end - length + len(bos) : end]) for end in ends]
        scores = score_batches(
            model, torch.tensor(windows), start=length - self.stride, batch_tokens=batch_tokens
        )
        nll = float(scores.nll.double().sum())
        item = f"{name}@{first}"
        found = Observation(length, item, name, nll, self.last, detail={"end": first})
        context = torch.arange(length - self.stride, length).repeat(len(windows))
        index = torch.arange(first - self.stride, first - self.stride + self.last)
        table = _per_token(name, length, index, context, scores)
        return Measured((found,), length * len(windows), "sliding windows", table)

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        """Exponential of the token-weighted mean NLL, and of its interval's ends."""
        mean, low, high = mean_interval(
            [o.nll for o in observations],
            [o.targets for o in observations],
            [o.cluster for o in observations],
        )
        documents = len({o.cluster for o in observations})
        prefix = None
        if self.stride is None and observations:
            nll = math.fsum(o.detail["prefix_nll"] for o in observations)
            prefix = perplexity_of(nll / sum(o.detail["prefix_targets"] for o in observations))
        name = f"t over {documents} documents, 95%" if documents > 1 else "none: one document"
        low = low if math.isnan(low) else max(low, 0.0)  # no perplexity is below 1
        return Summary(perplexity_of(mean), perplexity_of(low), perplexity_of(high), name, prefix)


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
