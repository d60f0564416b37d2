"""Attention over regions, each computed by a fused kernel and merged by its log-sum-exp.

With o_r and l_r the output and log-sum-exp of region r alone, the softmax over all of them is

    l = log Σ_r exp(l_r),   o = Σ_r exp(l_r − l) · o_r

On the CPU torch's flash operator gives both. Autograd cannot see through its log-sum-exp, so the
backward pass is written here: given the merged output and log-sum-exp, the gradients of the regions
add up. A band of w keys is folded into blocks of queries that see w keys each and their own, as
overlapping views of the same memory. On CUDA torch's flex_attention gives both (`cuda.py`) and
autograd sees through it; small regions and other devices have their logits written out.

Legend: B batch, H query heads, K kv heads, S queries, N keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from . import cpu_flash, cuda
from .regions import Region, lengths

__all__ = ["Turned", "merged_attention"]

_BLOCK = (32, 256)
"""Fewest and most queries of a block of a band."""
_FOLDED = 16
"""Blocks of a band whose gradients are computed at once."""
_ROWS = 512
"""Queries per step where logits are written out."""


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """Queries or keys of a span, turned one way, from token `first` on."""

    tensor: Tensor
    """[B, heads, tokens, D]."""
    first: int = 0


def merged_attention(
    queries: Sequence[Turned],
    keys: Sequence[Turned],
    values: Tensor,
    regions: Sequence[Region],
    scaling: float,
    rows: int,
) -> Tensor:
    """Softmax attention over all regions together, differentiable.

    Args:
        queries: for each `query_turn`, [B, H, …, D].
        keys: for each `key_turn`, [B, K, …, D].
        values: [B, K, N, D].
        regions: which rows see which keys; no pair twice.
        scaling: factor on q·k.
        rows: S.

    Returns:
        [B, H, S, D] in the dtype of the values. A query in no region gets 0.
    """
    regions = [region for region in regions if not region.empty]
    call = _Call(
        tuple(regions),
        tuple(x.first for x in queries),
        tuple(x.first for x in keys),
        scaling,
        rows,
    )
    tensors = [x.tensor if x.tensor.stride(-1) == 1 else x.tensor.contiguous() for x in queries]
    tensors += [x.tensor if x.tensor.stride(-1) == 1 else x.tensor.contiguous() for x in keys]
    values = values if values.stride(-1) == 1 else values.contiguous()
    if values.device.type == "cpu" and not torch.compiler.is_compiling() and cpu_flash.usable():
        return _Merged.apply(call, *tensors, values)  # pyright: ignore[reportReturnType]
    return _by_autograd(call, tensors, values)


@dataclass(frozen=True, slots=True)
class _Call:
    regions: tuple[Region, ...]
    first_rows: tuple[int, ...]
    first_keys: tuple[int, ...]
    scaling: float
    rows: int

    def operands(
        self, region: Region, tensors: Sequence[Tensor], values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one region; those of several slices are copied together."""
        query = tensors[region.query_turn]
        key = tensors[len(self.first_rows) + region.key_turn]
        return (
            _taken(query, self.row_slices(region)),
            _taken(key, self.key_slices(region)),
            _taken(values, region.keys),
        )

    def row_slices(self, region: Region) -> tuple[slice, ...]:
        return _minus(region.rows, self.first_rows[region.query_turn])

    def key_slices(self, region: Region) -> tuple[slice, ...]:
        return _minus(region.keys, self.first_keys[region.key_turn])


def _minus(parts: tuple[slice, ...], first: int) -> tuple[slice, ...]:
    if not first:
        return parts
    return tuple(slice(part.start - first, part.stop - first, part.step) for part in parts)


