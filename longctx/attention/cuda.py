"""Causal attention with a linear bias on the keys, on CUDA, by other people's fused kernels.

flash-attn has the bias built in (`alibi_slopes`). torch's kernels have none, so q and k carry it in
a few dimensions more; these run on any device, which is how they are tested without a GPU.

Legend: B batch, H query heads, K kv heads, S queries, N keys, D head dim. The last query stands on
the last key.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from .cpu_flash import KeyBias

__all__ = ["extended_attention", "flash_applies", "flash_attention", "unbiased_attention"]

_HALF = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def _package() -> Any | None:
    """The flash-attn package, None where it is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn")


def flash_applies(q: Tensor, bias: KeyBias) -> bool:
    """Whether flash-attn is installed and takes this: half precision, nothing padded or skipped."""
    if _package() is None:
        return False
    plain = bias.positions is None and (bias.mask is None or bool(bias.mask.all()))
    return plain and q.dtype in _HALF and q.shape[-1] <= 256


def flash_attention(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float) -> Tensor:
    """`flash_attn_func` with `alibi_slopes`; shapes as in `cpu_flash.biased_attention`."""
    package: Any = _package()
    out: Tensor = package.flash_attn_func(
        *(rearrange(x, "b h s d -> b s h d") for x in (q, k, v)),
        softmax_scale=scaling,
        causal=True,
        alibi_slopes=torch.tensor(bias.slopes, dtype=torch.float32, device=q.device),
    )
    return rearrange(out, "b s h d -> b h s d")


def unbiased_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Plain causal attention, the last query on the last key; on any device."""
    queries, keys = q.shape[2], k.shape[2]
    return functional.scaled_dot_product_attention(
        *(q, k, v),
        attn_mask=causal_lower_right(queries, keys) if 1 < queries < keys else None,
        is_causal=1 < queries == keys,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def extended_attention(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float) -> Tensor:
    """Fused attention with the bias in extra dimensions, by chunks in which it stays small.

    Shapes as in `cpu_flash.biased_attention`, on any device.
    """
    before = k.shape[2] - q.shape[2]
    pieces: list[Tensor] = []
    for first, last in pairwise(bias.cuts(q.shape[2], k.shape[2], q.dtype)):
        stop = before + last
        rows, seen = q[:, :, first:last], bias.of_first(stop)
        pieces.append(_chunk(rows, k[:, :, :stop], v[:, :, :stop], seen, scaling))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _chunk(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float) -> Tensor:
    """Extend q by the slopes and k by the positions, so that q·k contains the bias.

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
