"""Causal attention with a linear bias on the keys, on the CPU, by torch's flash operator.

Softmax ignores what is constant along a row, so the bias −m_h·(i − j) of a query i on a key j
equals the key bias m_h·(j − c) for any centre c: O(H·N) memory instead of O(H·N²), and the operator
takes it together with `is_causal`. Float32 rounds logits as large as m_h·N, though, so c moves
along: queries are cut into chunks within which the bias stays small, each chunk attends to the keys
before it (a rectangle) and to its own (a triangle), and the two are merged by their log-sum-exp.
Autograd cannot see through the operator's log-sum-exp, so the backward pass is written here: given
the merged output and log-sum-exp, the gradients of the parts simply add up.

The operator is private to torch. It is named in this file alone, and `usable` compares it with
plain softmax once per process; without it `dispatch.py` computes the same more slowly.

Legend: B batch, H query heads, K key/value heads, S queries, N keys, D head dim. The last query
stands on the last key.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["KeyBias", "biased_attention", "usable"]

_SPAN = {torch.float64: 2.0**40, torch.float32: 2.0**10}
"""Largest bias inside a chunk: float32 logits then carry an error of about 2¹⁰·2⁻²⁵ = 3e-5."""
_SHORT_SPAN = 2.0**15
"""The same for half precision, whose own rounding hides an error of 2¹⁵·2⁻²⁵ = 1e-3."""
_CHUNK = (512, 768)
"""Fewest and most rows of a chunk: fewer are slower, more need more memory to be merged."""
_TILE = 1024
"""Keys per call of the backward pass, whose temporary gradients are as long as that."""


@dataclass(frozen=True, slots=True, eq=False)
class KeyBias:
    """The bias slope·position on each key, and which keys are there at all."""

    slopes: tuple[float, ...]
    """One per query head, in logits (natural log) per token; 0 for no bias."""
    positions: Tensor | None = None
    """Position of each key in tokens, [B or 1, N]; None for 0 … N−1."""
    mask: Tensor | None = None
    """True where a key may be seen, bool [B, N]; None for everywhere."""

    def on_keys(self, stop: int, centre: int, like: Tensor) -> Tensor:
        """Bias of keys 0 … stop−1, 0 at the key `centre`, [B or 1, H, 1, stop], −inf if masked."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        slopes = torch.tensor(self.slopes, dtype=dtype, device=like.device)
        if self.positions is None:
            distance = torch.arange(-centre, stop - centre, device=like.device).to(dtype)[None]
        else:
            distance = self.positions[:, :stop] - self.positions[:, centre : centre + 1]
            distance = distance.to(dtype)
        bias = slopes[:, None, None] * distance[:, None, None, :]
        if self.mask is None:
            return bias
        return bias.masked_fill(~self.mask[:, None, None, :stop], -torch.inf)

    def of_first(self, stop: int) -> KeyBias:
        """The same for keys 0 … stop−1 alone."""
        positions, mask = (None if x is None else x[:, :stop] for x in (self.positions, self.mask))
        return KeyBias(self.slopes, positions, mask)

    def cuts(self, queries: int, keys: int, dtype: torch.dtype) -> list[int]:
        """Borders of the query chunks, 0 … `queries`, so that the bias spans little in each."""
        steepest = max(2.0**-40, *(abs(slope) for slope in self.slopes))
        limit = _SPAN.get(dtype, _SHORT_SPAN)
        span = int(limit / steepest)
        extent = (
            keys if self.positions is None else int(self.positions.max() - self.positions.min())
        )
        if extent > span:
            span = min(max(span, _CHUNK[0]), _CHUNK[1])
        if self.positions is None:
            inner = range(span, queries, span)
        else:
            cell = self.positions[:, keys - queries :].long() // span
            inner = (cell.diff().ne(0).any(0).nonzero().flatten() + 1).tolist()
        return [0, *inner, queries]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Queries `first` … `last`−1, which see `before` keys and then their own, causally."""

    first: int
    last: int
    before: int

    @property
    def stop(self) -> int:
        return self.before + self.last - self.first

    @property
    def centre(self) -> int:
        return (self.before + self.stop) // 2

    def parts(self, tile: int) -> Iterator[tuple[slice, bool]]:
        """(keys, causal) of each call of the operator, at most `tile` keys in a rectangle."""
        if self.last - self.first == 1:
            yield slice(0, self.stop), False
            return
        for start in range(0, self.before, tile):
            yield slice(start, min(start + tile, self.before)), False
        yield slice(self.before, self.stop), True


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float) -> Tensor:
    """Causal attention over keys with a linear bias, exact and differentiable.

    Args:
        q: [B, H, S, D] on the CPU.
        k: [B, K, N, D] with S ≤ N, K a divisor of H.
        v: [B, K, N, D].
        bias: slopes, positions and key mask.
        scaling: factor on q·k.

    Returns:
        [B, H, S, D] in the dtype of q, stored as [B, S, H, D]. A query that sees no key gets 0.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _BiasedAttention.apply(q, k, v, bias, scaling)  # pyright: ignore[reportReturnType]


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float
    ) -> Tensor:
        chunks = _chunks(q, k, bias)
        with _denormals_flushed():
            if len(chunks) == 1:
                out, lse = _chunk_forward(q, k, v, bias, scaling, chunks[0])
            else:
                batch, heads, queries, _ = q.shape
                # Rows first as the operator stores them: the caller's [B, S, H·D] is a view.
                out = q.new_empty(batch, queries, heads, q.shape[3]).transpose(1, 2)
                precise = torch.promote_types(q.dtype, torch.float32)
                lse = q.new_empty(batch, queries, heads, dtype=precise).transpose(1, 2)
                for chunk in chunks:
                    rows = slice(chunk.first, chunk.last)
                    part, lse[:, :, rows] = _chunk_forward(q, k, v, bias, scaling, chunk)
                    out[:, :, rows] = part
                    del part
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.bias, ctx.scaling, ctx.chunks = bias, scaling, chunks
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()

        def gradients(chunk: _Chunk, keys: slice, causal: bool) -> tuple[Tensor, ...]:
            rows = slice(chunk.first, chunk.last)
            return _flash_backward(
                *(grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys]),
                *(out[:, :, rows], lse[:, :, rows], 0.0, causal),
                attn_mask=ctx.bias.on_keys(chunk.stop, chunk.centre, q)[..., keys],
                scale=ctx.scaling,
            )

        calls = [(chunk, *part) for chunk in ctx.chunks for part in chunk.parts(_TILE)]
        with _denormals_flushed():
            if len(calls) == 1:
                grad_q, grad_k, grad_v = gradients(*calls[0])
                return grad_q, grad_k, grad_v, None, None
            # Sums over chunks are kept in float32 where the gradients are shorter.
            total = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
            for chunk, keys, causal in calls:
                _add(total, gradients(chunk, keys, causal), slice(chunk.first, chunk.last), keys)
        return total[0].to(q.dtype), total[1].to(k.dtype), total[2].to(v.dtype), None, None


