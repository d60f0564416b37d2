"""The one attention entry of the house: causal, with a linear bias on the distance, on any device.

`attend` picks the kernel: on the CPU torch's flash operator with a key bias (`kernels.py`); on CUDA
flash-attn's `alibi_slopes` where it is installed and applies, else torch's fused attention with the
bias carried by a few extra dimensions of q and k; for arbitrary masks and on other devices a plain
loop over query chunks. All of them compute the same:

    out_i = Σ_j softmax_j(scaling · q_i·k_j − slope_h · (p_i − p_j)) v_j   over visible j ≤ i

Legend: B batch, H query heads, K kv heads, S queries, N keys, D head dim. The last query stands on
the last key, so query i of S is key N − S + i.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from . import kernels
from .errors import ModelError
from .kernels import KeyBias

__all__ = ["LinearBias", "attend"]

_ROWS = 256
"""Queries per step of the plain loop, whose bias is materialised for that many rows."""
_HALF = (torch.float16, torch.bfloat16)


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
        return attend(q, k, v, slopes=self.slopes, mask=mask, positions=positions, scaling=scaling)


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
    if q.device.type == "cpu" and kernels.usable():
        return kernels.biased_attention(q, k, v, bias, scaling)
    if q.is_cuda:
        if _flash_attn() is not None and _flash_applies(q, bias):
            return _flash(q, k, v, bias, scaling)
        return _extended(q, k, v, bias, scaling)
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


@lru_cache(maxsize=1)
def _flash_attn() -> Any | None:
    """The flash-attn package, None where it is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn")


def _flash_applies(q: Tensor, bias: KeyBias) -> bool:
    plain = bias.positions is None and (bias.mask is None or bool(bias.mask.all()))
    return plain and q.dtype in _HALF and q.shape[-1] <= 256


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float) -> Tensor:
    package: Any = _flash_attn()
    out: Tensor = package.flash_attn_func(
        *(rearrange(x, "b h s d -> b s h d") for x in (q, k, v)),
        softmax_scale=scaling,
        causal=True,
        alibi_slopes=torch.tensor(bias.slopes, dtype=torch.float32, device=q.device),
    )
    return rearrange(out, "b s h d -> b h s d")


def _extended(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float) -> Tensor:
    """Fused attention with the bias as extra dimensions: q gets the slopes, k the positions.

    Both are split into terms of the dtype, one dimension for each product: two of bf16 hold every
    integer up to 2¹⁶, three up to 2²⁴. Padded keys get a dimension that pushes them out of the
    softmax.
    """
    (_, _, queries, dim), keys = q.shape, k.shape[2]
    slopes = torch.tensor(bias.slopes, dtype=torch.float64, device=q.device)
    positions = bias.positions
    if positions is None:
        positions = torch.arange(keys, device=q.device)[None]
    middle = positions[:, keys - 1 - queries // 2, None]
    half = q.dtype in _HALF
    far = half and (bias.positions is not None or keys > 2**17)
    # A sixteenth of a token is exact, and keeps float16 in its range up to 2²⁰ tokens.
    on_q = _terms(16 * slopes / scaling, q.dtype, 2 if half else 1)
    on_k = _terms((positions - middle).double() / 16, q.dtype, (3 if far else 2) if half else 1)
    pairs = [(a, b) for a in on_q for b in on_k]
    extra_q = repeat(torch.stack([a for a, _ in pairs], -1), "h e -> b h s e", b=len(q), s=queries)
    extra_k = torch.stack([b for _, b in pairs], -1)[:, None]
    extra_k = extra_k.expand(k.shape[0], k.shape[1], -1, -1)
    if bias.mask is not None:
        extra_q = functional.pad(extra_q, (0, 1), value=256.0)
        out_of_sight = (~bias.mask).to(k.dtype)[:, None, :, None] * -32768.0
        extra_k = torch.cat([extra_k, out_of_sight.expand(-1, k.shape[1], -1, -1)], -1)
    width = extra_q.shape[-1]
    width += -(dim + width) % 8  # fused kernels want a head dim that 8 divides
    q = torch.cat([q, functional.pad(extra_q, (0, width - extra_q.shape[-1]))], -1)
    k = torch.cat([k, functional.pad(extra_k, (0, width - extra_k.shape[-1]))], -1)
    v = functional.pad(v, (0, width))
    grouped = half and dim + width <= 256  # elsewhere no fused kernel shares kv heads
    if not grouped:
        k, v = (repeat(x, "b k n d -> b (k g) n d", g=q.shape[1] // x.shape[1]) for x in (k, v))
    out = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=causal_lower_right(queries, keys) if 1 < queries < keys else None,
        is_causal=1 < queries == keys,
        scale=scaling,
        enable_gqa=grouped,
    )[..., :dim]
    if bias.mask is not None:
        sees = bias.mask.cumsum(1)[:, keys - queries :].gt(0)
        out = out * sees[:, None, :, None]
    return out


def _terms(exact: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Split float64 numbers into `count` of a shorter dtype that add up to them, largest first."""
    terms: list[Tensor] = []
    for _ in range(count):
        terms.append(exact.to(dtype))
        exact = exact - terms[-1].double()
    return terms
