"""Causal attention with a linear bias on the keys, on CUDA, by other people's fused kernels.

flash-attn has the bias built in (`alibi_slopes`). torch's flex_attention computes it in a kernel
that it compiles. Where there is no Triton to compile with, q and k carry the bias in a few
dimensions more of torch's own kernels. Few queries (decoding) take the bias as a small tensor. All
but flash-attn run on any device, which is how they are tested without a GPU.

Attention over regions (`merged.py`) takes flex_attention too, with its log-sum-exp and no bias.

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
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.bias import causal_lower_right

from .cpu_flash import KeyBias

__all__ = [
    "FEW_QUERIES",
    "block_mask",
    "extended_attention",
    "few_queries_attention",
    "flash_applies",
    "flash_attention",
    "flex_applies",
    "flex_attention",
    "region_attention",
    "unbiased_attention",
]

FEW_QUERIES = 128
"""With fewer, the bias on all keys is a small tensor, and no kernel has to be compiled."""
_HALF = (torch.float16, torch.bfloat16)
_BLOCK = 128  # queries and keys of a block, flex_attention's own default


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


def few_queries_attention(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float) -> Tensor:
    """Attention of a few queries with the bias as a [B or 1, H, S, N] tensor, on any device.

    Query heads of one kv head stand beside each other as queries, so that no key is repeated.
    Shapes as in `cpu_flash.biased_attention`.
    """
    heads, queries, keys = k.shape[1], q.shape[2], k.shape[2]
    own = torch.arange(keys - queries, keys, device=q.device)
    place = torch.arange(keys, device=q.device)
    positions = place[None] if bias.positions is None else bias.positions
    distance = positions[:, own, None] - positions[:, None]  # 0 on itself: near keys stay exact
    slopes = torch.tensor(bias.slopes, dtype=torch.float32, device=q.device)
    hidden = (place > own[:, None])[None]
    if bias.mask is not None:
        hidden = hidden | ~bias.mask[:, None]
    added = -slopes[:, None, None] * distance[:, None]
    added = added.masked_fill(hidden[:, None], torch.finfo(q.dtype).min).to(q.dtype)
    out = functional.scaled_dot_product_attention(
        rearrange(q, "b (k g) s d -> b k (g s) d", k=heads),
        k,
        v,
        attn_mask=rearrange(added, "b (k g) s n -> b k (g s) n", k=heads),
        scale=scaling,
    )
    out = rearrange(out, "b k (g s) d -> b (k g) s d", s=queries)
    return out * ~hidden.all(-1)[:, None, :, None]


def flex_applies(q: Tensor) -> bool:
    """Whether torch can compile flex_attention for this: CUDA, Triton, a head dim of 16 or more."""
    return q.is_cuda and q.shape[-1] >= 16 and importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Any:
    """One function for the process, which torch compiles once for each class of shapes."""
    return torch.compile(flex.flex_attention)


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: KeyBias,
    scaling: float,
    documents: Tensor | None = None,
) -> Tensor:
    """Torch's flex_attention, compiled on CUDA; shapes as in `cpu_flash.biased_attention`.

    Args:
        q: [B, H, S, D].
        k: [B, K, N, D].
        v: [B, K, N, D].
        bias: slopes, positions and key mask.
        scaling: factor on q·k.
        documents: number of each key's document, int [B, N], which do not see each other.

    Returns:
        [B, H, S, D]. A query that sees no key gets 0.
    """
    slopes = torch.tensor(bias.slopes, dtype=torch.float32, device=q.device)
    offset = torch.tensor(k.shape[2] - q.shape[2], device=q.device)
    if bias.positions is None:

        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slopes[h] * (i + offset - j)
    else:
        positions = bias.positions.expand(len(q), -1).contiguous()

        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slopes[h] * (positions[b, i + offset] - positions[b, j])

    attend = _compiled_flex_attention() if q.is_cuda else flex.flex_attention
    return attend(
        q,
        k,
        v,
        score_mod=add_bias,
        block_mask=block_mask(q.shape[2], k.shape[2], q.device, bias.mask, documents),
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def region_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: str, window: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention over one region by torch's flex_attention, compiled on CUDA.

    Differentiable on CUDA through both results; torch has no backward pass for it elsewhere.

    Args:
        q: [B, H, S, D].
        k: [B, K, N, D].
        v: [B, K, N, D].
        seen: "all" keys, "causal" (S = N), or "band" (N = S + window − 1), as of a `Region`.
        window: keys that a query of a band sees.
        scaling: factor on q·k.

    Returns:
        [B, H, S, D] in the dtype of v, and the log-sum-exp of the logits [B, H, S] in float32.
    """
    attend: Any = _compiled_flex_attention() if q.is_cuda else flex.flex_attention
    limits = window if seen == "band" else None
    shape = q.shape[2], k.shape[2], q.device
    out, more = attend(
        q,
        k,
        v,
        block_mask=None if seen == "all" else _region_mask(*shape, limits),
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=flex.AuxRequest(lse=True),
    )
    return out, more.lse


