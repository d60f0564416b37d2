"""Hedgehog's feature maps in an attention rule, and fitting them to a layer's softmax attention.

    φ(x) = softmax([W x, −W x]),   W of each head, F/2 × D

Legend: B batch, H query heads, K key/value heads, g = H / K, S queries, N keys, D head dim,
F features.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

from longctx.attention.dispatch import attend
from longctx.attention.linear import attend_linearly, row_numbers
from longctx.attention.reference import linear_attention_with_window
from longctx.attention.state_cache import layer_of
from longctx.errors import ModelError

__all__ = ["Fitting", "HedgehogAttention", "forms_differ"]

_log = logging.getLogger(__name__)
_GATE = -2.2
"""First log-odds of γ: sigmoid(−2.2) = 0.1, as LoLCATs begins."""
_ROWS_TOKENS = 2_048
"""Tokens of a step of the fit."""
_RATE = 1e-2
_PROOF = 96
"""Tokens on which the three forms are compared."""


class HedgehogAttention(nn.Module):
    """An `AttentionRule`: softmax within a window, features of rotated queries and keys beyond.

    Args:
        heads: H.
        kv_heads: K.
        dim: D.
        window: W in tokens, the query's own among them; 0 for features alone.
        features: F, even.
    """

    def __init__(self, heads: int, kv_heads: int, dim: int, window: int, features: int) -> None:
        super().__init__()
        self.window = window
        first = _first_map(features // 2, dim)
        self.query = nn.Parameter(first.repeat(heads, 1, 1))
        self.key = nn.Parameter(first.repeat(kv_heads, 1, 1))
        self.gate = nn.Parameter(torch.full((heads,), _GATE)) if window else None

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
        """Attend; q [B, H, S, D], k and v [B, K, N, D]. Positions stand in q and k already.

        Raises:
            ModelError: a mask for each query.
        """
        del positions
        if mask is not None and mask.shape[-3:-1] != (1, 1):
            raise ModelError(
                f"a mask {[*mask.shape]} for each query, which linear attention has no form for: "
                "expected attention_mask as [batch, tokens]."
            )
        layer = layer_of(k)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast only v has been cast
        if mask is not None and mask.shape[-1] < k.shape[2]:  # a static cache, empty at its end
            k, v = k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]]
        with torch.autocast(q.device.type, enabled=False):  # sums over a long text stay float32
            out, past = attend_linearly(
                *(q, k, v),
                features=(self.of_query, self.of_key),
                gate=None if self.gate is None else self.gate.sigmoid(),
                window=self.window,
                scaling=scaling,
                numbers=row_numbers(q, k, mask),
                past=None if layer is None else layer.past,
            )
        if layer is not None:
            layer.keep(past)
        return out

    def of_query(self, q: Tensor) -> Tensor:
        """φ_q, [B, K, g, S, D] → [B, K, g, S, F]."""
        return _features(q, rearrange(self.query, "(k g) f d -> k g d f", k=q.shape[1]))

    def of_key(self, k: Tensor) -> Tensor:
        """φ_k, [B, K, N, D] → [B, K, N, F]."""
        return _features(k, self.key.transpose(1, 2))

    def extra_repr(self) -> str:
        """Sizes."""
        heads, half, dim = self.query.shape
        return f"window={self.window}, heads={heads}, dim={dim}, features={2 * half}"


def _features(x: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mapped = x.to(dtype) @ weight.to(dtype)
    return torch.cat([mapped, -mapped], dim=-1).softmax(-1)


def _first_map(half: int, dim: int) -> Tensor:
    """The identity; with fewer or more rows, orthogonal ones, always the same."""
    if half == dim:
        return torch.eye(dim)
    generator = torch.Generator().manual_seed(0)
    return nn.init.orthogonal_(torch.empty(half, dim), generator=generator)


@dataclass(slots=True)
class Fitting:
    """An `AttentionRule` that attends by softmax, and fits its maps to what comes of it.

    Source: Zhang et al. 2024, LoLCATs (arXiv:2410.10254), section 3.1, attention transfer.
    """

    name: str
    """Of the layer, to say how far it is."""
    window: int
    features: int | None
    steps: int
    rule: HedgehogAttention | None = None
    """The fitted one, once the layer has read the text."""
    off: tuple[float, float] = (torch.nan, torch.nan)
    """Share of the outputs' energy that it misses, before and after the fit."""
    forms: float = torch.nan
    """Largest difference of its three forms, in float64."""
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

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
        """Attend by softmax; q [B, H, S, D], k and v [B, K, N, D]."""
        del positions
        wanted = attend(q, k, v, slopes=(0.0,) * q.shape[1], mask=mask, scaling=scaling)
        heads, dim = q.shape[1], q.shape[-1]
        rule = HedgehogAttention(heads, k.shape[1], dim, self.window, self.features or 2 * dim).to(
            q.device
        )
        given = tuple(x.detach().float() for x in (q, k, v))
        before = _missed(rule, given, wanted, scaling)
        with torch.enable_grad():
            self._fit(rule, given, wanted.detach().float(), scaling)
        self.off = before, _missed(rule, given, wanted, scaling)
        self.forms = forms_differ(rule, tuple(x[:1, :, :_PROOF] for x in given), scaling)
        self.rule = rule.to(v.dtype)
        _log.info(
            "%s: features fitted, missing %.0f%% of the outputs", self.name, 100 * self.off[1]
        )
        return wanted

    def _fit(
        self, rule: HedgehogAttention, given: tuple[Tensor, ...], wanted: Tensor, scaling: float
    ) -> None:
        rows = max(1, _ROWS_TOKENS // wanted.shape[2])
        optimizer = torch.optim.AdamW(rule.parameters(), lr=_RATE, weight_decay=0.0)
        for _ in range(self.steps):
            some = torch.randperm(len(wanted), generator=self.generator)[:rows].to(wanted.device)
            q, k, v = (x[some] for x in given)
            out = rule(q, k, v, mask=None, positions=None, scaling=scaling)
            loss = _share_missed(out, wanted[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _missed(
    rule: HedgehogAttention, given: tuple[Tensor, ...], wanted: Tensor, scaling: float
) -> float:
    q, k, v = given
    out = rule(q, k, v, mask=None, positions=None, scaling=scaling)
    return float(_share_missed(out, wanted.float()))


def _share_missed(out: Tensor, wanted: Tensor) -> Tensor:
    energy = wanted.square().sum().clamp(min=torch.finfo(wanted.dtype).tiny)  # 0 of a dead layer
    return (out - wanted).square().sum() / energy


@torch.no_grad()
def forms_differ(rule: HedgehogAttention, given: tuple[Tensor, ...], scaling: float) -> float:
    """Largest difference of the chunked and the recurrent from the quadratic form, in float64.

    Args:
        rule: its maps.
        given: q [B, H, S, D], k and v [B, K, S, D].
        scaling: factor on q·k.
    """
    q, k, v = (x.double() for x in given)
    gate = None if rule.gate is None else rule.gate.double().sigmoid()
    grouped = rearrange(q, "b (k g) s d -> b k g s d", k=k.shape[1])
    wanted = linear_attention_with_window(
        *(q, k, v, rule.of_query(grouped).flatten(1, 2), rule.of_key(k)),
        gate=gate,
        window=rule.window,
        scaling=scaling,
    )
    found = [
        attend_linearly(
            *(q, k, v),
            features=(rule.of_query, rule.of_key),
            gate=gate,
            window=rule.window,
            scaling=scaling,
            numbers=row_numbers(q, k, None),
            chunk=chunk,
        )[0]
        for chunk in (1, 16)
    ]
    return max(float((one - wanted).abs().max()) for one in found)
