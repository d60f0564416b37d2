"""The size of a key/value cache, read off a model on the meta device: no weights, no memory.

One token is read by a model without storage into transformers' own cache, whose layers then say
what they keep: grouped heads, latent vectors (DeepSeek), sliding windows, shared layers. Experts
are left out of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from longctx.config_windows import CONVERSION
from longctx.errors import ModelError

__all__ = ["CachedLayer", "KvCache"]

_MLPS = ("mlp", "block_sparse_moe", "feed_forward")


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """What one layer keeps."""

    numbers: int
    """For a token: of all keys and values."""
    window: int | None
    """Tokens that a query of a sliding layer sees, itself included; None for all before it."""
    most: int | None = None
    """Tokens that are kept at most, by a method; None for all."""

    def kept(self, tokens: int) -> int:
        """Tokens kept after so many: transformers drops what the next query cannot see."""
        limits = [self.window - 1] if self.window else []
        limits += [] if self.most is None else [self.most]
        return min(tokens, *limits) if limits else tokens

    def read(self, tokens: int) -> int:
        """Tokens whose keys the last of so many reads, its own among them."""
        limits = [limit for limit in (self.window, self.most) if limit]
        return min(tokens, *limits) if limits else tokens


@dataclass(frozen=True, slots=True)
class KvCache:
    """The cache of one row."""

    layers: tuple[CachedLayer, ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> KvCache:
        """Look at the layers of the cache that a model of this config fills.

        Raises:
            ModelError: layers that keep something else than keys and values, or a family that
                cannot be built without weights.
        """
        model_type = config.model_type
        if getattr(config, CONVERSION, None) is not None:
            raise ModelError(
                f"this model was made by {getattr(config, CONVERSION).get('name')}, whose cache is "
                "another than its config says: longctx.convert reports it."
            )
        try:
            cache = _filled(config)
        except Exception as error:  # families fail in many ways on a model without storage
            raise ModelError(
                f"the cache of model type {model_type!r} is not known ({type(error).__name__}: "
                f"{error}): expected a decoder of attention layers."
            ) from error
        layers: list[CachedLayer] = []
        filled: list[Any] = cache.layers
        for layer in filled:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ModelError(
                    f"model type {model_type!r} keeps a {type(layer).__name__} beside keys and "
                    "values: expected a decoder of attention layers."
                )
            if layer.keys is None or layer.values is None:  # it shares those of a layer before
                continue
            window: Any = getattr(layer, "sliding_window", None)
            numbers = layer.keys.numel() + layer.values.numel()
            layers.append(CachedLayer(numbers, None if window is None else int(window)))
        return cls(tuple(layers))

    def bounded(self, most: int | None) -> KvCache:
        """The same with at most so many tokens in each layer that sees all of them."""
        return KvCache(
            tuple(
                CachedLayer(layer.numbers, layer.window, None if layer.window else most)
                for layer in self.layers
            )
        )

    def numbers(self, tokens: int) -> int:
        """Numbers that it holds after so many tokens."""
        return sum(layer.numbers * layer.kept(tokens) for layer in self.layers)

    def read(self, tokens: int) -> int:
        """Numbers that the last of so many tokens reads."""
        return sum(layer.numbers * layer.read(tokens) for layer in self.layers)

    @property
    def growth(self) -> int:
        """Numbers that a further token of a long text adds."""
        return sum(x.numbers for x in self.layers if x.window is None and x.most is None)


class _Through(nn.Module):
    """Stands in for a mixture of experts."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return x


def _filled(config: PreTrainedConfig) -> DynamicCache:
    """A cache on the meta device that has seen one token."""
    config = copy.deepcopy(config)  # building writes into it
    config._attn_implementation = "eager"  # pyright: ignore[reportPrivateUsage]
    cache = DynamicCache(config=config)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        for layer in getattr(model.get_decoder(), "layers", ()):
            experts = any("experts" in name for name, _ in layer.named_modules())
            for name in _MLPS if experts else ():  # routing asks for values, which there are not
                if hasattr(layer, name):
                    setattr(layer, name, _Through())
        ids = torch.zeros(1, 1, dtype=torch.int64)
        model.eval()(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache
