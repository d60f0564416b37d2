"""Several keys with a value each, of which one is asked for.

Source: Hsieh et al., "RULER" (arXiv:2404.06654), section 3.1, multi-keys NIAH; wording of its
appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.assembly import Prompt
from longctx.prompts.haystacks import Grass

from .shared.haystack_task import HaystackTask
from .shared.retrieval import PromptSpec
from .shared.vocabulary import names, number

__all__ = ["TASK", "MultiKey"]


@dataclass(frozen=True, slots=True)
class MultiKey(HaystackTask):
    """Values of several keys; the value of a cell is the share of those asked for that are found.

    The other keys, their values and places belong to the haystack: its prompts share them.
    """

    keys: int = 4
    """Keys in all; one is asked for, the others stand at random depths."""
    values: Literal["numbers", "words"] = "numbers"
    """What each key has."""
    digits: int = 7
    """Digits of a number."""

    name: ClassVar[str] = "multi_key"

    def __post_init__(self) -> None:
        HaystackTask.__post_init__(self)
        if not 2 <= self.keys <= 1000:
            raise DataError(f"keys={self.keys}: pass 2 to 1000 (for one there is 'passkey').")
        if self.values not in ("numbers", "words"):
            raise DataError(f"values={self.values!r}: expected 'numbers' or 'words'.")
        if not 5 <= self.digits <= 18:
            raise DataError(f"digits={self.digits}: pass 5 to 18.")

    @property
    def asked(self) -> str:
        """What is to be returned."""
        what = f"numbers of {self.digits} digits" if self.values == "numbers" else "words"
        return f"{what} (one of {self.keys} keys is asked for)"

    def cluster(self, spec: PromptSpec, prompt: Prompt) -> str:
        """The haystack, whose prompts have the other keys in common."""
        grass = isinstance(spec.haystack, Grass)
        return f"grass/{spec.haystack_seed}" if grass else prompt.haystack

    def prompt(self, tokenizer: PreTrainedTokenizerBase, length: int, spec: PromptSpec) -> Prompt:
        """The key that is asked for at the wanted depth, the others where the haystack says."""
        rng = Random(f"multi_key/others/{spec.haystack_seed}")
        known: dict[str, str] = {}
        depths = [spec.depth]
        while len(known) < self.keys - 1:
            self._add(rng, known)
            depths.append(rng.random())
        asked, value = self._add(Random(f"multi_key/{spec.seed}"), known)
        needles = [
            f"One of the special magic {self.values} for {key} is: {known[key]}."
            for key in [asked, *(key for key in known if key != asked)]
        ]
        one = self.values[:-1]
        return self.hide(
            tokenizer,
            length,
            spec,
            needles=needles,
            depths=depths,
            intro=(
                f"Some special magic {self.values} are hidden within the following text. Make sure "
                f"to memorize them. I will quiz you about the {self.values} afterwards."
            ),
            question=f"What is the special magic {one} for {asked} mentioned in the provided text?",
            # The needle's own words, after which a value has no quotation marks.
            answer_prefix=f"One of the special magic {self.values} for {asked} is:",
            key=value,
        )

    def _add(self, rng: Random, known: dict[str, str]) -> tuple[str, str]:
        """Draw a key and a value that are not there yet."""
        key, word = (rng.choice(names()) for _ in range(2))
        while key in known or word in known.values():
            key, word = (rng.choice(names()) for _ in range(2))
        taken = known.values()
        known[key] = number(rng, self.digits, taken) if self.values == "numbers" else word
        return key, known[key]


TASK = MultiKey
