"""The slow, plain forms that fast paths are compared with: float64, nothing shared with them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "attention_at_distances",
    "attention_with_linear_bias",
    "linear_attention_with_window",
]


def attention_with_linear_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: tuple[float, ...],
    *,
    scaling: float | None = None,
    visible: Tensor | None = None,
    positions: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """softmax(scaling·q·k − slope·(p_i − p_j)) v as it is written, in float64.

    Args:
        q: [B, H, S, D]; the last query stands on the last key.
        k: [B, K, N, D].
        v: [B, K, N, D].
        slopes: H of them.
        scaling: None for D^(−1/2).
        visible: bool, broadcast to [B, H, S, N], and-ed with causality; None for all.
        positions: of the keys, [B or 1, N]; None for 0 … N−1.
        rows: which queries to compute, int [R]; None for all.

    Returns:
        float64 [B, H, R, D]; 0 where nothing is visible.
    """
    groups, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    rows = torch.arange(queries, device=q.device) if rows is None else rows
    scaling = float(q.shape[-1] ** -0.5 if scaling is None else scaling)
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    index = torch.arange(keys, device=q.device)
    where = index[None] if positions is None else positions
    own = rows + keys - queries
    distance = (where[:, own, None] - where[:, None, :]).double()[:, None]
    slope = torch.tensor(slopes, dtype=torch.float64, device=q.device)[:, None, None]
    logits = scaling * (q[:, :, rows].double() @ key.transpose(-1, -2)) - slope * distance
    seen = index <= own[:, None]
    if visible is not None:
        full = visible.expand(*visible.shape[:-2], queries, keys)
        seen = seen & full[..., rows, :]
    logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ value


def attention_at_distances(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distances: Tensor,
    inv_freq: Tensor,
    *,
    scaling: float | None = None,
    neighbours: bool = False,
) -> Tensor:
    """softmax(scaling·(R(Δ)q)·k) v, each query turned anew for each key, in float64.

    Args:
        q: not turned, [B, H, S, D].
        k: not turned, [B, K, N, D].
        v: [B, K, N, D].
        distances: Δ in tokens, [S, N]; NaN where a query does not see a key.
        inv_freq: radians per token, [P]; the first 2·P channels turn, the others do not.
        scaling: None for D^(−1/2).
        neighbours: plane i is of channels 2i and 2i + 1, else of i and i + P.

    Returns:
        float64 [B, H, S, D]; 0 where a query sees nothing.
    """
    groups, width = q.shape[1] // k.shape[1], 2 * len(inv_freq)
    scaling = float(q.shape[-1] ** -0.5 if scaling is None else scaling)
    query = q.double()
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    pairs = [slice(0, width, 2), slice(1, width, 2)]
    if not neighbours:
        pairs = [slice(0, width // 2), slice(width // 2, width)]
    (q_1, q_2), (k_1, k_2) = ([x[..., part] for part in pairs] for x in (query, key))
    still = query[..., width:] @ key[..., width:].transpose(-1, -2)
    rows: list[Tensor] = []
    for row, distance in enumerate(distances.double()):
        phase = distance.nan_to_num()[:, None] * inv_freq.double()  # [N, P]
        one, other = q_1[:, :, row, None], q_2[:, :, row, None]
        turned_1 = one * phase.cos() - other * phase.sin()
        turned_2 = other * phase.cos() + one * phase.sin()
        logits = scaling * ((turned_1 * k_1 + turned_2 * k_2).sum(-1) + still[:, :, row])
        weights = logits.masked_fill(distance.isnan(), -torch.inf).softmax(-1)
        rows.append((weights.nan_to_num(0.0)[:, :, None] @ value)[:, :, 0])
    return torch.stack(rows, dim=2)


def linear_attention_with_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_features: Tensor,
    k_features: Tensor,
    *,
    gate: Tensor | None,
    window: int,
    scaling: float | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Softmax within a window and features beyond, as `linear` writes it, in float64.

    Args:
        q: [B, H, S, D]; the last query stands on the last key.
        k: [B, K, N, D].
        v: [B, K, N, D].
        q_features: φ_q(q), [B, H, S, F].
        k_features: φ_k(k), [B, K, N, F].
        gate: γ of each head, [H]; None without a window.
        window: W in tokens, the query's own among them.
        scaling: None for D^(−1/2).
        visible: bool, broadcast to [B, H, S, N], and-ed with causality; None for all.

    Returns:
        float64 [B, H, S, D]; 0 where nothing is visible.
    """
    groups, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    scaling = float(q.shape[-1] ** -0.5 if scaling is None else scaling)
    key, value, mapped = (x.double().repeat_interleave(groups, 1) for x in (k, v, k_features))
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    distance = distance.to(q.device)
    seen = distance >= 0 if visible is None else (distance >= 0) & visible
    weights = (q_features.double() @ mapped.transpose(-1, -2)) * (seen & (distance >= window))
    if gate is not None:
        near = seen & (distance < window)
        logits = scaling * (q.double() @ key.transpose(-1, -2))
        logits = logits.masked_fill(~near, -torch.inf)
        most = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
        weights = weights + gate.double()[:, None, None] * (logits - most).exp() * near
    return (weights @ value) / weights.sum(-1, keepdim=True).clamp(min=1e-300)
