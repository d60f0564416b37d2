"""Linear attention for old tokens and softmax for the last ones, over one normaliser.

With features φ_q(q), φ_k(k) ≥ 0 and a window of W tokens, the query's own among them, query i gets

    out_i = (Σ_{i−j<W} γ e^{s_ij−c_i} v_j + Σ_{i−j≥W} φ_q(q_i)·φ_k(k_j) v_j) / (same without v)

with s_ij = scaling · q_i·k_j and c_i = max s_ij over the window. γ, of each head, weighs the window
against the past. W = 0 is linear attention alone.

What lies behind the window needs no keys, only the sum of φ_k(k_j) [v_j, 1]ᵀ: `PastSums`. So a
prompt is read chunk by chunk (`attend_linearly`), and a chunk of one token is the recurrent form of
decoding. `reference.linear_attention_with_window` is the quadratic form.

Source: Zhang et al. 2024, LoLCATs (arXiv:2410.10254), section 3.2, equation 6; Katharopoulos et al.
2020 (arXiv:2006.16236), section 3.2, the sum as a state.

Legend: B batch, H query heads, K key/value heads, g = H / K, S queries, N keys, D head dim,
F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["PastSums", "attend_linearly", "row_numbers"]

_CHUNK = 64
"""Fewest queries that are computed at a time."""


@dataclass(frozen=True, slots=True)
class PastSums:
    """What is left of the keys behind the window."""

    sums: Tensor
    """Σ φ_k(k) [v, 1]ᵀ, float32 or float64 [B, K, F, D + 1]."""
    number: Tensor
    """Of the document that the sums are of, int [B]."""


def attend_linearly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    gate: Tensor | None,
    window: int,
    scaling: float,
    numbers: Tensor,
    past: PastSums | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, PastSums]:
    """Attend chunk by chunk, differentiable.

    Args:
        q: [B, H, S, D]; the last query stands on the last key.
        k: [B, K, N, D]; after `past` at least the W − 1 keys before the first query.
        v: [B, K, N, D].
        features: φ_q from [B, K, g, n, D] to [B, K, g, n, F], and φ_k from [B, K, n, D] to
            [B, K, n, F].
        gate: γ [H], above 0; None without a window.
        window: W in tokens, the query's own among them.
        scaling: factor on q·k inside the window.
        numbers: of each key's document, int [B, N], not falling along a row but for padding; tokens
            see their own document alone.
        past: of the keys before those given; None where there are none.
        chunk: queries at a time; by default the larger of the window and 64.

    Returns:
        [B, H, S, D] in the dtype of v, 0 where a query sees nothing; and the past of the next
        token, which is all but the last W − 1 keys.
    """
    queries, keys, kv_heads = q.shape[2], k.shape[2], k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    size = chunk or max(_CHUNK, window)
    of_query, of_key = features
    q = rearrange(q, "b (k g) s d -> b k g s d", k=kv_heads)
    ones = torch.ones_like(v[..., :1])
    values = torch.cat([v, ones], dim=-1).to(dtype)  # the last channel adds up the weights
    gates = None if gate is None else rearrange(gate.to(dtype), "(k g) -> k g 1 1", k=kv_heads)
    done, pieces = 0, list[Tensor]()

    def absorb(stop: int) -> None:
        """Move keys up to `stop` into the past."""
        nonlocal done, past
        if stop > done:
            part = slice(done, stop)
            mapped = of_key(k[:, :, part]).to(dtype)
            past = _added(past, mapped, values[:, :, part], numbers[:, part])
            done = stop

    for first in range(0, queries, size):
        rows = q[:, :, :, first : first + size]
        own = keys - queries + first  # the key that the chunk's first query stands on
        stop = own + rows.shape[3]
        absorb(min(max(own - window + 1, 0), stop))
        mapped = of_query(rows).to(dtype)
        number = numbers[:, own:stop]
        place = torch.arange(own, stop, device=q.device)[:, None]
        distance = place - torch.arange(done, stop, device=q.device)
        same = number[:, :, None] == numbers[:, None, done:stop]
        near = ((distance >= 0) & (distance < window) & same)[:, None, None]
        weights = _near(rows, k[:, :, None, done:stop], near, gates, scaling, dtype)
        if stop - done > max(window, 1) or window == 0:
            far = ((distance >= window) & same)[:, None, None]
            linear = mapped @ of_key(k[:, :, done:stop]).to(dtype)[:, :, None].transpose(-1, -2)
            weights = weights + linear * far
        found = weights @ values[:, :, None, done:stop]
        if past is not None:
            sees = (number == past.number[:, None])[:, None, None, :, None]
            found = found + (mapped * sees) @ past.sums[:, :, None]
        pieces.append(found[..., :-1] / found[..., -1:].clamp(min=torch.finfo(dtype).tiny))
    absorb(min(max(keys - window + 1, 0), keys))
    out = rearrange(torch.cat(pieces, dim=3), "b k g s d -> b (k g) s d").to(v.dtype)
    return out, past if past is not None else _nothing(values, of_key(k[:, :, :0]), dtype)


def row_numbers(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Numbers of documents [B, N] for a mask of `hook`'s first three kinds; padding is apart.

    Args:
        q: [B, H, S, D].
        k: [B, K, N, D].
        mask: None, bool [B, 1, 1, n ≥ N] whose last entries are of the keys, or int [B, 1, 1, N].
    """
    if mask is None:
        return torch.ones(len(q), k.shape[2], dtype=torch.int64, device=q.device)
    return mask[:, 0, 0, mask.shape[-1] - k.shape[2] :].long().expand(len(q), -1)


def _near(
    q: Tensor, k: Tensor, near: Tensor, gate: Tensor | None, scaling: float, dtype: torch.dtype
) -> Tensor:
    """Weights of the window, [B, K, g, S, n]."""
    if gate is None:
        return torch.zeros((), dtype=dtype, device=q.device).expand(*q.shape[:4], k.shape[-2])
    scores = (scaling * (q.to(dtype) @ k.to(dtype).transpose(-1, -2))).masked_fill(
        ~near, -torch.inf
    )
    most = scores.amax(-1, keepdim=True)
    most = most.masked_fill(most == -torch.inf, 0.0)
    return gate * (scores - most).exp()


def _added(past: PastSums | None, mapped: Tensor, values: Tensor, numbers: Tensor) -> PastSums:
    """The past with further keys [B, K, n, F] in it: of the last document alone."""
    number = numbers.amax(1)
    if past is not None:
        number = torch.maximum(number, past.number)
    own = (numbers == number[:, None])[:, None, :, None]
    sums = (mapped * own).transpose(-1, -2) @ values
    if past is not None:
        sums = sums + past.sums * (past.number == number)[:, None, None, None]
    return PastSums(sums, number)


def _nothing(values: Tensor, mapped: Tensor, dtype: torch.dtype) -> PastSums:
    batch, heads, _, width = values.shape
    sums = torch.zeros(batch, heads, mapped.shape[-1], width, dtype=dtype, device=values.device)
    return PastSums(sums, torch.full((batch,), -1, device=values.device))
