"""Attention that keeps packed documents apart, from their ids, on any model that longctx patches.

    with packed_attention(model) as packed:
        hidden = model.base_model(**packed.inputs(batch)).last_hidden_state

By default each document is attended to on its own, by torch's fused causal kernel: many documents
then cost less than one long one, where a 4D mask costs more. It goes through the house's attention
(`longctx.attention.hook`), so a method that lives there keeps its rule, and calls without packed
documents, evaluation between steps for one, run as before. On CUDA flash-attn's varlen kernel and
torch's flex_attention serve too.

Legend: B batch, H query heads, K kv heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from longctx.attention.hook import ATTRIBUTE, NAME
from longctx.attention.layers import (
    attention_in_use,
    attention_layers,
    put_rules,
    refuse_features,
)
from longctx.errors import ModelError, RunError
from longctx.model import text_config

from ..data.collate import PADDING, check_batch

__all__ = ["AttentionKernel", "DocumentAttention", "PackedAttention", "packed_attention"]

AttentionKernel = Literal["documents", "flash_attention_2", "flex_attention"]

_ROWS = 512
"""Queries of a sliding window that are computed at a time."""
_KINDS = (None, "full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class DocumentAttention:
    """Causal attention within documents; an `AttentionRule` of `longctx.attention.hook`."""

    window: int | None = None
    """Keys that a token sees, itself included, in a sliding layer; None for all before it."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        positions: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """Attend; q [B, H, S, D], k and v [B, K, N, D]. Padding gets 0."""
        if mask is None:
            return _sdpa(q, k, v, None, scaling)
        k, v = k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]]
        if mask.dtype == torch.bool and mask.shape[-2] == 1:
            causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask & causal.tril(k.shape[2] - q.shape[2])
        if mask.dtype == torch.bool or mask.is_floating_point():
            return _sdpa(q, k, v, mask, scaling)
        rows = [_runs(row) for row in mask[:, 0, 0]]
        if all(row == rows[0] for row in rows):
            return self._documents(q, k, v, rows[0], scaling)
        parts = zip(rows, *(x.split(1) for x in (q, k, v)), strict=True)
        return torch.cat([self._documents(q, k, v, runs, scaling) for runs, q, k, v in parts])

    def _documents(
        self, q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int]], scaling: float
    ) -> Tensor:
        """Attention of rows that hold the same documents, (number, tokens) each."""
        if len(runs) > 1 and len({length for _, length in runs}) == 1 and runs[-1][0] != PADDING:
            # As many short documents as there are rows of a batch: one call instead of many.
            fold, unfold = "b h (n s) d -> (b n) h s d", "(b n) h s d -> b h (n s) d"
            q, k, v = (rearrange(x, fold, n=len(runs)) for x in (q, k, v))
            return rearrange(self._document(q, k, v, scaling), unfold, n=len(runs))
        qs, ks, vs = (x.split([length for _, length in runs], dim=2) for x in (q, k, v))
        return torch.cat(
            [
                torch.zeros_like(q) if number == PADDING else self._document(q, k, v, scaling)
                for (number, _), q, k, v in zip(runs, qs, ks, vs, strict=True)
            ],
            dim=2,
        )

    def _document(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        length = q.shape[2]
        if self.window is None or length <= self.window:
            return _sdpa(q, k, v, None, scaling)
        pieces: list[Tensor] = []
        for first, last in pairwise([*range(0, length, _ROWS), length]):
            seen = max(0, first - self.window + 1)
            query = torch.arange(first, last, device=q.device)[:, None]
            distance = query - torch.arange(seen, last, device=q.device)
            mask = (distance >= 0) & (distance < self.window)
            rows, keys = slice(first, last), slice(seen, last)
            pieces.append(_sdpa(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask, scaling))
        return torch.cat(pieces, dim=2)


def _runs(numbers: Tensor) -> list[tuple[int, int]]:
    """(number, tokens) of each document in a row [N]."""
    values, counts = torch.unique_consecutive(numbers, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    # Under a mask not all of torch's fused kernels share kv heads; the one left is slow.
    if mask is not None and q.shape[1] != k.shape[1]:
        k, v = (repeat(x, "b k n d -> b (k g) n d", g=q.shape[1] // x.shape[1]) for x in (k, v))
    return functional.scaled_dot_product_attention(
        *(q, k, v, mask),
        is_causal=mask is None and q.shape[2] > 1,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


@dataclass(slots=True)
class PackedAttention:
    """Packed attention in place on one model; as a context manager it takes itself back."""

    model: PreTrainedModel
    kernel: AttentionKernel
    undo: list[tuple[Any, str, Any, Any]] = field(default_factory=list)
    """(object, attribute, what was there, what was put there)."""

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the model, or its base model, is called with: the mask made for this kernel.

        Args:
            batch: as `collate.Collator` makes it; rows of one document are welcome.

        Raises:
            DataError: a batch that `collate.check_batch` refuses.
            RunError: taken off the model already.
        """
        if not self.undo or any(getattr(obj, name) != put for obj, name, _, put in self.undo):
            raise RunError(
                "packed attention is not on the model any more (removed, or a method was put on or "
                "taken off since): call packed_attention(model) again, after `longctx.extend`."
            )
        check_batch(batch)
        ids = batch["document_ids"]
        common = {name: batch[name] for name in ("input_ids", "position_ids")}
        common["use_cache"] = False  # pyright: ignore[reportArgumentType]
        if self.kernel == "flash_attention_2":
            return {**common, **self.borders(batch)}
        if self.kernel == "flex_attention":
            return {**common, "attention_mask": _block_masks(ids, self.model)}
        return {**common, "attention_mask": ids[:, None, None].int()}

    def borders(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Where documents end, as flash-attn takes it, also beside pieces of the batch."""
        return _varlen(batch["document_ids"])

    def remove(self) -> None:
        """Put back what was there; what was changed by others since is left alone."""
        while self.undo:
            obj, name, was, put = self.undo.pop()
            if getattr(obj, name, None) != put:
                continue
            if was is None and name == ATTRIBUTE:
                delattr(obj, name)
            else:
                setattr(obj, name, was)

    def _set(self, obj: Any, name: str, value: Any) -> None:
        self.undo.append((obj, name, getattr(obj, name, None), value))
        setattr(obj, name, value)

    def __enter__(self) -> PackedAttention:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def packed_attention(
    model: PreTrainedModel, kernel: AttentionKernel | Literal["auto"] = "auto"
) -> PackedAttention:
    """Let `model` keep packed documents apart, reversibly.

    Args:
        model: patched or not; put the method on first.
        kernel: "documents": each on its own by torch's SDPA, anywhere. "flash_attention_2" and
            "flex_attention": on CUDA. "auto": flash-attn for half precision on CUDA where it is
            installed and no method is in the attention, else "documents".

    Raises:
        ModelError: attention that cannot be kept apart by a mask (recurrent, chunked, soft-capped,
            with dropout), or a kernel that would leave out a method's attention.
        RunError: an unknown kernel.
    """
    if kernel not in ("auto", *get_args(AttentionKernel)):
        raise RunError(f"kernel={kernel!r}: pass auto, {', '.join(get_args(AttentionKernel))}.")
    config: Any = text_config(model)
    layers = attention_layers(model)
    kinds = {layer.kind for layer in layers} - set(_KINDS)
    also = [f"{', '.join(sorted(map(str, kinds)))} layers"] if kinds else []
    refused = {"who": "packed attention", "instead": "train it without packing"}
    refuse_features(model, "attn_logit_softcapping", "attention_chunk_size", also=also, **refused)
    taken = attention_in_use(model) == NAME
    if kernel == "auto":
        half = model.dtype in (torch.float16, torch.bfloat16)
        fits = model.device.type == "cuda" and half and not taken and is_flash_attn_2_available()
        kernel = "flash_attention_2" if fits else "documents"
    if kernel != "documents" and taken:
        raise ModelError(
            f"the method on this model lives in longctx's attention, which {kernel} would leave "
            "out: pass kernel='documents'."
        )
    packed = PackedAttention(model, kernel)
    if kernel != "documents":
        before = config._attn_implementation
        model.set_attn_implementation(kernel)
        packed.undo.append((config, "_attn_implementation_internal", before, kernel))
        return packed
    refuse_features(model, "attention_dropout", **refused)
    rules = [
        (layer, DocumentAttention(layer.window))
        for layer in layers
        if not hasattr(layer.module, ATTRIBUTE)
    ]
    put_rules(model, rules, packed._set)  # pyright: ignore[reportPrivateUsage]
    return packed


def _varlen(ids: Tensor) -> dict[str, Any]:
    """Borders of all documents in the flattened batch, as flash-attn's varlen kernel takes them."""
    borders, longest = [0], 0
    for row in ids:
        for _, length in _runs(row):
            borders.append(borders[-1] + length)
            longest = max(longest, length)
    cumulative = torch.tensor(borders, dtype=torch.int32, device=ids.device)
    return {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _block_masks(ids: Tensor, model: PreTrainedModel) -> Any:
    """A flex_attention mask, or one for each layer type where the model has several."""
    from torch.nn.attention.flex_attention import create_block_mask

    def block_mask(window: int | None) -> Any:
        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = (ids[batch, query] == ids[batch, key]) & (query >= key)
            return same if window is None else same & (query - key < window)

        size = ids.shape[1]
        return create_block_mask(visible, len(ids), None, size, size, device=ids.device)

    windows = {layer.kind: layer.window for layer in attention_layers(model)}
    masks = {kind: block_mask(window) for kind, window in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))
