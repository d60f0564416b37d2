"""Variables that get their value from one another: which of them hold it?

Source: Hsieh et al., "RULER" (arXiv:2404.06654), section 3.2, variable tracking. RULER takes the
names in any order. Here they are asked for in the order of assignment, which is that of the text:
with the names before it in place, each name is one hop from the last, and the list has one right
form, so that one prefill scores it. (Asking for the value of the last variable instead would need
no hop where there is one chain: its number is the only one in the text.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from longctx.errors import DataError
from longctx.prompts.assembly import Prompt

from .shared.haystack_task import HaystackTask
from .shared.retrieval import PromptSpec
from .shared.vocabulary import listed, number, variable

__all__ = ["TASK", "VariableTracking"]


@dataclass(frozen=True, slots=True)
class VariableTracking(HaystackTask):
    """Chains of variables; the value of a cell is the share of chains that are listed whole."""

    hops: int = 4
    """Assignments from variable to variable, after the first."""
    chains: int = 1
    """Chains in all, each with a number of its own; one is asked for."""

    name: ClassVar[str] = "variable_tracking"

    def __post_init__(self) -> None:
        HaystackTask.__post_init__(self)
        if not 1 <= self.hops <= 100 or not 1 <= self.chains <= 100:
            raise DataError(f"hops={self.hops}, chains={self.chains}: pass 1 to 100 of each.")

    @property
    def asked(self) -> str:
        """What is to be returned."""
        chains = f"one of {self.chains} chains, " if self.chains > 1 else ""
        return (
            f"lists of {self.hops + 1} variables ({chains}the first assignment at the depth, the "
            "others evenly after it)"
        )

    def prompt(self, tokenizer: PreTrainedTokenizerBase, length: int, spec: PromptSpec) -> Prompt:
        """The first assignment at the wanted depth, the last at the end of the haystack."""
        rng = Random(f"variable_tracking/{spec.seed}")
        taken: list[str] = []
        values: list[str] = []
        needles: list[str] = []
        for _ in range(self.chains):
            chain: list[str] = []
            for _ in range(self.hops + 1):
                chain.append(variable(rng, [*taken, *chain]))
            taken += chain
            values.append(number(rng, 5, values))
            needles.append(f"VAR {chain[0]} = {values[-1]}")
            needles += [f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(chain)]
        count = self.hops + 1
        depths = [spec.depth + (1 - spec.depth) * hop / self.hops for hop in range(count)]
        for _ in range(self.chains - 1):
            depths += sorted(rng.random() for _ in range(count))
        return self.hide(
            tokenizer,
            length,
            spec,
            needles=needles,
            depths=depths,
            ordered=count,
            intro=(
                "Memorize and track the chain(s) of variable assignment hidden in the following "
                "text."
            ),
            question=(
                f"Question: Find all variables that are assigned the value {values[0]} in the text "
                "above. List their names in one line, in the order of assignment, separated by "
                "commas and with 'and' before the last."
            ),
            # No colon, which would invite a list of bullets, and VAR as it is in the text.
            answer_prefix=(
                f"The names of the {count} variables that are assigned the value {values[0]} are, "
                "in order, VAR"
            ),
            key=listed([taken[0], *(f"VAR {name}" for name in taken[1:count])]),
        )


TASK = VariableTracking
