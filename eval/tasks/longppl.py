"""LongPPL: perplexity over the tokens that a long context helps with.

    LongPPL(x; θ, θ₀) = exp(− Σᵢ Î(xᵢ; θ₀) log p_θ(xᵢ | x₁ … xᵢ₋₁)),   Î = I / Σⱼ I(xⱼ; θ₀)
    I(xᵢ; θ₀) = 1  where  LSD_θ₀(xᵢ) > α  and  log p_θ₀(xᵢ | lᵢ) > β,  else 0

θ is the model that is measured and θ₀ the evaluator, which chooses the tokens; LSD and the two
contexts stand in `shared/key_tokens.py`. Most tokens are as easy without what stands far before
them, and perplexity is a mean over all: it stands beside the figure as "prefix".

What differs from the paper and its code (PKU-ML/LongPPL):

- The mean is over the key tokens of all documents; there it is one of each document, and these
  averaged. For one window they are the same.
- A BOS that a tokenizer puts before a text stands before the short contexts too; there it is before
  the whole text alone, so that a short context also lacks its BOS. `bos=False` leaves out both.
- With another tokenizer than the evaluator's, a token counts if its characters lie within those of
  key tokens in a row. White space at its ends does not matter here; there it does.

Source: Fang et al. 2024, "What is Wrong with Perplexity for Long-context Language Modeling?"
(arXiv:2410.23771), section 3.1 and appendix A.1; α, β, K and d as there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.fingerprint import json_digest, tokenizer_digest
from longctx.registry import parse_methods
from longctx.scoring.batching import score_batches

from ..stats.intervals import mean_interval, perplexity_of, too_few
from .shared.key_tokens import Alignment, Evaluator, KeyRule, evaluator_of, offsets_of
from .shared.protocol import Measured, Observation, Plan, Summary, Unit
from .shared.texts import bos_before, digest, documents_of, place_windows, texts_of

if TYPE_CHECKING:
    from ..results.sweep_result import Row

__all__ = ["TASK", "LongPpl"]


@dataclass(frozen=True, slots=True)
class LongPpl:
    """Perplexity over key tokens; the value of a cell is exp(mean NLL) of those before its length.

    The keys of a window are chosen once, by the evaluator's reading of all of it (the longest
    length), and are the same for every method and model.
    """

    evaluator: str | None = None
    """Whose scores choose the tokens: a checkpoint folder, hub id, GGUF file, or "demo". It should
    read the longest length well. None: what is measured chooses for itself, so that methods are
    measured on tokens of their own and cannot be compared."""
    evaluator_method: str = "none"
    """The method that the evaluator reads with, as --methods takes it."""
    short: int = 4096
    """K: tokens of the short context. Lengths must be above it."""
    step: int | None = None
    """d: so many tokens in a row have short contexts that begin at one place, of K to K + d − 1
    tokens. None: a quarter of K, which is the paper's 1,024 of 4,096."""
    alpha: float = 2.0
    """α: nats that a key's log-probability gains from the long context, more than."""
    beta: float = -2.0
    """β: a key's log-probability with the long context, more than."""
    windows: int = 10
    """Windows at most, spread over the documents. None reaches into a second document, and no two
    share a token."""
    bos: bool | None = None
    """Put a BOS before each window, which then has a token of text less; None: if the tokenizer
    puts one before a text."""
    text: tuple[str, ...] = ()
    """Files or folders, a document per file; none means the embedded held-out documents."""

    name: ClassVar[str] = "longppl"
    scale: ClassVar[Literal["share", "perplexity"]] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    figure: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for name in ("short", "step", "windows"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and (name, value) != ("step", None):
                raise DataError(f"{name}={value!r}: expected a whole number, 1 or more.")
        for name in ("alpha", "beta"):
            if not math.isfinite(getattr(self, name)):
                raise DataError(f"{name}={getattr(self, name)!r}: expected a finite number.")
        if self.evaluator is None and parse_methods(self.evaluator_method):
            raise DataError(
                f"evaluator_method={self.evaluator_method!r} is for an evaluator: name one "
                "(--evaluator MODEL), or leave it out."
            )

    @property
    def _rule(self) -> KeyRule:
        step = self.step or max(1, self.short // 4)
        return KeyRule(self.short, step, self.alpha, self.beta)

    @property
    def _evaluator(self) -> Evaluator | None:
        if self.evaluator is None:
            return None
        return evaluator_of(self.evaluator, self.evaluator_method)

    @property
    def estimand(self) -> str:
        """What the table shows."""
        if self.evaluator is None:
            who = "the model finds under each method, so that each has tokens of its own"
        else:
            by = parse_methods(self.evaluator_method)
            how = f" under {self.evaluator_method}" if by else ""
            who = f"{self.evaluator}{how} finds, the same for all methods"
        with_bos = {None: "", True: "; a BOS before each window", False: "; without a BOS"}
        return (
            f"exp(mean NLL) over the key tokens before each length: those that {who} (more than "
            f"{self.alpha:g} nats gained from all before them against {self.short:,} to "
            f"{self.short + self._rule.step - 1:,} tokens, and a log-probability above "
            f"{self.beta:g}){with_bos[self.bos]}"
        )

    def cache_key(self) -> dict[str, Any]:
        """Settings that a unit's figures depend on, the evaluator by its weights and method."""
        chosen = self._evaluator
        settings = {**dataclasses.asdict(self._rule), "bos": self.bos}
        who = None if chosen is None else [chosen.digest, chosen.vocabulary]
        return {**settings, "evaluator": who}

    def report_identity(self) -> dict[str, Any]:
        """Beside those settings, how many windows of which documents."""
        documents = [digest(document) for document in texts_of(self.text).documents]
        return {**self.cache_key(), "windows": self.windows, "text": documents}

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """One unit per window (all lengths) or, where it must be, per window and length."""
        longest, bos, rule = max(lengths), bos_before(tokenizer, self.bos), self._rule
        documents = documents_of(tokenizer, texts_of(self.text))
        if min(lengths) - len(bos) <= self.short:
            raise DataError(
                f"a length of {min(lengths):,} tokens has no token with more than "
                f"short={self.short:,} before it: ask for longer ones, or pass a shorter context "
                "(--short)."
            )
        sizes = {name: len(ids) for name, ids in documents.items()}
        places, notes = place_windows(self.name, sizes, longest - len(bos), self.windows)
        evaluator = self._evaluator
        if evaluator is not None:
            name, start = places[0]
            ids, _ = self._read(evaluator, tokenizer, name, start, start + longest - len(bos))
            claimed, there = evaluator.window, len(ids)
            if there <= self.short:
                raise DataError(
                    f"the {longest:,} tokens of a window are {there:,} of the evaluator "
                    f"{self.evaluator}, no more than short={self.short:,}: pass a shorter context."
                )
            if claimed is not None and claimed < there:
                notes += (
                    f"longppl: the evaluator {self.evaluator} claims {claimed:,} tokens and reads "
                    f"{there:,}: what it chooses beyond its window is doubtful. Give it a method "
                    "(--evaluator-method)",
                )
        short = sum(last - first for first, last, _ in rule.windows(longest))
        tokens = short + longest * (1 if evaluator is None else 2)
        units: list[Unit] = []
        for name, start in places:
            spec = {"document": name, "start": start, "longest": longest}
            whole = Unit(tuple(lengths), tokens, spec)
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
        """Score one window at all its lengths, and have its key tokens chosen."""
        del length_invariant  # the plan has seen to it
        bos, rule = bos_before(tokenizer, self.bos), self._rule
        name, start = unit.spec["document"], unit.spec["start"]
        size = max(unit.lengths) - len(bos)
        ids = documents_of(tokenizer, texts_of(self.text))[name][start : start + size]
        scores = score_batches(
            model, torch.tensor([[*bos, *ids]]), start=1, batch_tokens=batch_tokens
        )
        scored = scores.nll[0].double()  # scored[i] belongs to position i + 1
        nll = torch.nn.functional.pad(scored, (1, 0), value=torch.nan)[len(bos) :]  # of each id
        evaluator, item = self._evaluator, f"{name}@{start}"
        if evaluator is None:
            keys = rule.keys(model, ids, bos, nll, batch_tokens)
            item = f"{item}#{json_digest(keys)[:8]}"  # other tokens under another method
        else:
            stop = start + unit.spec["longest"] - len(bos)
            own = bos_before(evaluator.tokenizer, self.bos)
            theirs, alignment = self._read(evaluator, tokenizer, name, start, stop)
            keys = evaluator.keys(theirs, own, rule, batch_tokens)
            if alignment is not None:
                keys = alignment.within(keys)
        found: list[Observation] = []
        for length in unit.lengths:
            before = [key for key in keys if 1 <= key + len(bos) < length]
            found.append(
                Observation(
                    length,
                    item=item,
                    cluster=name,
                    nll=float(nll[before].sum() + 0 * scored[: length - 1].sum()),  # NaN stays
                    targets=len(before),
                    detail={
                        "start": start,
                        "keys": before,  # places in the window, without its BOS
                        "prefix_nll": float(scored[: length - 1].sum()),
                        "prefix_targets": length - 1,
                    },
                )
            )
        return Measured(tuple(found), unit.tokens, "one pass, keys chosen")

    def _read(
        self,
        evaluator: Evaluator,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        start: int,
        stop: int,
    ) -> tuple[tuple[int, ...], Alignment | None]:
        """A window in the evaluator's tokens, and where both lie in its text if they are others."""
        texts = texts_of(self.text)
        if tokenizer_digest(tokenizer) == evaluator.vocabulary:
            return documents_of(tokenizer, texts)[name][start:stop], None
        document = next(text for text in texts.documents if digest(text) == name)
        ours = offsets_of(tokenizer, document, "model")[1][start:stop]
        first, last = ours[0][0], ours[-1][1]
        text = document[first:last]
        ids, theirs = offsets_of(evaluator.tokenizer, text, "evaluator")
        return ids, Alignment(text, theirs, tuple((a - first, b - first) for a, b in ours))

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        """Exponential of the mean NLL of all key tokens, and of its interval's ends."""
        if not observations:
            return Summary(math.nan, math.nan, math.nan, "none: no window")
        prefix = math.fsum(o.detail["prefix_nll"] for o in observations)
        prefix = perplexity_of(prefix / sum(o.detail["prefix_targets"] for o in observations))
        having = [o for o in observations if o.targets]
        if not having:
            return Summary(math.nan, math.nan, math.nan, "none: no key token", prefix)
        mean, low, high = mean_interval(
            [o.nll for o in having], [o.targets for o in having], [o.cluster for o in having]
        )
        documents = len({o.cluster for o in having})
        name = too_few(documents, "document") or f"t over {documents} documents, 95%"
        low = low if math.isnan(low) else max(low, 0.0)  # no perplexity is below 1
        return Summary(perplexity_of(mean), perplexity_of(low), perplexity_of(high), name, prefix)

    def remarks(self, rows: Sequence[Row]) -> list[str]:
        """How many key tokens there are at each length."""
        counts: dict[str, dict[int, int]] = {}
        for row in rows:
            if not row.failed:
                counts.setdefault(row.method, {})[row.length] = row.targets
        alike = len({tuple(found.items()) for found in counts.values()}) == 1
        return [
            f"key tokens{'' if alike else f' of {method}'}: "
            + ", ".join(f"{count:,} before {length:,}" for length, count in found.items())
            for method, found in list(counts.items())[: 1 if alike else None]
        ]


TASK = LongPpl