def _taken(x: Tensor, parts: tuple[slice, ...]) -> Tensor:
    pieces = [x[:, :, part] for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _split(x: Tensor, parts: tuple[slice, ...]) -> Sequence[Tensor]:
    """What belongs to each slice, the other way round."""
    return [x] if len(parts) == 1 else x.split(lengths(parts), dim=2)


def _add(total: Tensor, parts: tuple[slice, ...], gradient: Tensor) -> None:
    for part, piece in zip(parts, _split(gradient, parts), strict=True):
        total[:, :, part] += piece


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, call: _Call, *tensors: Tensor
    ) -> Tensor:
        *turned, values = tensors
        one = call.rows == 1 and len(call.regions) > 0
        out, lse = _one_query(call, turned, values) if one else _queries(call, turned, values)
        out = out.to(values.dtype)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        *turned, values, out, lse = ctx.saved_tensors
        call: _Call = ctx.call
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        # Sums over regions are kept in float32 where the gradients are shorter.
        totals = [torch.zeros_like(x, dtype=lse.dtype) for x in turned]
        total_v = torch.zeros_like(values, dtype=lse.dtype)
        for region in call.regions:
            q, k, v = call.operands(region, turned, values)
            rows = region.rows
            done = _taken(grad, rows), _taken(out, rows), _taken(lse, rows)
            total_q = totals[region.query_turn]
            total_k = totals[len(call.first_rows) + region.key_turn]
            if region.seen == "band":
                total_q = total_q[:, :, call.row_slices(region)[0]]
                on_k = total_k[:, :, call.key_slices(region)[0]]
                on_v = total_v[:, :, region.keys[0]]
                _band_backward(region, (q, k, v), done, (total_q, on_k, on_v), call.scaling)
                continue
            causal = region.seen == "causal"
            grad_q, grad_k, grad_v = _flash_backward(q, k, v, *done, call.scaling, causal=causal)
            _add(total_q, call.row_slices(region), grad_q)
            _add(total_k, call.key_slices(region), grad_k)
            _add(total_v, region.keys, grad_v)
        totals = [total.to(x.dtype) for total, x in zip(totals, turned, strict=True)]
        return None, *totals, total_v.to(values.dtype)


