"""The one attention entry of the house: causal, with a linear bias on the distance, on any device.

`attend` picks the kernel: on the CPU torch's flash operator with a key bias (`cpu_flash.py`); on
CUDA (`cuda.py`) flash-attn's `alibi_slopes` where it is installed and applies, else torch's
flex_attention, compiled for the bias (or its fused attention with the bias in a few extra
dimensions of q and k where Triton is missing); for arbitrary masks and on other devices a plain
loop over query chunks. All of them compute the same:

    out_i = Σ_j softmax_j(scaling · q_i·k_j − slope_h · (p_i − p_j)) v_j   over visible j ≤ i

Legend: B batch, H query heads, K kv heads, S queries, N keys, D head dim. The last query stands on
the last key, so query i of S is key N − S + i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError
from . import cpu_flash, cuda
from .cpu_flash import KeyBias
from .hook import key_positions

__all__ = ["LinearBias", "attend"]

_ROWS = 256
"""Queries per step of the plain loop, whose bias is materialised for that many rows."""


@dataclass(frozen=True, slots=True)
class LinearBias:
    """Attention that prefers near keys: −slope·distance on the logits (ALiBi's bias)."""

    slopes: tuple[float, ...]
    """One per query head, ≥ 0, in logits (natural log) per token."""

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
        """Attend with this bias; see `attend`."""
        positions = key_positions(positions, q, k, mask)
        return attend(q, k, v, slopes=self.slopes, mask=mask, positions=positions, scaling=scaling)

    def __str__(self) -> str:
        steep, flat = max(self.slopes), min(self.slopes)
        return f"linear bias, {len(self.slopes)} slopes {steep:.4g} … {flat:.4g}"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: tuple[float, ...],
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Causal attention with a linear bias on the distance, differentiable.

    Args:
        q: [B, H, S, D].
        k: [B, K, N, D], K a divisor of H, S ≤ N.
        v: [B, K, N, D].
        slopes: H of them, in logits per token of distance.
        mask: None (every key is real); bool [B, 1, 1, n], true where a key may be seen, which also
            cuts the keys to the first n; integers [B, 1, 1, N], the number of each key's document
            (documents are contiguous and do not see each other; S = N); or [B, 1, S, N], bool or
            added to the logits, which then says everything, causality included.
        positions: of the keys, in tokens, [B or 1, N]; None for consecutive ones.
        scaling: factor on q·k; None for D^(−1/2).

    Returns:
        [B, H, S, D] in the dtype of v. A query that sees no key gets 0.

    Raises:
        ModelError: shapes that do not fit, more queries than keys among them.
    """
    scaling = float(q.shape[-1] ** -0.5 if scaling is None else scaling)
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast only v has been cast
    full = mask is not None and (mask.shape[-3:-1] != (1, 1) or mask.is_floating_point())
    if mask is not None and not full:
        k, v = k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]]
    positions = None if positions is None else positions[:, : k.shape[2]]
    _check_shapes(q, k, v, slopes, mask, full)
    if q.numel() == 0:
        return torch.empty_like(q)
    if mask is None:
        return _causal(q, k, v, KeyBias(slopes, positions), scaling)
    if full:
        return _plain(q, k, v, KeyBias(slopes, positions), scaling, mask)
    if mask.dtype != torch.bool:
        numbers = mask[:, 0, 0].expand(len(q), -1)
        bias = KeyBias(slopes, positions)
        if cuda.flex_applies(q) and not cuda.flash_applies(q, bias):
            return cuda.flex_attention(q, k, v, bias, scaling, numbers)
        return _documents(q, k, v, slopes, numbers, positions, scaling)
    return _causal(q, k, v, KeyBias(slopes, positions, mask[:, 0, 0]), scaling)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, slopes: tuple[float, ...], mask: Tensor | None, full: bool
) -> None:
    shapes = f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}"
    if k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ModelError(f"{shapes}: expected keys and values of one shape and q's head dim.")
    if q.shape[2] > k.shape[2]:
        raise ModelError(f"{shapes}: more queries than keys; the mask leaves too few keys.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or len(slopes) != q.shape[1]:
        raise ModelError(
            f"{shapes} with {len(slopes)} slopes: expected one slope per query head and a number "
            "of query heads that the kv heads divide."
        )
    if full and mask is not None and mask.shape[-2:] != (q.shape[2], k.shape[2]):
        raise ModelError(f"{shapes} with a mask {[*mask.shape]}: its last two sizes must be S, N.")
    numbered = mask is not None and not full and mask.dtype != torch.bool
    if numbered and q.shape[2] != k.shape[2]:
        raise ModelError(
            f"{shapes} with numbered documents: packing needs as many queries as keys."
        )


def _causal(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float) -> Tensor:
    # A compiler sees neither the operator's backward pass nor how it was tried.
    if q.device.type == "cpu" and not torch.compiler.is_compiling() and cpu_flash.usable():
        return cpu_flash.biased_attention(q, k, v, bias, scaling)
    if q.is_cuda and not any(bias.slopes) and (bias.mask is None or bool(bias.mask.all())):
        return cuda.unbiased_attention(q, k, v, scaling)
    if q.is_cuda and cuda.flash_applies(q, bias):
        return cuda.flash_attention(q, k, v, bias, scaling)
    if q.is_cuda and q.shape[2] < cuda.FEW_QUERIES:
        return cuda.few_queries_attention(q, k, v, bias, scaling)
    if cuda.flex_applies(q):
        return cuda.flex_attention(q, k, v, bias, scaling)
    if q.is_cuda:
        return cuda.extended_attention(q, k, v, bias, scaling)
    return _plain(q, k, v, bias, scaling, None)


def _documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: tuple[float, ...],
    numbers: Tensor,
    positions: Tensor | None,
    scaling: float,
) -> Tensor:
    """Each document on its own: packing costs less than one long document, not more."""
    batch: list[Tensor] = []
    for b in range(q.shape[0]):
        lengths: list[int] = torch.unique_consecutive(numbers[b], return_counts=True)[1].tolist()
        places: Sequence[Tensor | None] = [None] * len(lengths)
        if positions is not None:
            places = positions[b % len(positions), None].split(lengths, dim=1)
        qs, ks, vs = (x[b, None].split(lengths, dim=2) for x in (q, k, v))
        done = [
            _causal(q, k, v, KeyBias(slopes, place), scaling)
            for q, k, v, place in zip(qs, ks, vs, places, strict=True)
        ]
        batch.append(torch.cat(done, dim=2))
    return torch.cat(batch)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float, full: Tensor | None
) -> Tensor:
    """A loop over query chunks with the bias materialised, in float32; under any mask."""
    heads = q.shape[1] // k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    key, value = (repeat(x, "b k n d -> b (k g) n d", g=heads).to(dtype) for x in (k, v))

    total, keys = q.shape[2], k.shape[2]

    def chunk(q: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
        own = keys - total + first + torch.arange(q.shape[2], device=q.device)
        added = bias.on_keys(keys, int(own[len(own) // 2]), q)
        if full is None:
            unseen = own[:, None] < torch.arange(keys, device=q.device)
        else:
            unseen = full[:, :, first : first + q.shape[2]]
            if unseen.is_floating_point():
                added, unseen = added + unseen.to(dtype), torch.tensor(False, device=q.device)
            else:
                unseen = ~unseen.bool()
        added = added.masked_fill(unseen, -torch.inf)
        # Finite, so that a row that sees nothing has a gradient; it is set to 0 below.
        floor = torch.finfo(dtype).min
        sees = (added > floor).any(-1, keepdim=True)
        out = functional.scaled_dot_product_attention(
            q.to(dtype), key, value, attn_mask=added.clamp(min=floor), scale=scaling
        )
        return out * sees

    pieces: list[Tensor] = []
    for first in range(0, total, _ROWS):
        rows = q[:, :, first : first + _ROWS]
        if torch.is_grad_enabled():  # the bias of each chunk is made again, not kept
            settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            pieces.append(checkpoint(chunk, rows, key, value, first, **settings))
        else:
            pieces.append(chunk(rows, key, value, first))
    return torch.cat(pieces, dim=2).to(q.dtype)
