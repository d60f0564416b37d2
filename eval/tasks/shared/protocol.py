"""What the sweep asks of a task: one file in this folder each, all by this protocol.

A task plans units of work and measures one at a time. A unit is recorded as a whole; a task that
is `Resumable` can also be told which of a unit's prompts are finished, and goes on from there. What
it measures are observations: a prompt, or a document read to one length. A cell of the table is the
summary of the observations of one method, task and length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.scoring.compressed_caches import CompressedCache

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Measured", "Observation", "OverCache", "Plan", "Resumable", "Summary", "Task", "UnderWay",
    "Unit",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work."""

    lengths: tuple[int, ...]
    """The cells it contributes to; several where one pass serves them all."""
    tokens: int
    """Tokens to forward at most, for the time that remains."""
    spec: dict[str, Any] = field(default_factory=dict[str, Any])
    """What sets its inputs apart from those of other units of the task, as JSON."""
    prompts: int = 1
    """Observations that it gives if it is measured prompt by prompt, for the progress."""
    part: str = ""
    """The part of the task that it belongs to, for the progress."""

    def by_length(self) -> list[Unit]:
        """The same work one length at a time: the way out when one pass over all does not fit."""
        each = max(1, self.prompts // len(self.lengths))
        return [Unit((length,), length, self.spec, each, self.part) for length in self.lengths]


@dataclass(frozen=True, slots=True)
class Plan:
    """All units of a task for one method, and what a reader of the table must know of them."""

    units: tuple[Unit, ...]
    notes: tuple[str, ...] = ()
    """Sentences, such as which documents were left out and why."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One prompt, or one document read to one length."""

    length: int
    """Tokens."""
    item: str
    """Names the prompt or window within task and length: the same for every method, so that methods
    and models with one tokenizer are compared on the same inputs."""
    cluster: str
    """The haystack or document: observations of one cluster are not independent."""
    nll: float
    """Summed over the targets, in nats; NaN where the model's logits held a NaN."""
    targets: int
    """Tokens that were scored."""
    correct: bool | None = None
    """Whether greedy decoding gives the answer; None where nothing is answered, or at NaN."""
    detail: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else there is to know, as JSON: key, depth, document, …"""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a unit gave, and what it took."""

    observations: tuple[Observation, ...]
    tokens: int
    """Forwarded."""
    how: str
    """How prompts or windows were run, such as "shared prefixes"."""
    per_token: pa.Table | None = None
    """A row for each scored token, where the task keeps them."""
    cache_bytes: int | None = None
    """Of the largest cache of one prompt, at its end; None where nothing compresses it."""


class UnderWay:
    """What is finished of a unit: by an earlier run that was cut off, and as it goes on.

    A prompt goes by its length and by its item, as its observation has them.
    """

    def __init__(
        self,
        observations: Iterable[Observation] = (),
        tokens: int = 0,
        added: Callable[[Sequence[Observation], int], None] | None = None,
    ) -> None:
        """Begin where an earlier run ended.

        Args:
            observations: of prompts that are finished.
            tokens: that were forwarded for them.
            added: told of each further observation, and of the tokens it took.
        """
        self.tokens = tokens
        """Forwarded in all."""
        self._found = {(one.length, one.item): one for one in observations}
        self._added = added

    def known(self, prompts: Sequence[tuple[int, str]]) -> list[int]:
        """The places of those prompts that are finished."""
        return [place for place, prompt in enumerate(prompts) if prompt in self._found]

    def add(self, observations: Sequence[Observation], tokens: int) -> None:
        """Take what is finished now, and the tokens that were forwarded since the last time."""
        self._found |= {(one.length, one.item): one for one in observations}
        self.tokens += tokens
        if self._added is not None:
            self._added(observations, tokens)

    def measured(self, prompts: Sequence[tuple[int, str]], how: str) -> Measured:
        """The observations of all prompts of a unit, in this order."""
        return Measured(tuple(self._found[prompt] for prompt in prompts), self.tokens, how)


@dataclass(frozen=True, slots=True)
class Summary:
    """A cell's figure with its 95% interval (NaN where there is none) and how they come about."""

    value: float
    low: float
    high: float
    interval: str
    """The name of the interval and what it is taken over."""
    prefix: float | None = None
    """A second figure over the whole prefix, where the task has one."""


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass of its own settings; every field is part of the recorded key."""

    name: ClassVar[str]
    """The name of its file."""
    scale: ClassVar[Literal["share", "perplexity"]]
    """A share (0 to 1) is shown in percent, a perplexity (above 1) on a logarithmic axis."""
    higher_is_better: ClassVar[bool]
    """Which way of two values is the better one."""
    figure: ClassVar[str | None]
    """The entry of an observation's details that holds the prompt's own share, whose mean is the
    cell's value; None where answers are right or wrong, or NLL says it all."""

    @property
    def estimand(self) -> str:
        """What exactly is estimated, in a sentence that goes under the table."""
        ...

    def cache_key(self) -> dict[str, Any]:
        """All that its inputs depend on beside tokenizer and unit, as JSON, texts by digest."""
        ...

    def report_identity(self) -> dict[str, Any]:
        """`cache_key` and all else that a cell's figure depends on: what a report is about."""
        ...

    def plan(
        self, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, length_invariant: bool
    ) -> Plan:
        """The units for these lengths (ascending), after checking that every one can be built.

        `length_invariant`: a token's logits are the same in a longer input, so that one pass over
        the longest may serve all lengths.
        """
        ...

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        *,
        batch_tokens: int,
        length_invariant: bool,
    ) -> Measured:
        """Run one unit, at most `batch_tokens` tokens (but at least one prompt) at a time."""
        ...

    def summarise(self, observations: Sequence[Observation]) -> Summary:
        """The figure of one cell."""
        ...


@runtime_checkable
class OverCache(Protocol):
    """A task that says what of its input is context, and what is read over its compressed cache."""

    def cache_obstacle(self, tokenizer: PreTrainedTokenizerBase, unit: Unit) -> str | None:
        """Why this unit's inputs cannot be read so, None if they can."""
        ...

    def measure_over_cache(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        cache: CompressedCache,
    ) -> Measured:
        """Run a unit of one length, each input with a cache of its own."""
        ...


class Resumable(ABC):
    """A task that goes on within a unit, at the prompt where it was cut off."""

    __slots__ = ()

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unit: Unit,
        *,
        batch_tokens: int,
        length_invariant: bool,
    ) -> Measured:
        """Run a unit from its first prompt."""
        how: Any = {"batch_tokens": batch_tokens, "length_invariant": length_invariant}
        return self.measure_from(model, tokenizer, unit, UnderWay(), **how)

    @abstractmethod
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
        """Run those prompts of a unit that are not finished, and add each that is then.

        What it gives is what a run gives that was not cut off, to the last bit.
        """
