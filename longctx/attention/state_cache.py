"""A cache of bounded size for linear attention: the last keys, and the sums of all before them.

    keys, values  [B, K, n, D]      n ≤ W − 1, the last tokens
    past          [B, K, F, D + 1]  `linear.PastSums`, float32

`update` hands the keys to the rule with the layer itself on them (`layer_of`), since transformers
passes an attention function nothing else of the cache. The rule computes the sums, and leaves here
what the next token needs.

Legend: B batch, K key/value heads, D head_dim, F features, W tokens of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .bounded_layer import BoundedLayer
from .cache_hook import CacheHook, forward_arguments
from .linear import PastSums

__all__ = ["StateCaching", "StateLayer", "layer_of"]

_INPUTS = ("input_ids", "inputs_embeds")
_LAYER = "longctx_layer"
"""Attribute of the keys that `StateLayer.update` returns."""


class StateLayer(BoundedLayer):
    """Last keys and values of one layer, and the sums of the others.

    Args:
        window: last tokens W that a query sees by softmax, its own among them.
    """

    def __init__(self, window: int) -> None:
        super().__init__(f"the last {window} tokens and sums of all others", "decode without those")
        self.window = window
        self.past: PastSums | None = None

    def begin(self) -> None:
        """Announce the next tokens: the model that reads them is under the rule."""
        self._begun = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # transformers' contract, as the next
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Put S tokens [B, K, S, D] behind the last ones.

        Returns:
            What the rule needs: [B, K, n + S, D] each, the layer with the keys.

        Raises:
            ModelError: the model is not, or no longer, under the rule.
        """
        keys, values = self._take_turn(key_states, value_states)
        self.keys = torch.cat([keys, key_states], dim=2)
        self.values = torch.cat([values, value_states], dim=2)
        self.seen += key_states.shape[2]
        handed = self.keys.view_as(self.keys)
        setattr(handed, _LAYER, self)
        return handed, self.values

    def keep(self, past: PastSums) -> None:
        """Leave the sums of all keys but the last W − 1, and drop those keys."""
        assert self.keys is not None
        assert self.values is not None
        self.past = past
        gone = max(0, self.keys.shape[2] - max(0, self.window - 1))
        # Copies, so that a prompt's memory goes at once.
        self.keys, self.values = self.keys[:, :, gone:].clone(), self.values[:, :, gone:].clone()

    @property
    def bytes(self) -> int:
        """Most that it comes to, for the rows that are in it."""
        if self.keys is None or self.past is None:
            return 0
        batch, heads, _, dim = self.keys.shape
        token = 2 * batch * heads * dim * self.keys.element_size()
        sums = self.past.sums
        return max(0, self.window - 1) * token + sums.numel() * sums.element_size()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.past = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows `indices`, int [rows] or bool [B]."""
        super().batch_select_indices(indices)
        if self.past is not None:
            rows = indices.to(self.past.sums.device)
            self.past = PastSums(self.past.sums[rows], self.past.number[rows])

    def offload(self) -> None:
        """Move it to the CPU's memory."""
        super().offload()
        self._move_past(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move it back."""
        super().prefetch()
        if self.keys is not None:
            self._move_past(self.keys.device)

    def _move_past(self, device: torch.device) -> None:
        if self.past is not None:
            self.past = PastSums(self.past.sums.to(device), self.past.number.to(device))


def layer_of(keys: Tensor) -> StateLayer | None:
    """The layer that these keys come from, None where all keys are kept or there is no cache."""
    return getattr(keys, _LAYER, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCaching(CacheHook):
    """Empty caches get layers of bounded size, and padded rows positions of their own.

    Features see positions themselves, not distances alone: a row must be counted from its first
    real token, as `generate` does it.
    """

    window: int

    @classmethod
    def of(cls, decoder: nn.Module, layers: Sequence[int], window: int) -> StateCaching | None:
        """The hook for a decoder, None for one that takes no cache."""
        takes = forward_arguments(decoder)
        return None if takes is None else cls(layers=tuple(layers), window=window, **takes)

    def new_layer(self) -> StateLayer:
        """One that keeps the window."""
        return StateLayer(self.window)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Make cache and positions ready for this call."""
        made = super(StateCaching, self).__call__(module, args, kwargs)
        args, kwargs = made or (args, kwargs)
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask == 0).any())
        if not padded or given.get("position_ids") is not None:
            return made
        inputs = next(x for n in _INPUTS if (x := given.get(n)) is not None)
        places = ((mask != 0).cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        return (), {**given, "position_ids": places}

    def begin(self, layers: Sequence[StateLayer], given: dict[str, Any]) -> None:
        """Announce the call.

        Raises:
            ModelError: the layers keep another window.
        """
        del given
        for layer in layers:
            if layer.window != self.window:
                raise ModelError(
                    f"this cache keeps the last {layer.window} tokens, and the model sees "
                    f"{self.window}: start with a new cache."
                )
            layer.begin()
