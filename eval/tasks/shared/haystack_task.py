"""Retrieval from a haystack: repeated sentences or real text with something hidden in them."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.assembly import Prompt, assemble
from longctx.prompts.haystacks import Grass, Haystack

from .retrieval import PromptSpec, Retrieval, depth_grid, thin_grid, turn_of
from .texts import digest, texts_of

__all__ = ["HaystackTask"]

_HAYSTACKS = 5  # pieces of real text in a cell at least, where it has so many prompts


@dataclass(frozen=True, slots=True)
class HaystackTask(Retrieval):
    """A task that hides something in a haystack."""

    depths: int | None = 10
    """So many depths, evenly from the beginning to the end of the haystack. Prompts go through them
    in turn, with five different pieces of real text or more in all (if there are so many prompts).
    None draws each at random, in a piece of its own."""
    haystack: Literal["grass", "text", "both"] = "both"
    """The repeated classical sentences, real text, or one after the other."""
    text: tuple[str, ...] = ()
    """Files or folders of real text; none means the embedded held-out documents."""

    @property
    @abstractmethod
    def asked(self) -> str:
        """What is to be returned, for the estimand: "keys of 5 digits"."""

    def __post_init__(self) -> None:
        Retrieval.__post_init__(self)
        if self.depths is not None and self.depths < 1:
            raise DataError(f"depths={self.depths}: expected at least one, or None for random.")
        if self.haystack not in ("grass", "text", "both"):
            raise DataError(f"haystack={self.haystack!r}: expected 'grass', 'text' or 'both'.")

    @property
    def estimand(self) -> str:
        """What the table shows."""
        count = len(self._grid())
        where = "random depths" if self.depths is None else f"{count} depth{'s' * (count > 1)}"
        return (
            f"share of {self.samples} {self.asked} that greedy decoding returns, at {where} of a "
            f"prompt of exactly that many tokens (haystack: {self.haystack})"
        )

    def cache_key(self) -> dict[str, Any]:
        """Settings, and the haystacks by their content."""
        texts = [
            digest("\f".join(h.documents)) for h in self._haystacks() if not isinstance(h, Grass)
        ]
        return {**Retrieval.cache_key(self), "text": texts}

    def plan_notes(self) -> list[str]:
        """Whether all depths are reached."""
        return thin_grid(self.name, self.samples, self.depths, len(self._haystacks()))

    def prompt_spec(self, index: int, length: int, longest: int | None) -> PromptSpec:
        """The kinds of haystack alternate; each goes through all depths."""
        kinds = self._haystacks()
        seed = self.base(length)
        grid, prompts = self._grid(), self._of_a_kind()
        each = 1
        if grid:
            turns = -(-prompts // len(grid))
            each = -(-min(prompts, _HAYSTACKS) // turns)
        number, depth = turn_of(index // len(kinds), seed + index, grid, each)
        return PromptSpec(
            index=index,
            seed=seed + index,
            haystack_seed=seed + number,
            longest=longest if self.share_lengths else None,
            depth=depth,
            haystack=kinds[index % len(kinds)],
        )

    def cluster(self, spec: PromptSpec, prompt: Prompt) -> str:
        """The haystack; grass is the same everywhere, so that its prompts differ in needles."""
        return f"grass/{spec.seed}" if isinstance(spec.haystack, Grass) else prompt.haystack

    def hide(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        spec: PromptSpec,
        *,
        needles: Sequence[str],
        depths: Sequence[float],
        intro: str,
        question: str,
        answer_prefix: str,
        key: str,
        ordered: int = 0,
    ) -> Prompt:
        """Put needles into the haystack of a spec.

        Args:
            tokenizer: as in `longctx.prompts.assembly.assemble`, as are the others.
            length: tokens of the prompt.
            spec: haystack and seeds.
            needles: sentences.
            depths: of each needle; the first is the one that counts as the prompt's.
            intro: before the haystack.
            question: after the haystack.
            answer_prefix: begins the answer.
            key: the answer.
            ordered: so many of the first needles stand in the order given. Needles whose depths are
                close go to the nearest free line, which may be before the last one's.

        Raises:
            DataError: as in `assemble`.
        """
        haystack = spec.haystack
        assert haystack is not None

        def build(sentences: Sequence[str]) -> Prompt:
            return assemble(
                tokenizer,
                length,
                haystack=haystack,
                needles=sentences,
                depths=depths,
                question=question,
                answer_prefix=answer_prefix,
                key=key,
                intro=intro,
                seed=spec.seed,
                haystack_seed=spec.haystack_seed,
                longest=spec.longest or length,
                chat=self.chat,
            )

        prompt = build(needles)
        if ordered:  # the answer is in several of them, and no one distance is the prompt's
            prompt = dataclasses.replace(prompt, needle_stop=None)
        starts = prompt.needle_starts[:ordered]
        ranks = [sorted(starts).index(start) for start in starts]
        if ranks == sorted(ranks):
            return prompt
        # The places depend on the sum of the needles' tokens alone, so swapping keeps them.
        prompt = build([*(needles[rank] for rank in ranks), *needles[ordered:]])
        starts = (*sorted(prompt.needle_starts[:ordered]), *prompt.needle_starts[ordered:])
        return dataclasses.replace(prompt, needle_starts=starts, needle_stop=None)

    def _haystacks(self) -> list[Haystack]:
        kinds: list[Haystack] = []
        if self.haystack != "text":
            kinds.append(Grass())
        if self.haystack != "grass":
            kinds.append(texts_of(self.text))
        return kinds

    def _grid(self) -> list[float]:
        """The depths of one haystack; none where they are random."""
        return [] if self.depths is None else depth_grid(self.depths, self._of_a_kind())

    def _of_a_kind(self) -> int:
        """Prompts with one kind of haystack."""
        return -(-self.samples // (2 if self.haystack == "both" else 1))
