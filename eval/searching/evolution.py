"""An evolution of divisors, one for each plane of RoPE, with the factor on cos and sin.

The first generation holds what is known: no change, PI, NTK and YaRN. A later one keeps the best,
and adds mixtures and mutations of them. Divisors never fall from plane to plane, which a running
maximum sees to (LongRoPE, arXiv:2402.13753, section 3.2).

The course follows from the seed and the losses alone, so a search that was cut off is gone through
again with the losses that it wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

from longctx.patch import Method
from longctx.registry import make_method
from longctx.rope import Rope

__all__ = ["Divisors", "Evolution", "known_divisors"]

_KEPT = 0.3  # of a generation
_STEPS = (0.3, 0.06)  # standard deviations of a mutation in ln λ: far ones and near ones
_FACTOR_STEP = 0.15  # of the factor on cos and sin in its logarithm, as a share of these


@dataclass(frozen=True, slots=True)
class Divisors:
    """A candidate."""

    values: tuple[float, ...]
    """λ ≥ 1, one a plane, never falling with its index: θ' = θ / λ."""
    attention_factor: float
    """Factor on cos and sin."""

    def fields(self, factor: float) -> dict[str, Any]:
        """Those of `longrope`, for a window `factor` times as long."""
        return {
            "factor": factor,
            "divisors": self.values,
            "attention_factor": self.attention_factor,
        }

    def method(self, factor: float) -> Method:
        """What installs it."""
        return make_method("longrope", self.fields(factor))


def known_divisors(rope: Rope, factor: float) -> dict[str, Divisors]:
    """What the formulas of other methods come to, by their names.

    Args:
        rope: the model's.
        factor: the new window over the old one, at least 1.
    """
    found = {"none": Divisors((1.0,) * (rope.dim // 2), 1.0)}
    for name in ("linear", "ntk", "yarn"):
        method: Any = make_method(name, {"factor": factor})
        frequencies = method.frequencies(rope)
        values = (rope.inv_freq() / frequencies.inv_freq).tolist()
        found[name] = Divisors(_legal(values, math.inf), frequencies.attention_scaling)
    return found


class Evolution:
    """Candidates one after the other, each told its loss before the next is asked for.

    Args:
        known: the first candidates.
        factor: the new window over the old one; no divisor is above twice that.
        population: candidates of a generation, at least 4.
        seed: of all that is drawn.
    """

    def __init__(
        self, known: Mapping[str, Divisors], factor: float, *, population: int, seed: int
    ) -> None:
        self.losses: dict[Divisors, float] = {}
        """All that were asked for, lowest loss wherever sorted by `best`."""
        self._known = tuple(dict.fromkeys(known.values()))
        self._most = 2 * factor
        self._population = population
        self._rng = Random(f"longrope/{seed}")

    def candidates(self) -> Iterator[Divisors]:
        """Without end; `tell` each one's loss before asking for the next."""
        yield from self._known
        parents: Sequence[Divisors] = self._known
        count = self._population - len(self._known)
        while True:
            for _ in range(max(1, count)):
                yield self._new(parents)
            kept = max(2, round(_KEPT * self._population))
            parents, count = self.best(kept), self._population - kept

    def tell(self, candidate: Divisors, loss: float) -> None:
        """Say how good it is: lower is better, NaN is worst."""
        self.losses[candidate] = math.inf if math.isnan(loss) else loss

    def best(self, count: int) -> list[Divisors]:
        """Those of the lowest losses, the lowest first."""
        return sorted(self.losses, key=self.losses.__getitem__)[:count]

    def _new(self, parents: Sequence[Divisors]) -> Divisors:
        while True:
            child = self._mutated(self._mixed(parents))
            if child not in self.losses:
                return child

    def _mixed(self, parents: Sequence[Divisors]) -> Divisors:
        """The fast planes of one and the slow ones of another, or one as it is."""
        one, other = self._rng.choice(parents), self._rng.choice(parents)
        cut = self._rng.randrange(1, len(one.values)) if len(one.values) > 1 else 1
        values = (*one.values[:cut], *other.values[cut:])
        factor = self._rng.choice((one, other)).attention_factor
        return Divisors(_legal(values, self._most), factor)

    def _mutated(self, parent: Divisors) -> Divisors:
        """A stretch of planes changed by one factor, and each of some planes by its own."""
        rng, planes = self._rng, len(parent.values)
        step = rng.choice(_STEPS)
        first, last = sorted(rng.sample(range(planes + 1), 2))
        common = rng.gauss(0, step)
        values = [
            value
            * math.exp(common * (first <= plane < last))
            * math.exp(rng.gauss(0, step) * (rng.random() < 0.25))
            for plane, value in enumerate(parent.values)
        ]
        factor = parent.attention_factor * math.exp(rng.gauss(0, _FACTOR_STEP * step))
        return Divisors(_legal(values, self._most), round(min(max(factor, 0.5), 2.0), 4))


def _legal(values: Sequence[float], most: float) -> tuple[float, ...]:
    """Between 1 and `most`, none below the one before it, in four places."""
    return tuple(accumulate((round(min(max(value, 1.0), most), 4) for value in values), max))
