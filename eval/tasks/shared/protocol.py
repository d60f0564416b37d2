"""What the sweep asks of a task: one file in this folder each, all by this protocol.

A task plans units of work, each recorded and resumed as a whole, and measures one at a time. What
it measures are observations: a prompt, or a document read to one length. A cell of the table is
the summary of the observations of one method, task and length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longctx.scoring.compressed_caches import CompressedCache

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Measured", "Observation", "OverCache", "Plan", "Summary", "Task", "Unit"]


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work."""

    lengths: tuple[int, ...]
    """The cells it contributes to; several where one pass serves them all."""
    tokens: int
    """Tokens to forward at most, for the time that remains."""
    spec: dict[str, Any] = field(default_factory=dict[str, Any])
    """What sets its inputs apart from those of other units of the task, as JSON."""

    def by_length(self) -> list[Unit]:
        """The same work one length at a time: the way out when one pass over all does not fit."""
        return [Unit((length,), length, self.spec) for length in self.lengths]


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
