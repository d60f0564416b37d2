"""Attention sinks and a window: the first few tokens and the last ones, for inputs without end.

With k sinks and a window of W tokens, the query's own among them, a query at m sees

    Δ = m − n        for Δ < W
    sinks n < k      at min(m, k + W − 1) − n: positions are slots of a cache (StreamingLLM),
                     or all at `limit` (LM-Infinite)

and nothing else. Without the sinks, which take the attention that no other key deserves, a window
breaks the model. With them it reads on fluently for ever and knows nothing of what left the window:
perplexity stays low and no key is found further back.

Caches keep the sinks and the last W tokens alone, so memory and time per token stay as they are
however long the text grows (`longctx.attention.sink_cache`). A prompt is read as a whole first.

Source: Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks
(arXiv:2309.17453), section 3.2; Han et al. 2024, LM-Infinite (arXiv:2308.16137), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from longctx.attention.regions import Plan, Region, band, up_to
from longctx.attention.remapped import Planner
from longctx.attention.sink_cache import SinkCaching
from longctx.errors import MethodError
from longctx.model import decoder_of
from longctx.patch import Check, Method, Patch
from longctx.rope import Rope

from ._remapped import RemappedMethod
from ._scale import check_flag, check_tokens

__all__ = ["METHOD", "SinkWindow"]


@dataclass(frozen=True, slots=True)
class SinkWindowPlanner(Planner):
    """The first keys and the last ones."""

    sinks: int
    window: int
    limit: int | None

    hides: ClassVar[bool] = True

    def furthest(self, tokens: int) -> float:
        """That of the first sink, or of the window's first token."""
        near = min(tokens, self.window) - 1
        if not self.sinks or tokens <= self.window:
            return near
        slot = min(tokens - 1, self.sinks + self.window - 1)
        return max(near, slot if self.limit is None else self.limit)

    def plan(self, first: int, queries: int, keys: int) -> Plan:
        """Two regions: the window, and the sinks where it does not reach them."""
        own = torch.arange(first, first + queries, dtype=torch.float64)
        slots = own.clamp(max=self.sinks + self.window - 1) - own
        regions = (*band(slice(0, queries), keys - queries, self.window),)
        if not self.sinks:
            return Plan(regions)
        if self.limit is None:
            return Plan((*regions, *self._sinks(queries, keys, 0)), (None, slots))
        back = -torch.arange(keys, dtype=torch.float64)
        sinks = self._sinks(queries, keys, 1)
        return Plan((*regions, *sinks), (None, self.limit - own), (None, back))

    def _sinks(self, queries: int, count: int, key_turn: int) -> Iterator[Region]:
        beyond = count - queries - self.window  # the last key before the window of query 0
        whole = min(max(0, self.sinks - 1 - beyond), queries)  # first query that sees all sinks
        yield from up_to(slice(0, whole), beyond, query_turn=1, key_turn=key_turn)
        if whole < queries:
            rows, sinks = slice(whole, queries), slice(0, self.sinks)
            yield Region((rows,), (sinks,), query_turn=1, key_turn=key_turn)


@dataclass(frozen=True, slots=True)
class SinkWindow(RemappedMethod):
    """Sinks and a window in every layer of full attention."""

    sinks: int = 4
    """First tokens k that are always seen."""
    window: int | None = None
    """Last tokens W that are seen, the query's own among them; by default as many as fill the
    model's window together with the sinks."""
    limit: int | None = None
    """Distance in tokens at which all sinks stand (LM-Infinite); None for cache slots."""
    evict: bool = True
    """Let caches drop the keys that no later token sees. False keeps them all, for decoding that
    takes tokens back (assisted, prompt lookup) and for caches that you crop."""

    name: ClassVar[str] = "sink_window"
    unbounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super(SinkWindow, self).__post_init__()
        check_flag(self.name, "evict", self.evict)
        check_tokens(self.name, "sinks", self.sinks, least=0)
        for field in ("window", "limit"):
            if getattr(self, field) is not None:
                check_tokens(self.name, field, getattr(self, field))

    @classmethod
    def example(cls, rope: Rope) -> Method:
        """Half of the window."""
        return cls(window=max(1, rope.length // 2))

    def planner(self, length: int) -> SinkWindowPlanner:
        """Sinks and window in tokens for a window of `length`."""
        window = length - self.sinks if self.window is None else self.window
        if window < 1 or self.sinks + window > length or (self.limit or 0) > length:
            raise MethodError(
                f"{self.name}: sinks={self.sinks}, window={window}, limit={self.limit}: expected "
                f"sinks + window ≤ {length}, the model's window, and no limit beyond it."
            )
        return SinkWindowPlanner(self.sinks, window, self.limit)

    def cache_tokens(self, window: int) -> int | None:
        """The sinks and the window, unless all are kept."""
        planner = self.planner(window)
        return planner.sinks + planner.window if self.evict else None

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Put the rule on, and have the decoder bound its caches before each call.

        Raises:
            ModelError, MethodError: as in `RemappedMethod.apply`.
        """
        super(SinkWindow, self).apply(model, patch)
        caching = self._caching(model, patch)
        if caching is not None:
            patch.hook(decoder_of(model), caching)

    def _caching(self, model: PreTrainedModel, patch: Patch) -> SinkCaching | None:
        if not self.evict:
            return None
        planner = self.planner(patch.window_below)
        layers = [layer.index for layer in self.layers(model, patch.rope)]
        return SinkCaching.of(decoder_of(model), layers, planner.sinks, planner.window)

    def verify(self, model: PreTrainedModel, patch: Patch) -> list[Check]:
        """Look for the rule, and for what bounds the caches."""
        checks = super(SinkWindow, self).verify(model, patch)
        caching = self._caching(model, patch)
        if caching is not None:
            hooks = decoder_of(model)._forward_pre_hooks.values()  # pyright: ignore[reportPrivateUsage]
            most = f"at most {caching.sinks + caching.window} keys a layer"
            checks.append(Check("caches bounded", caching in hooks, most))
        return checks


METHOD = SinkWindow
