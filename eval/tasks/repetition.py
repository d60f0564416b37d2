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
from typing import Any, ClassVar, Literal, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import DataError, RunError
from longctx.generation.decodings.greedy import Greedy
from longctx.generation.draws import BrokenLogitsError
from longctx.generation.generate import generate
from longctx.generation.registry import parse_decoding
from longctx.prompts.haystacks import bos_of
from longctx.scoring.batching import is_out_of_memory, shrinking

from ..stats.intervals import mean_interval, too_few
from .shared.protocol import Measured, Observation, Plan, Resumable, Summary, UnderWay, Unit
from .shared.repetition_metrics import distinct_n, diversity, loop_onset, rep_l, seq_rep_n, uniq
from .shared.texts import digest, documents_of, spread, texts_of

__all__ = ["TASK", "Repetition"]

_RECENT = 128  # tokens that rep/l looks back; the paper has 16, 32, 128 and 512
_TEXT = 2000  # characters of a continuation that are kept

_Window: TypeAlias = tuple[str, int]
"""A document, and the place in it that its prompts end before."""
_Said: TypeAlias = tuple[tuple[int, ...], str | None]
"""A continuation, and why it ended; None where the logits held a NaN."""


@dataclass(frozen=True, slots=True)
class Repetition(Resumable):
    """Repetition in continuations; the value of a cell is the mean seq-rep-4, a share.

    The observations carry no NLL: that of a model's own words says how sure it is of itself, and
    would be taken for the perplexity of a text.
    """

    new_tokens: int = 256
    """Tokens to generate after each prompt, at most."""
    windows: int = 10
    """Prompts per length at most, spread over the documents; no document has two before each that
    is long enough has one."""
    decoding: str = "greedy"
    """How tokens are taken: a decoding or preset as `longctx decodings` lists them, such as dry or
    "sample:temperature=0.7" (within --tasks, one of several fields needs quotes of its own). Draws
    follow from the seed and the window's number: the same for every method and length."""
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
        parse_decoding(self.decoding)

    @property
    def estimand(self) -> str:
        """What the table shows."""
        chosen = parse_decoding(self.decoding)
        how = "greedy continuations" if chosen == Greedy() else "continuations"
        by = "" if chosen == Greedy() else f" by {chosen}, seed {self.seed},"
        end = "" if self.ignore_eos else ", or as many as come before the end of text,"
        return (
            f"mean share of 4-grams that stood before in the same continuation, over {how} "
            f"of {self.new_tokens} tokens{end}{by} after real text of exactly each length"
        )

    def cache_key(self) -> dict[str, Any]:
        """Settings, and the documents by their content.

        That of greedy decoding is as it was when the task had temperature and top_p of its own, so
        that results from then are gone on with. Drawn ones from then had other draws, and are left.
        """
        settings = dataclasses.asdict(self)
        chosen = parse_decoding(settings.pop("decoding"))
        how = (
            {"temperature": 0.0, "top_p": 1.0} if chosen == Greedy() else {"decoding": f"{chosen}"}
        )
        documents = [digest(document) for document in texts_of(self.text).documents]
        return {**settings, **how, "text": documents}

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
        count = len(windows)
        units = [
            Unit((length,), (length + self.new_tokens) * count, {"windows": windows}, count)
            for length in lengths
        ]
        return Plan(tuple(units), (note,) if short else ())

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
        """Generate the continuations of one length that are left."""
        del length_invariant
        (length,) = unit.lengths
        documents, bos = documents_of(tokenizer, texts_of(self.text)), bos_of(tokenizer)
        windows: list[_Window] = [(name, end) for name, end in unit.spec["windows"]]
        prompts = [[*bos, *documents[name][end - length + len(bos) : end]] for name, end in windows]

        names = [(length, _item(window)) for window in windows]
        known = set(under_way.known(names))

        def run(first: int, last: int) -> None:
            if known.issuperset(range(first, last)):
                return
            said = self._said(model, tokenizer, prompts[first:last], first)
            found = [
                self._observe(tokenizer, length, window, documents[window[0]], tokens, stopped)
                for window, (tokens, stopped) in zip(windows[first:last], said, strict=True)
            ]
            under_way.add(found, sum(length + one.detail["tokens"] for one in found))

        shrinking(len(windows), max(1, batch_tokens // (length + self.new_tokens)), run)
        return under_way.measured(names, "generated")

    def _said(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        first: int,
    ) -> list[_Said]:
        """What follows the prompts, of which `first` is the number of the first."""
        try:
            said = generate(
                model,
                tokenizer,
                prompts,
                decoding=self.decoding,
                max_new_tokens=self.new_tokens,
                batch_size=len(prompts),
                seed=self.seed,
                ignore_eos=self.ignore_eos,
                first_row=first,
                beyond_window=True,
            )
        except BrokenLogitsError:
            if len(prompts) == 1:
                return [((), None)]
            apart = enumerate(prompts, first)
            return [
                one for at, prompt in apart for one in self._said(model, tokenizer, [prompt], at)
            ]
        except RunError as error:
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise error.__cause__ from None  # so that a smaller batch is tried
            raise
        return list(zip(said.token_ids, said.finish_reasons, strict=True))

    def _observe(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        window: _Window,
        document: tuple[int, ...],
        said: tuple[int, ...],
        stopped: str | None,
    ) -> Observation:
        name, end = window
        detail: dict[str, Any] = {
            "end": end,
            "tokens": len(said),
            "stopped": stopped or "NaN",
            **{f"seq_rep_{n}": seq_rep_n(said, n) for n in (1, 2, 3, 4)},
            **{f"distinct_{n}": distinct_n(said, n) for n in (1, 2, 3, 4)},
            "diversity": diversity(said),
            "uniq": uniq(said),
            # Within the continuation: what is taken from the prompt is not a repetition of its own.
            f"rep_{_RECENT}": rep_l(said, [document[end - 1], *said[:-1]] if said else [], _RECENT),
            "text_seq_rep_4": seq_rep_n(document[end : end + self.new_tokens], 4),
            "text": str(tokenizer.decode(list(said)))[:_TEXT],
        }
        if parse_decoding(self.decoding) != Greedy():
            detail["seed"] = self.seed
        onset = loop_onset(said)
        if onset is not None:  # left out where there is none: a recorded null is read as NaN
            detail["loop_onset"] = onset
        nll = math.nan if stopped is None else 0.0
        return Observation(length, _item(window), name, nll, targets=0, detail=detail)

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        """The mean seq-rep-4, every continuation counting alike."""
        shares = [math.nan if math.isnan(o.nll) else o.detail["seq_rep_4"] for o in observations]
        clusters = [o.cluster for o in observations]
        mean, low, high = mean_interval(shares, [1.0] * len(shares), clusters)
        documents = len(set(clusters))
        if math.isnan(mean):
            return Summary(mean, math.nan, math.nan, "none")
        if few := too_few(documents, "document"):
            return Summary(mean, math.nan, math.nan, few)
        if len(set(shares)) == 1:  # no spread to tell from: not a certainty
            return Summary(mean, math.nan, math.nan, "none: all alike")
        name = f"t over {documents} documents, 95%"
        return Summary(mean, max(0.0, low), min(1.0, high), name)


def _item(window: _Window) -> str:
    """Names a window's observation."""
    return f"{window[0]}@{window[1]}"


TASK = Repetition
