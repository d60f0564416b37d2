"""A cache that keeps a row's first tokens and its last ones, for inputs without end.

Under a rule by which a query sees k sinks and a window of W tokens, its own among them, no later
token sees what lies between. So a layer keeps

    kept  [B, K, n, D]      n ≤ k + W, whatever the number of tokens seen
    row   padding … | sinks 0 … k − 1 | the last W, up to the newest token

A row is one stretch that ends with the newest token. In a batch with padding on the left, the sinks
are each row's first real tokens, and a row that is still short has padding before it. That is all a
rule has to be told: keys that were dropped lie between a row's sinks and its window, and places
count from the end (`spans.spans_of`).

Legend: B batch, K key/value heads, D head_dim.
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

__all__ = ["SinkCaching", "SinkLayer"]


class SinkLayer(BoundedLayer):
    """Keys and values of one layer: the sinks and the last tokens of each row.

    Before each `update` it must be told of the padding, by `begin`: only a model under the rule
    does that, and no other may read what is left here.

    Args:
        sinks: first tokens k of a row that are kept.
        window: last tokens W that a query sees, its own among them.
    """

    def __init__(self, sinks: int, window: int) -> None:
        super().__init__(
            f"{sinks} sinks and the last {window} tokens", "extend with evict=False for those"
        )
        self.sinks = sinks
        self.window = window
        self.starts: tuple[int, ...] = ()
        """Of each row, the tokens of padding before its first real one."""

    def begin(self, starts: Sequence[int]) -> None:
        """Announce the next tokens.

        Args:
            starts: of each row, the tokens of padding before its first real one, as far as seen.

        Raises:
            ModelError: they are not those of the tokens before.
        """
        same = len(starts) == len(self.starts) and all(
            new == old or min(new, old) >= self.seen
            for new, old in zip(starts, self.starts, strict=True)
        )
        if self.seen and not same:
            raise ModelError(
                f"rows begin at tokens {[*starts]} by this call's attention_mask, and at "
                f"{[*self.starts]} in the cache: pass the mask of all tokens seen, "
                "[batch, cached + new], with each call."
            )
        self.starts = tuple(starts)
        self._begun = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # transformers' contract, as the next
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of S tokens, [B, K, S, D].

        Returns:
            What those S tokens need: [B, K, n + S, D] each, n ≤ k + W − 1. For a first call that
            is all.

        Raises:
            ModelError: the model is not, or no longer, under the rule.
        """
        kept, kept_values = self._take_turn(key_states, value_states)
        keys = torch.cat([*self._needed(kept), key_states], dim=2)
        values = torch.cat([*self._needed(kept_values), value_states], dim=2)
        self.seen += key_states.shape[2]
        self.keys, self.values = keys, values
        if keys.shape[2] > self.sinks + self.window:  # let a prompt's memory go at once
            self.keys = torch.cat(self._needed(keys), dim=2)
            self.values = torch.cat(self._needed(values), dim=2)
        return keys, values

    def _needed(self, kept: Tensor) -> list[Tensor]:
        """The sinks and the window that the next token still sees, of [B, K, n, D]."""
        count, recent = kept.shape[2], self.window - 1
        room = self.sinks + recent
        if count <= room:
            return [kept]
        # Where the sinks are; in a short row, what stands before as many tokens as there is room.
        firsts = [count - max(room, min(count, self.seen - start)) for start in self.starts]
        if min(firsts) == max(firsts):
            sinks = kept[:, :, firsts[0] : firsts[0] + self.sinks]
        else:
            rows = torch.arange(len(firsts), device=kept.device)[:, None]
            first = torch.tensor(firsts, device=kept.device)[:, None]
            places = first + torch.arange(self.sinks, device=kept.device)
            sinks = kept.transpose(1, 2)[rows, places].transpose(1, 2)
        return [sinks, kept[:, :, count - recent :]]

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.starts = ()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows `indices`, int [rows] or bool [B]."""
        super().batch_select_indices(indices)
        if self.keys is not None:
            self.starts = tuple(torch.tensor(self.starts)[indices.cpu()].tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkCaching(CacheHook):
    """Empty caches get sink layers, which learn of the padding."""

    sinks: int
    window: int

    @classmethod
    def of(
        cls, decoder: nn.Module, layers: Sequence[int], sinks: int, window: int
    ) -> SinkCaching | None:
        """The hook for a decoder, None for one that takes no cache."""
        takes = forward_arguments(decoder)
        if takes is None:
            return None
        return cls(layers=tuple(layers), sinks=sinks, window=window, **takes)

    def new_layer(self) -> SinkLayer:
        """One that keeps the sinks and the window."""
        return SinkLayer(self.sinks, self.window)

    def begin(self, layers: Sequence[SinkLayer], given: dict[str, Any]) -> None:
        """Say where rows begin.

        Raises:
            ModelError: the layers keep others, or rows begin elsewhere than before.
        """
        starts = _starts(given)
        for layer in layers:
            if (layer.sinks, layer.window) != (self.sinks, self.window):
                raise ModelError(
                    f"this cache keeps {layer.sinks} sinks and the last {layer.window} tokens, "
                    f"and the model sees {self.sinks} and {self.window}: start with a new cache."
                )
            layer.begin(starts)


def _starts(given: dict[str, Any]) -> tuple[int, ...]:
    """Tokens of padding before each row's first real one."""
    mask: Any = given.get("attention_mask")
    if mask is None:
        inputs = (given.get(name) for name in ("input_ids", "inputs_embeds"))
        return (0,) * len(next((x for x in inputs if x is not None), ()))
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        found = f"of shape {[*mask.shape]}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ModelError(
            f"an attention_mask {found}, from which no row's first token can be told: pass it as "
            "[batch, tokens], or extend with evict=False to keep all keys."
        )
    real = mask != 0
    if bool(real[:, 0].all()):
        return (0,) * len(mask)
    first = torch.where(real.any(dim=1), real.int().argmax(dim=1), mask.shape[1])
    return tuple(first.tolist())
