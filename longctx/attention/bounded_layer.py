"""A layer of a cache that drops tokens, for rules under which no later token sees them.

Legend: B batch, K key/value heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..errors import ModelError

__all__ = ["BoundedLayer"]


class BoundedLayer(DynamicLayer):
    """Keys and values of one layer of which some are kept; a subclass makes `update`.

    Args:
        keeps: what is kept, in words.
        instead: the way out for whoever wants to take tokens back.
    """

    is_croppable = False

    def __init__(self, keeps: str, instead: str) -> None:
        super().__init__()
        self.keeps = keeps
        self.instead = instead
        self.seen = 0
        """Tokens so far, padding and what was dropped included."""
        self._begun = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no keys of this shape and dtype."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def _take_turn(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept before the new tokens, [B, K, n, D] each; they must have been announced."""
        if not self._begun:
            raise ModelError(
                f"this cache keeps {self.keeps}, and the model that it was given to sees all "
                "tokens: start with a new cache."
            )
        self._begun = False
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not."""
        return self.seen

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.is_initialized = self._begun = False
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take nothing back: what was dropped is gone.

        Args:
            tokens_to_remove: minus their number; in older versions of transformers also how many
                tokens to keep.

        Raises:
            ModelError: anything is to be removed.
        """
        kept = tokens_to_remove if tokens_to_remove > 0 else self.seen + tokens_to_remove
        if kept < self.seen:
            raise ModelError(
                f"a cache that keeps {self.keeps} cannot take {self.seen - kept} back, as assisted "
                f"decoding and prompt lookup ask: {self.instead}."
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
        if self.keys is not None and self.values is not None:
            indices = indices.to(self.keys.device)
            self.keys, self.values = self.keys[indices], self.values[indices]
