"""Passkey retrieval: is a key found again, hidden at every depth of a prompt of exact length?

Scored in one prefill: greedy decoding gives the key if and only if, with the key in place, the
argmax is right at each of its tokens. The key's log-probability is kept as a graded signal.

Source: Mohtashami & Jaggi, "Landmark Attention" (arXiv:2305.16300), section 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts import CLASSIC, Grass, Haystack, Prompt, Wording, passkey

from .batches import score_batches
from .stats import wilson
from .task import Observation, Plan, Summary, Unit
from .texts import digest, texts_of

__all__ = ["Passkey"]


@dataclass(frozen=True, slots=True)
class Passkey:
    """Passkey retrieval; the value of a cell is the share of keys found."""

    samples: int = 20
    """Prompts per method and length, each with its own key."""
    depths: int | None = 10
    """So many depths, evenly from the beginning to the end of the haystack, in turn (fewer where
    there are fewer samples); None draws each at random."""
    haystack: Literal["grass", "text", "both"] = "both"
    """The repeated classical sentences, real text, or one after the other."""
    text: tuple[str, ...] = ()
    """Files or folders of real text; none means the embedded held-out documents."""
    seed: int = 0
    """Chooses keys, random depths and where in the text a haystack begins."""
    chat: bool | None = None
    """Put the prompt into the tokenizer's chat template; None: if it has one."""
    digits: int = 5
    """Digits of the key."""
    pairs: int = 1
    """Needles in all; with more than one, the question names the one that is asked for."""
    wording: Wording = CLASSIC
    """The fixed sentences."""

    name: ClassVar[str] = "passkey"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError(f"samples={self.samples}: expected at least one prompt per length.")
        if self.depths is not None and self.depths < 1:
            raise DataError(f"depths={self.depths}: expected at least one, or None for random.")
        if self.haystack not in ("grass", "text", "both"):
            raise DataError(f"haystack={self.haystack!r}: expected 'grass', 'text' or 'both'.")

    @property
    def estimand(self) -> str:
        """What the table shows."""
        where = "random depths" if self.depths is None else f"{len(self._grid())} depths"
        return (
            f"share of {self.samples} keys of {self.digits} digits that greedy decoding returns, "
            f"at {where} of a prompt of exactly that many tokens (haystack: {self.haystack}); "
            "interval: Wilson 95%"
        )

    def spec(self) -> dict[str, Any]:
        """Settings, and the haystacks by their content."""
        texts = [
            digest("\f".join(h.documents)) for h in self._haystacks() if not isinstance(h, Grass)
        ]
        return {**dataclasses.asdict(self), "text": texts}

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """One unit per length; the shortest and longest prompts of each haystack are tried."""
        del length_invariant  # whole prompts serve either kind
        for length in {min(lengths), max(lengths)}:
            for index in range(min(self.samples, len(self._haystacks()))):
                self._prompt(tokenizer, length, index)
        return Plan(tuple(Unit((length,), length * self.samples) for length in lengths))

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        *,
        batch_tokens: int,
    ) -> list[Observation]:
        """Score the answers of one length's prompts."""
        (length,) = unit.lengths
        prompts = [self._prompt(tokenizer, length, index) for index in range(self.samples)]
        ids = torch.tensor([prompt.input_ids for prompt in prompts])
        start = min(prompt.answer_start for prompt in prompts)
        scores = score_batches(model, ids, start=start, batch_tokens=batch_tokens)
        found: list[Observation] = []
        for row, prompt in enumerate(prompts):
            answer = slice(prompt.answer_start - start, None)
            nll = float(scores.nll[row, answer].double().sum())
            argmax: list[int] = scores.argmax[row, answer].tolist()
            detail: dict[str, Any] = {
                "key": prompt.key,
                "depth": prompt.depth,
                "haystack": prompt.haystack,
                "seed": prompt.seed,
            }
            if math.isnan(nll):
                correct = None
            else:
                correct = argmax == list(prompt.answer_ids)
                detail["argmax"] = tokenizer.decode(argmax)  # given the right tokens before each
            found.append(Observation(length, prompt.haystack, nll, len(argmax), correct, detail))
        return found

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        """The share of keys found; NaN where any prompt's logits held a NaN."""
        answers = [o.correct for o in observations]
        if not answers or None in answers:
            return Summary(math.nan, math.nan, math.nan, "none")
        hits = sum(map(bool, answers))
        return Summary(hits / len(answers), *wilson(hits, len(answers)), "Wilson 95%")

    def _haystacks(self) -> list[Haystack]:
        kinds: list[Haystack] = []
        if self.haystack != "text":
            kinds.append(Grass())
        if self.haystack != "grass":
            kinds.append(texts_of(self.text))
        return kinds

    def _grid(self) -> list[float]:
        kinds = 2 if self.haystack == "both" else 1
        n = min(self.depths or 1, -(-self.samples // kinds))
        return [0.5] if n == 1 else [i / (n - 1) for i in range(n)]

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, length: int, index: int) -> Prompt:
        """Prompt `index` of a cell: the same for every method, the same key at every length."""
        kinds, grid = self._haystacks(), self._grid()
        seed = self.seed * 1_000_000 + index
        if self.depths is None:
            depth = Random(f"depth/{seed}").random()
        else:
            depth = grid[index // len(kinds) % len(grid)]
        return passkey(
            tokenizer,
            length,
            depth=depth,
            seed=seed,
            haystack=kinds[index % len(kinds)],
            split="eval",
            haystack_seed=seed,
            chat=self.chat,
            digits=self.digits,
            pairs=self.pairs,
            wording=self.wording,
        )