@lru_cache(maxsize=64)
def _region_mask(
    queries: int, keys: int, device: torch.device, window: int | None
) -> flex.BlockMask:
    """Made once for all layers, which have the same regions."""
    with torch.inference_mode(mode=False):  # kept for passes that have gradients
        return block_mask(queries, keys, device, window=window)


def block_mask(
    queries: int,
    keys: int,
    device: torch.device,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
) -> flex.BlockMask:
    """Which blocks of keys each block of queries sees: torch's own way looks at every pair of them.

    Args:
        queries: S, the last of which stands on the last key.
        keys: N.
        device: where to make it.
        mask: true where a key may be seen, bool [B, N].
        documents: number of each key's document, int [B, N].
        window: keys that a query sees up to its own; None for all.
    """
    offset = torch.tensor(keys - queries, device=device)
    reach = torch.tensor(window or 0, device=device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i + offset
        if window is not None:
            seen = seen & (j > i + offset - reach)
        if mask is not None:
            seen = seen & mask[b, j]
        if documents is not None:
            seen = seen & (documents[b, i + offset] == documents[b, j])
        return seen

    rows, columns = -(-queries // _BLOCK), -(-keys // _BLOCK)
    first_row = torch.arange(rows, device=device)[:, None] * _BLOCK + keys - queries
    last_row = (first_row + _BLOCK - 1).clamp(max=keys - 1)
    first_key = torch.arange(columns, device=device) * _BLOCK
    last_key = first_key + _BLOCK - 1  # of the last block it may lie beyond: never whole then
    some, whole = first_key <= last_row, (last_key <= first_row) & (last_key < keys)
    if window is not None:
        some, whole = (
            some & (last_key > first_row - window),
            whole & (first_key > last_row - window),
        )
    some, whole = some[None], whole[None]
    if mask is not None:
        real = functional.pad(mask, (0, columns * _BLOCK - keys)).unflatten(1, (columns, _BLOCK))
        some, whole = some & real.any(-1)[:, None], whole & real.all(-1)[:, None]
    if documents is not None:
        low, high = _document_range(documents, first_key[None], last_key[None].clamp(max=keys - 1))
        low_row, high_row = _document_range(documents, first_row[:, 0][None], last_row[:, 0][None])
        some = some & (low_row[..., None] <= high[:, None]) & (low[:, None] <= high_row[..., None])
        one = (low == high)[:, None] & (low_row == high_row)[..., None]
        whole = whole & one & (low_row[..., None] == low[:, None])
    return flex.BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(queries, keys),
    )


def _document_range(documents: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """First and last document of blocks of keys, whose numbers only grow, [B, blocks] each."""
    batch = len(documents)
    return documents.gather(1, first.expand(batch, -1)), documents.gather(1, last.expand(batch, -1))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has [B, 1, rows], and which, in front [B, 1, rows, columns]."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


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