def _queries(call: _Call, turned: Sequence[Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of all regions together, [B, H, S, D] and [B, H, S] in float32."""
    batch, heads, _, dim = turned[0].shape
    precise = torch.promote_types(values.dtype, torch.float32)
    # Rows first as the operator stores them: the caller's [B, S, H·D] is a view.
    shape = (batch, call.rows, heads)
    out = values.new_zeros(*shape, dim, dtype=precise).transpose(1, 2)
    lse = values.new_full(shape, -torch.inf, dtype=precise).transpose(1, 2)
    for region in call.regions:
        q, k, v = call.operands(region, turned, values)
        if region.seen == "band":
            into = out[:, :, region.rows[0]], lse[:, :, region.rows[0]]
            for fold in _folds(region):
                mask = fold.mask(q)
                for b in range(batch):
                    part_q, part_out, part_lse = (fold.queries(x[b]) for x in (q, *into))
                    part_k, part_v = fold.keys(k[b]), fold.keys(v[b])
                    done = _flash(part_q, part_k, part_v, call.scaling, mask)
                    _merge(part_out, part_lse, *done)
            continue
        done = _flash(q, k, v, call.scaling, causal=region.seen == "causal")
        pieces = (_split(x, region.rows) for x in done)
        for rows, *piece in zip(region.rows, *pieces, strict=True):
            _merge(out[:, :, rows], lse[:, :, rows], *piece)
    return out, lse


def _one_query(call: _Call, turned: Sequence[Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a single query: the heads that share a kv head are its rows."""
    batch, kv_heads = values.shape[:2]
    # Keys are read once for all these heads, but threads share out the heads.
    grouped = batch * kv_heads % torch.get_num_threads() == 0
    found: list[tuple[Tensor, Tensor]] = []
    for region in call.regions:
        q, k, v = call.operands(region, turned, values)
        q = q[:, :, 0].unflatten(1, (kv_heads, -1)) if grouped else q
        out, lse = _flash(q, k, v, call.scaling)
        found.append((out.to(lse.dtype), lse))
    (out, lse), *others = found
    for part in others:
        _merge(out, lse, *part)
    if not grouped:
        return out, lse
    return out.flatten(1, 2)[:, :, None], lse.flatten(1, 2)[:, :, None]


@dataclass(frozen=True, slots=True)
class _Fold:
    """Equal blocks of the queries of a band, as a batch."""

    first: int
    size: int
    count: int
    window: int

    def queries(self, x: Tensor) -> Tensor:
        """[heads, rows, …] as [blocks, heads, queries of a block, …], a view."""
        rows = x[:, self.first : self.first + self.size * self.count]
        return rows.unflatten(1, (self.count, self.size)).transpose(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """[heads, keys, D] as [blocks, heads, keys of a block, D], overlapping views."""
        x = x[:, self.first :]
        heads, _, dim = x.shape
        on_head, on_token, on_dim = x.stride()
        return x.as_strided(
            (self.count, heads, self.size + self.window - 1, dim),
            (self.size * on_token, on_head, on_token, on_dim),
        )

    def mask(self, like: Tensor) -> Tensor:
        """What is added to the logits of a block, [1, 1, queries, keys]."""
        shape = (1, 1, self.size, self.size + self.window - 1)
        seen = torch.ones(shape, dtype=torch.bool).triu().tril(self.window - 1)
        return torch.zeros(shape, dtype=like.dtype).masked_fill(~seen, -torch.inf)


def _folds(region: Region, most: int | None = None) -> Iterator[_Fold]:
    rows = lengths(region.rows)[0]
    size = min(max(_BLOCK[0], min(_BLOCK[1], region.window)), rows)
    count = rows // size
    for first in range(0, count, most or count):
        yield _Fold(first * size, size, min(most or count, count - first), region.window)
    if rows % size:
        yield _Fold(count * size, rows % size, 1, region.window)


def _band_backward(
    region: Region,
    operands: tuple[Tensor, Tensor, Tensor],
    done: tuple[Tensor, Tensor, Tensor],
    totals: tuple[Tensor, Tensor, Tensor],
    scaling: float,
) -> None:
    """Add the gradients of a band to the totals, a few blocks at a time."""
    for fold in _folds(region, _FOLDED):
        mask = fold.mask(operands[0])
        for b in range(len(operands[0])):
            q, k, v = (x[b] for x in operands)
            grad, out, lse = (fold.queries(x[b]) for x in done)
            parts = fold.queries(q), fold.keys(k), fold.keys(v), grad, out, lse
            grad_q, grad_k, grad_v = _flash_backward(*parts, scaling, mask)
            fold.queries(totals[0][b]).add_(grad_q)
            for total, gradient in ((totals[1], grad_k), (totals[2], grad_v)):
                for block, piece in enumerate(gradient):
                    start = fold.first + block * fold.size
                    total[b, :, start : start + piece.shape[1]] += piece


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a part into what is there, in place."""
    part_lse = part_lse.to(lse.dtype)
    out.lerp_(part.to(out.dtype), torch.sigmoid(part_lse - lse)[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return operator(q, k, v, 0.0, causal, attn_mask=mask, scale=scaling)


def _flash_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return operator(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scaling)


def _by_autograd(call: _Call, tensors: Sequence[Tensor], values: Tensor) -> Tensor:
    """The same by operations that autograd knows."""
    query = tensors[0]
    precise = torch.promote_types(values.dtype, torch.float32)
    shape = (len(query), query.shape[1], call.rows)
    out = values.new_zeros(*shape, query.shape[-1], dtype=precise)
    lse = values.new_full(shape, -torch.inf, dtype=precise)
    for region in call.regions:
        q, k, v = call.operands(region, tensors, values)
        # Few queries are not worth a kernel that has to be compiled.
        if q.shape[2] >= cuda.FEW_QUERIES and cuda.flex_applies(q):
            part, part_lse = cuda.region_attention(
                *(q, k, v, region.seen, region.window, call.scaling)
            )
        else:
            part, part_lse = _written_out(q, k, v, region, call.scaling)
        before, before_lse = (_taken(x, region.rows) for x in (out, lse))
        weight = torch.sigmoid(part_lse - before_lse)[..., None]
        merged, merged_lse = before.lerp(part.to(precise), weight), before_lse.logaddexp(part_lse)
        where = torch.arange(call.rows, device=out.device)
        index = torch.cat([where[rows] for rows in region.rows])
        out = out.index_copy(2, index, merged)
        lse = lse.index_copy(2, index, merged_lse)
    return out.to(values.dtype)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, region: Region, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a region with its logits written out, a few rows at a time."""
    done: list[tuple[Tensor, Tensor]] = []
    for first in range(0, q.shape[2], _ROWS):
        arguments = (q[:, :, first : first + _ROWS], k, v, region, first, scaling)
        if torch.is_grad_enabled():  # the logits are made again, not kept
            settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            done.append(checkpoint(_region_rows, *arguments, **settings))
        else:
            done.append(_region_rows(*arguments))
    out, lse = zip(*done, strict=True)
    return torch.cat(out, dim=2), torch.cat(lse, dim=2)


def _region_rows(
    q: Tensor, k: Tensor, v: Tensor, region: Region, first: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of some rows of a region, from row `first` on."""
    precise = torch.promote_types(v.dtype, torch.float32)
    last = q.shape[2] + first
    if region.seen == "causal":
        columns = slice(0, last)
    elif region.seen == "band":
        columns = slice(first, last + region.window - 1)
    else:
        columns = slice(None)
    groups = q.shape[1] // k.shape[1]
    key, value = (
        repeat(x[:, :, columns], "b k n d -> b (k g) n d", g=groups).to(precise) for x in (k, v)
    )
    logits = scaling * q.to(precise) @ key.transpose(-1, -2)
    row = torch.arange(first, last, device=q.device)[:, None]
    column = torch.arange(k.shape[2], device=q.device)[columns]
    if region.seen == "causal":
        logits = logits.masked_fill(column > row, -torch.inf)
    elif region.seen == "band":
        hidden = (column < row) | (column >= row + region.window)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)
