"""One key with several values, all of which are asked for.

Source: Hsieh et al., "RULER" (arXiv:2404.06654), section 3.1, multi-values NIAH. RULER takes the
values in any order; here they are asked for in that of the text, so that there is one right answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.assembly import Prompt

from .shared.haystack_task import HaystackTask
from .shared.retrieval import PromptSpec
from .shared.vocabulary import listed, names, number

__all__ = ["TASK", "MultiValue"]


@dataclass(frozen=True, slots=True)
class MultiValue(HaystackTask):
    """Lists of values; the value of a cell is the share of lists that are right as a whole."""

    values: int = 4
    """Values of the key."""
    digits: int = 7
    """Digits of a value."""

    name: ClassVar[str] = "multi_value"

    def __post_init__(self) -> None:
        HaystackTask.__post_init__(self)
        if not 2 <= self.values <= 100:
            raise DataError(f"values={self.values}: pass 2 to 100 (for one there is 'passkey').")
        if not 5 <= self.digits <= 18:
            raise DataError(f"digits={self.digits}: pass 5 to 18.")

    @property
    def asked(self) -> str:
        """What is to be returned."""
        return (
            f"lists of {self.values} numbers of {self.digits} digits (the first at the depth, the "
            "others anywhere after it, asked for in that order)"
        )

    def prompt(self, tokenizer: PreTrainedTokenizerBase, length: int, spec: PromptSpec) -> Prompt:
        """The first value at the wanted depth, the others at random places after it."""
        rng = Random(f"multi_value/{spec.seed}")
        key = rng.choice(names())
        values: list[str] = []
        while len(values) < self.values:
            values.append(number(rng, self.digits, values))
        after = sorted(spec.depth + (1 - spec.depth) * rng.random() for _ in values[1:])
        return self.hide(
            tokenizer,
            length,
            spec,
            needles=[f"One of the special magic numbers for {key} is: {v}." for v in values],
            depths=[spec.depth, *after],
            ordered=self.values,
            intro=(
                "Some special magic numbers are hidden within the following text. Make sure to "
                "memorize them. I will quiz you about the numbers afterwards."
            ),
            question=(
                f"What are all the {self.values} special magic numbers for {key} mentioned in the "
                "provided text? List them in one line, in the order in which they appear, separated"
                " by commas and with 'and' before the last."
            ),
            # No colon: it would invite a list of bullets.
            answer_prefix=f"The {self.values} special magic numbers for {key}, in order, are",
            key=listed(values),
        )


TASK = MultiValue
