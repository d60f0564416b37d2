"""S²-Attn: while training, attention within groups of tokens, in half the heads shifted by half.

    g = ⌈N / groups⌉        tokens of a group, for a document of N tokens
    heads h < ⌊H/2⌋         token i sees the tokens j ≤ i of its group [0, g), [g, 2g), …
    the other heads         … of its group [0, ⌊g/2⌋), [⌊g/2⌋, ⌊g/2⌋ + g), …

The last group holds what is left. Tokens reach past their group through the other half of the
heads, one layer later, and attention costs about 1/groups of the whole. Groups do not wrap around:
in the reference code the tokens of the first half group see those of the last, which is the future.
Positions stay the model's own, so it stacks with a method that changes frequencies
(`extend(model, "linear", factor=8)`, then `extend(model, "shifted")`). Packed documents and padded
rows are grouped each on its own; short documents are cut as finely as long ones, so mix few in.

For training alone: a module in eval mode attends to everything, as LongLoRA is evaluated and
served, and a saved checkpoint is one of plain attention. The mode of each attention module decides
(`model.train()`, `model.eval()`), as it does for dropout, and not whether gradients are on, which
they are not in the first pass of some gradient checkpointing. Tokens after cached ones see
everything in either mode, yet the prompt before them is grouped in train mode: generate in eval.

Use it to fine-tune on long texts with LoRA, embeddings and norms trained whole. Source: Chen et al.
2023, LongLoRA (arXiv:2309.12307), section 3.2.

Legend: B batch, H query heads, K kv heads, S queries, N keys, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from longctx.attention.dispatch import attend
from longctx.attention.hook import key_positions
from longctx.attention.layers import AttentionLayer
from longctx.errors import MethodError, ModelError
from longctx.patch import Patch

from ._attention import AttentionMethod

__all__ = ["METHOD", "GroupedAttention", "Shifted"]


class GroupedAttention(nn.Module):
    """S²-Attn in train mode, plain causal attention else; an `AttentionRule` with a mode.

    A module, so that `model.train()` and `model.eval()` reach it.

    Args:
        groups: groups of a document.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def extra_repr(self) -> str:
        """What tells two rules apart."""
        return f"groups={self.groups}"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        positions: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """Attend; q [B, H, S, D], k and v [B, K, N, D]. What padding gets means nothing.

        Raises:
            ModelError: in train mode, a mask of neither padding nor numbered documents.
        """
        key_positions(positions, q, k, mask)  # refuses documents that no mask keeps apart
        keys = k.shape[2] if mask is None else mask.shape[-1]
        if not self.training or q.shape[2] != keys:
            if mask is None:  # as transformers would, to the last bit
                return _causal(q, k, v, scaling)
            return attend(q, k, v, slopes=(0.0,) * q.shape[1], mask=mask, scaling=scaling)
        if mask is not None and (mask.shape[-3:-1] != (1, 1) or mask.is_floating_point()):
            raise ModelError(
                f"a mask of shape {[*mask.shape]} ({mask.dtype}) in training: shifted groups whole "
                "documents. Pass attention_mask as [batch, tokens], or packed documents by their "
                "numbers (longctx.train.packed); model.eval() takes any mask."
            )
        k, v = k[:, :, :keys], v[:, :, :keys]
        rows = [[keys]] if mask is None else [_documents(row) for row in mask[:, 0, 0]]
        if all(row == rows[0] for row in rows):
            return self._row(q, k, v, rows[0], scaling)
        parts = zip(rows, *(x.split(1) for x in (q, k, v)), strict=True)
        return torch.cat([self._row(q, k, v, row, scaling) for row, q, k, v in parts])

    def _row(self, q: Tensor, k: Tensor, v: Tensor, documents: list[int], scaling: float) -> Tensor:
        """Attention of rows whose documents have these lengths."""
        half = q.shape[1] // 2
        # Query heads of one kv head may fall into both halves, which then need one each.
        shared = math.gcd(q.shape[1] // k.shape[1], half)
        copies = q.shape[1] // k.shape[1] // shared
        if copies > 1:
            k, v = (repeat(x, "b k n d -> b (k c) n d", c=copies) for x in (k, v))
        cut = half // shared
        near = (q[:, :half], k[:, :cut], v[:, :cut])
        far = (q[:, half:], k[:, cut:], v[:, cut:])
        return torch.cat(
            [
                _within(*heads, _groups(documents, self.groups, shifted), scaling)
                for heads, shifted in ((near, False), (far, True))
                if heads[0].shape[1]
            ],
            dim=1,
        )


def _documents(row: Tensor) -> list[int]:
    """Tokens of each document, padding included, in a row [N] of numbers or of what is real."""
    values, counts = torch.unique_consecutive(row, return_counts=True)
    if row.dtype == torch.bool and int(values.sum()) > 1:
        raise ModelError(
            f"a row of {len(row)} tokens with padding inside its text ({int(row.sum())} are real): "
            "expected padding on the left or on the right; pack documents by their numbers instead."
        )
    return counts.tolist()


def _groups(documents: list[int], groups: int, shifted: bool) -> list[int]:
    """Tokens of each group along a row."""
    sizes: list[int] = []
    for length in documents:
        size = -(-length // groups)
        first = size // 2 if shifted else 0
        whole, rest = divmod(length - first, size)
        sizes += [n for n in (first, *[size] * whole, rest) if n]
    return sizes


def _within(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], scaling: float) -> Tensor:
    """Causal attention within groups of these sizes; neighbours of one size go as a batch."""
    pieces: list[Tensor] = []
    first = 0
    for size, same in groupby(sizes):
        count = len(list(same))
        rows = slice(first, first + count * size)
        fold, unfold = "b h (n g) d -> (b n) h g d", "(b n) h g d -> b h (n g) d"
        folded_q, folded_k, folded_v = (rearrange(x[:, :, rows], fold, n=count) for x in (q, k, v))
        out = _causal(folded_q, folded_k, folded_v, scaling)
        pieces.append(rearrange(out, unfold, n=count))
        first = rows.stop
    return torch.cat(pieces, dim=2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    return functional.scaled_dot_product_attention(
        q, k, v, is_causal=q.shape[2] > 1, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


@dataclass(frozen=True, slots=True)
class Shifted(AttentionMethod):
    """Shifted sparse attention in every full-attention layer, for as long as the model trains."""

    groups: int = 4
    """Groups of a document, 2 or more; half the heads have half a group more."""

    name: ClassVar[str] = "shifted"
    plain_loadable: ClassVar[bool] = True
    trains_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.groups) is not int or self.groups < 2:
            raise MethodError(
                f"shifted: groups={self.groups!r} must be a whole number ≥ 2; LongLoRA trains with "
                "4 (groups=4)."
            )

    def rule(self, model: PreTrainedModel, layer: AttentionLayer, patch: Patch) -> GroupedAttention:
        """Grouped attention, the same in every layer."""
        del model, layer, patch
        return GroupedAttention(self.groups)


METHOD = Shifted
