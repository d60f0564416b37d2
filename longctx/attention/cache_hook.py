"""A forward pre-hook of a decoder that puts cache layers of the house in place of transformers'.

It changes the layers of the cache that is there, so that `generate` keeps its own. A cache that
holds tokens already, a static one, and one of another class than DynamicCache stay as they are: all
of them keep every key, and a rule must come to the same with those.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..before_transformers_5_24 import cache_argument

__all__ = ["CacheHook", "forward_arguments"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheHook(ABC):
    """Empty layers of a cache become those of `new_layer`, which are told of each call."""

    layers: tuple[int, ...]
    """Those under the rule, by index."""
    arguments: tuple[str, ...] = field(compare=False, repr=False)
    """Of the decoder's forward, in order."""
    name: str = field(compare=False, repr=False)
    """That of the cache among them."""

    @abstractmethod
    def new_layer(self) -> DynamicLayer:
        """An empty layer of the house."""

    @abstractmethod
    def begin(self, layers: Sequence[Any], given: dict[str, Any]) -> None:
        """Tell the house's layers of a call.

        Args:
            layers: of the class of `new_layer`.
            given: the arguments of the decoder's forward, by name.

        Raises:
            ModelError: they were made for another rule, or the call does not go with the last one.
        """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Make the cache ready for this call, or the cache itself where the decoder would."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        name = "past_key_values" if "past_key_values" in given else self.name
        cache = given.get(name)
        made = cache is None and not module.training and _uses_cache(module, given)
        if made:
            cache = DynamicCache(config=module.config)  # pyright: ignore[reportArgumentType]
        layers = self._layers(cache)
        if not layers:
            return None
        self.begin(layers, given)
        return ((), {**given, name: cache}) if made else None

    def _layers(self, cache: object) -> list[DynamicLayer]:
        if type(cache) is not DynamicCache:
            return []
        if cache.layer_class_to_replicate is not None:  # made without a config: layers come later
            while len(cache.layers) <= max(self.layers):
                cache.layers.append(cache.layer_class_to_replicate())
        found: list[DynamicLayer] = []
        wanted = self.new_layer()
        for index in self.layers:
            if index >= len(cache.layers):  # it shares the keys of a layer before
                continue
            layer = cache.layers[index]
            if type(layer) is DynamicLayer and not layer.is_initialized:
                layer = cache.layers[index] = self.new_layer()
            if isinstance(layer, type(wanted)):
                found.append(layer)
        return found


def forward_arguments(decoder: nn.Module) -> dict[str, Any] | None:
    """`arguments` and `name` of a hook for a decoder; None for one that takes no cache."""
    name = cache_argument(decoder.forward)
    if name is None:
        return None
    return {"arguments": tuple(inspect.signature(decoder.forward).parameters), "name": name}


def _uses_cache(module: nn.Module, given: dict[str, Any]) -> bool:
    asked: bool | None = given.get("use_cache")
    return bool(getattr(module.config, "use_cache", False) if asked is None else asked)