def _add(total: list[Tensor], parts: tuple[Tensor, ...], rows: slice, keys: slice) -> None:
    for whole, part, where in zip(total, parts, (rows, keys, keys), strict=True):
        whole[:, :, where] += part


def _chunks(q: Tensor, k: Tensor, bias: KeyBias) -> list[_Chunk]:
    queries, keys = q.shape[2], k.shape[2]
    cuts = bias.cuts(queries, keys, q.dtype)
    return [_Chunk(first, last, keys - queries + first) for first, last in pairwise(cuts)]


def _chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, scaling: float, chunk: _Chunk
) -> tuple[Tensor, Tensor]:
    """Output [B, H, rows, D] and log-sum-exp [B, H, rows] of one chunk of queries."""
    key_bias = bias.on_keys(chunk.stop, chunk.centre, q)
    done = [
        _flash(
            *(q[:, :, chunk.first : chunk.last], k[:, :, keys], v[:, :, keys], 0.0, causal),
            attn_mask=key_bias[..., keys],
            scale=scaling,
        )
        for keys, causal in chunk.parts(chunk.before or 1)
    ]
    if len(done) == 1:
        return done[0]
    (before, lse_before), (own, lse_own) = done
    if bias.mask is not None:
        # The operator says 0 instead of −inf for a row that sees nothing.
        seen_before = bias.mask[:, : chunk.before].any(1)[:, None, None]
        seen_own = bias.mask[:, chunk.before : chunk.stop].cumsum(1).gt(0)[:, None]
        lse_before = lse_before.masked_fill(~seen_before, -torch.inf)
        lse_own = lse_own.masked_fill(~seen_own & seen_before, -torch.inf)
    weight = torch.sigmoid(lse_before - lse_own)[..., None]
    merged = own.to(weight.dtype).lerp_(before.to(weight.dtype), weight)
    return merged.to(q.dtype), torch.logaddexp(lse_before, lse_own)


def _flash(*args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **settings)


def _flash_backward(*args: Any, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, **settings)


@contextmanager
def _denormals_flushed() -> Generator[None]:
    """Far keys of a steep head have denormal weights, slow on many processors; flush them to 0.

    The setting belongs to the calling thread; torch's other threads keep theirs.
    """
    before = (torch.tensor(1e-30) * 1e-10).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@lru_cache(maxsize=1)
def usable() -> bool:
    """Whether the private operator is there and computes what this file relies on.

    Warns once if it does not.
    """
    try:
        with torch.inference_mode(mode=False):  # inside it nothing has a gradient
            problem = _probe()
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(
            f"torch {torch.__version__} does not offer the flash attention that longctx uses on "
            f"the CPU ({problem}); biased attention is correct but about twice as slow.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not problem


def _probe() -> str:
    """Compare output and gradients with plain softmax on 2·(4 heads over 2) × 6 tokens."""
    wave = torch.linspace(-2, 2, 2 * 4 * 6 * 8)
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    bias = KeyBias((0.5, 0.25, 0.0, 2.0), mask=mask)
    with torch.enable_grad():
        q, k, v = (
            torch.cos((3 + i) * wave)[: 2 * heads * 6 * 8].reshape(2, heads, 6, 8).requires_grad_()
            for i, heads in enumerate((4, 2, 2))
        )
        out = biased_attention(q, k, v, bias, 0.5)
        found = (out, *torch.autograd.grad(out.sin().sum(), (q, k, v)))
        causal = torch.ones(6, 6, dtype=torch.bool).tril() & mask[:, None, None]
        logits = 0.5 * q @ k.repeat_interleave(2, 1).mT + bias.on_keys(6, 5, q).clamp(min=-1e4)
        weights = logits.masked_fill(~causal, -1e4).softmax(-1) * causal.any(-1, keepdim=True)
        plain = weights @ v.repeat_interleave(2, 1)
        wanted = (plain, *torch.autograd.grad(plain.sin().sum(), (q, k, v)))
    error = max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
    return "" if error < 1e-4 else f"it differs from softmax by {error:.1e}"
