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
from transformers.cache_utils import DynamicLayer

from ..errors import ModelError
from .cache_hook import CacheHook, forward_arguments
from .linear import PastSums

__all__ = ["StateCaching", "StateLayer", "layer_of"]

_INPUTS = ("input_ids", "inputs_embeds")
_LAYER = "longctx_layer"
"""Attribute of the keys that `StateLayer.update` returns."""


class StateLayer(DynamicLayer):
    """Last keys and values of one layer, and the sums of the others.

    Args:
        window: last tokens W that a query sees by softmax, its own among them.
    """

    is_croppable = False

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.seen = 0
        """Tokens so far, padding included."""
        self.past: PastSums | None = None
        self._begun = False

    def begin(self) -> None:
        """Announce the next tokens: the model that reads them is under the rule."""
        self._begun = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no keys of this shape and dtype."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

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
        if not self._begun:
            raise ModelError(
                f"this cache keeps the last {self.window} tokens and sums of all others, and the "
                "model that it was given to needs their keys: start with a new cache."
            )
        self._begun = False
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
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
        token = 2 * self.keys[:, :, :1].numel() * self.keys.element_size()
        sums = self.past.sums
        if not token:
            batch, heads, _, dim = self.keys.shape
            token = 2 * batch * heads * dim * self.keys.element_size()
        return max(0, self.window - 1) * token + sums.numel() * sums.element_size()

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = self.past = None
        self.is_initialized = self._begun = False
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take nothing back: a token cannot be taken out of a sum.

        Args:
            tokens_to_remove: minus their number; in older versions of transformers also how many
                tokens to keep.

        Raises:
            ModelError: anything is to be removed.
        """
        kept = tokens_to_remove if tokens_to_remove > 0 else self.seen + tokens_to_remove
        if kept < self.seen:
            raise ModelError(
                f"the cache of linear attention holds sums of its tokens and cannot take "
                f"{self.seen - kept} back, as assisted decoding and prompt lookup ask: decode "
                "without those."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, int [B]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take each row so many times."""
        if self.keys is not None:
            self.batch_select_indices(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows `indices`, int [rows] or bool [B]."""
        if self.keys is None or self.values is None or self.past is None:
            return
        indices = indices.to(self.keys.device)
        self.keys, self.values = self.keys[indices], self.values[indices]
        self.past = PastSums(self.past.sums[indices], self.past.number[indices])

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
