"""Repetition in what a model writes: continuations of real text, generated after each length.

Windows of one document end at the same token whatever their length, so that the model goes on from
the same place with more or less before it. What the text itself says next is measured beside it:
manuals and code repeat themselves too.

Source: Welleck et al. 2020 (arXiv:1908.04319), section 6, for seq-rep-4 of greedy continuations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from longctx.errors import DataError
from longctx.prompts.haystacks import bos_of
from longctx.scoring.batching import shrinking
from longctx.scoring.greedy import greedy

from ..stats.intervals import mean_interval
from .protocol import Measured, Observation, Plan, Summary, Unit
from .repetition_metrics import distinct_n, diversity, loop_onset, rep_l, seq_rep_n, uniq
from .texts import digest, documents_of, spread, texts_of

__all__ = ["Repetition"]

_RECENT = 128  # tokens that rep/l looks back; the paper has 16, 32, 128 and 512
_TEXT = 2000  # characters of a continuation that are kept

_Window: TypeAlias = tuple[str, int]
"""A document, and the place in it that its prompts end before."""


@dataclass(frozen=True, slots=True)
class Repetition:
    """Repetition in continuations; the value of a cell is the mean seq-rep-4, a share.

    The observations carry no NLL: that of a model's own words says how sure it is of itself, and
    would be taken for the perplexity of a text.
    """

    new_tokens: int = 256
    """Tokens to generate after each prompt, at most."""
    windows: int = 10
    """Prompts per length at most, spread over the documents; no document has two before each that
    is long enough has one."""
    temperature: float = 0.0
    """0: greedy. Else sampled, with draws of its own for each window: the same for every method and
    length, and whatever the batch."""
    top_p: float = 1.0
    """Sample among the fewest tokens that hold this share of the probability."""
    seed: int = 0
    """Of the draws."""
    ignore_eos: bool = True
    """Go on after a token that ends the text, so that all continuations are equally long: a short
    one repeats less, and one that ends at once nothing at all. Else they end before it."""
    text: tuple[str, ...] = ()
    """Files or folders, a document per file; none means the embedded held-out documents."""

    name: ClassVar[str] = "repetition"
    scale: ClassVar[Literal["share", "perplexity"]] = "share"
    higher_is_better: ClassVar[bool] = False
    figure: ClassVar[str | None] = "seq_rep_4"

    def __post_init__(self) -> None:
        if self.new_tokens < 4 or self.windows < 1:
            raise DataError(
                f"new_tokens={self.new_tokens}, windows={self.windows}: expected at least 4 tokens "
                "(a 4-gram) and one window."
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise DataError(f"temperature={self.temperature}: expected 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p={self.top_p}: expected more than 0 and at most 1.")
        if self.top_p < 1 and not self.temperature:
            raise DataError(
                f"top_p={self.top_p} has no effect on greedy decoding: set temperature."
            )

    @property
    def estimand(self) -> str:
        """What the table shows."""
        draws = f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"
        how = f"sampled ({draws})" if self.temperature else "greedy"
        end = "" if self.ignore_eos else ", or as many as come before the end of text,"
        return (
            f"mean share of 4-grams that stood before in the same continuation, over {how} "
            f"continuations of {self.new_tokens} tokens{end} after real text of exactly each "
            "length"
        )

    def cache_key(self) -> dict[str, Any]:
        """Settings, and the documents by their content."""
        documents = [digest(document) for document in texts_of(self.text).documents]
        return {**dataclasses.asdict(self), "text": documents}

    def report_identity(self) -> dict[str, Any]:
        """The same: a cell's figure depends on nothing else."""
        return self.cache_key()

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """One unit per length, all its windows."""
        del length_invariant  # nothing is shared between lengths
        bos, documents = len(bos_of(tokenizer)), documents_of(tokenizer, texts_of(self.text))
        if min(lengths) <= bos:
            raise DataError(f"a length of {min(lengths)} tokens leaves no room for text.")
        size = max(lengths) - bos + self.new_tokens
        sizes = {name: len(ids) for name, ids in documents.items()}
        places = spread(sizes, size, self.windows)
        short = sum(length < size for length in sizes.values())
        if not places:
            raise DataError(
                f"no document is long enough for a prompt of {max(lengths)} tokens and the "
                f"{self.new_tokens} after it: the longest of {len(sizes)} has "
                f"{max(sizes.values())}. Ask for shorter lengths or pass longer texts (one "
                "document per file)."
            )
        windows = [[name, start + size - self.new_tokens] for name, start in places]
        note = f"repetition: {short} of {len(sizes)} documents, below {size} tokens, are left out"
        units = [
            Unit((length,), (length + self.new_tokens) * len(windows), {"windows": windows})
            for length in lengths
        ]
        return Plan(tuple(units), (note,) if short else ())

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        *,
        batch_tokens: int,
        length_invariant: bool,
    ) -> Measured:
        """Generate the continuations of one length."""
        del length_invariant
        (length,) = unit.lengths
        documents, bos = documents_of(tokenizer, texts_of(self.text)), bos_of(tokenizer)
        windows: list[_Window] = [(name, end) for name, end in unit.spec["windows"]]
        prompts = torch.tensor(
            [[*bos, *documents[name][end - length + len(bos) : end]] for name, end in windows]
        )
        ends = set() if self.ignore_eos else _ends(model, tokenizer)

        def run(first: int, last: int) -> list[Observation]:
            seeds = [f"{self.seed}/{name}@{end}" for name, end in windows[first:last]]
            pick = _Pick(self.temperature, self.top_p, seeds)
            said = greedy(model, prompts[first:last], self.new_tokens, ends=ends, pick=pick)
            return [
                self._observe(tokenizer, length, window, documents[window[0]], tokens, ends, broken)
                for window, tokens, broken in zip(
                    windows[first:last], said.tolist(), pick.broken.tolist(), strict=True
                )
            ]

        size = max(1, batch_tokens // (length + self.new_tokens))
        found = [o for part in shrinking(len(windows), size, run) for o in part]
        tokens = sum(length + o.detail["tokens"] for o in found)
        return Measured(tuple(found), tokens, "generated")

    def _observe(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        window: _Window,
        document: tuple[int, ...],
        tokens: list[int],
        ends: set[int],
        broken: bool,
    ) -> Observation:
        name, end = window
        stop = next((i for i, token in enumerate(tokens) if token in ends), None)
        said = tokens[:stop]
        detail: dict[str, Any] = {
            "end": end,
            "tokens": len(said),
            "stopped": "length" if stop is None else "eos",
            **{f"seq_rep_{n}": seq_rep_n(said, n) for n in (1, 2, 3, 4)},
            **{f"distinct_{n}": distinct_n(said, n) for n in (1, 2, 3, 4)},
            "diversity": diversity(said),
            "uniq": uniq(said),
            # Within the continuation: what is taken from the prompt is not a repetition of its own.
            f"rep_{_RECENT}": rep_l(said, [document[end - 1], *said[:-1]] if said else [], _RECENT),
            "text_seq_rep_4": seq_rep_n(document[end : end + self.new_tokens], 4),
            "text": tokenizer.decode(said)[:_TEXT],
        }
        if self.temperature:
            detail["seed"] = self.seed
        onset = loop_onset(said)
        if onset is not None:  # left out where there is none: a recorded null is read as NaN
            detail["loop_onset"] = onset
        nll = math.nan if broken else 0.0
        return Observation(length, f"{name}@{end}", name, nll, targets=0, detail=detail)

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        """The mean seq-rep-4, every continuation counting alike."""
        shares = [math.nan if math.isnan(o.nll) else o.detail["seq_rep_4"] for o in observations]
        clusters = [o.cluster for o in observations]
        mean, low, high = mean_interval(shares, [1.0] * len(shares), clusters)
        documents = len(set(clusters))
        if math.isnan(mean):
            return Summary(mean, math.nan, math.nan, "none")
        if documents < 2:
            return Summary(mean, math.nan, math.nan, "none: one document")
        if len(set(shares)) == 1:  # no spread to tell from: not a certainty
            return Summary(mean, math.nan, math.nan, "none: all alike")
        name = f"t over {documents} documents, 95%"
        return Summary(mean, max(0.0, low), min(1.0, high), name)


class _Pick(LogitsProcessor):
    """What `generate` takes the argmax of: logits, or logits that are drawn with.

    The argmax of log p − log E, with E drawn from the exponential distribution for each token, is
    a sample from p (Gumbel's trick). Each row has a generator, so that batches do not matter.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[str]) -> None:
        self.broken = torch.zeros(len(seeds), dtype=torch.bool)
        """Rows whose logits held a NaN or an infinity."""
        self._generators: list[torch.Generator] = []
        self._warpers = LogitsProcessorList()
        if temperature:
            numbers = [Random(f"repetition/{seed}").getrandbits(63) for seed in seeds]
            self._generators = [torch.Generator().manual_seed(number) for number in numbers]
            self._warpers.append(TemperatureLogitsWarper(temperature))
            if top_p < 1:
                self._warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.broken |= ~scores.logsumexp(-1).isfinite().cpu()
        if not self._generators:
            return scores
        logits: Tensor = self._warpers(input_ids, scores)  # pyright: ignore[reportArgumentType]
        size = scores.shape[-1]
        draws = torch.stack([
            torch.empty(size, dtype=torch.float64).exponential_(generator=generator)
            for generator in self._generators
        ])  # fmt: skip
        return logits - draws.log().to(logits)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text: the checkpoint's generation settings may name several."""
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    several: list[int | None] = named if isinstance(named, list) else [named]
    own: Any = tokenizer.eos_token_id
    return {token for token in (*several, own) if token is not None}
