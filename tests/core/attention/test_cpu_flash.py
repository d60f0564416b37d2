"""The CPU kernel: chunks, their merge, and the backward pass written for it."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.attention import cpu_flash
from longctx.attention.cpu_flash import KeyBias, biased_attention
from longctx.attention.reference import attention_with_linear_bias

from ...families import build, tokens

STEEP = (0.9, 0.5, 0.1, 0.0)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of about ten queries, so that small inputs go through the merge."""
    for dtype in (torch.float32, torch.float64):
        monkeypatch.setitem(cpu_flash._SPAN, dtype, 9.0)
    monkeypatch.setattr(cpu_flash, "_CHUNK", (1, 1024))
    monkeypatch.setattr(cpu_flash, "_TILE", 7)


def qkv(
    queries: int, keys: int, dtype: torch.dtype = torch.float32, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out as transformers does, [B, S, H, D] seen as [B, H, S, D]."""
    g = torch.Generator().manual_seed(queries + keys)

    def draw(heads: int, length: int) -> Tensor:
        x = torch.randn(batch, length, heads, 8, generator=g, dtype=torch.float64)
        return x.to(dtype).transpose(1, 2).requires_grad_()

    return draw(4, queries), draw(2, keys), draw(2, keys)


def masked(keys: int) -> Tensor:
    """Left padding in one row of the batch, wider than a chunk; holes where chunks begin."""
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[0, : keys // 2] = False
    mask[1, 20:27] = False
    return mask


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(45, 45), (20, 45), (1, 45), (2, 45), (1, 1)])
def test_output_and_gradients_are_the_naive_ones(queries: int, keys: int, padded: bool) -> None:
    q, k, v = qkv(queries, keys)
    mask = masked(keys) if padded and keys > 1 else None
    out = biased_attention(q, k, v, KeyBias(STEEP, mask=mask), 0.3)
    visible = None if mask is None else mask[:, None, None]
    wanted = attention_with_linear_bias(q, k, v, STEEP, scaling=0.3, visible=visible)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-6)
    upstream = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    if mask is not None and visible is not None:
        # The naive form has no gradient where a row sees nothing: show it all and weigh it 0.
        seeing = mask.cumsum(1).gt(0)[:, None, keys - queries :, None]
        upstream, visible = upstream * seeing, visible | ~seeing
    found = torch.autograd.grad(out, (q, k, v), upstream)
    exact_q, exact_k, exact_v = (x.detach().double().requires_grad_() for x in (q, k, v))
    plain = attention_with_linear_bias(
        exact_q, exact_k, exact_v, STEEP, scaling=0.3, visible=visible
    )
    exact = torch.autograd.grad(plain, (exact_q, exact_k, exact_v), upstream.double())
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("small_chunks")
def test_gradcheck_through_the_merge() -> None:
    q, k, v = qkv(13, 17, torch.float64, batch=1)
    assert len(cpu_flash._chunks(q, k, KeyBias(STEEP))) > 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return biased_attention(q, k, v, KeyBias(STEEP), 0.4)

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.usefixtures("small_chunks")
def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient() -> None:
    q, k, v = qkv(45, 45)
    mask = masked(45)
    out = biased_attention(q, k, v, KeyBias(STEEP, mask=mask), 0.3)
    assert (out[0, :, :22] == 0).all()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad[0, :, :22] == 0).all()


def test_positions_with_jumps_are_cut_where_they_jump() -> None:
    q, k, v = qkv(60, 60)
    positions = torch.arange(60)[None].repeat(2, 1)
    positions[0, 20:] += 100_000
    positions[1, 41:] += 70_000
    bias = KeyBias(STEEP, positions)
    assert {20, 41} <= set(bias.cuts(60, 60, torch.float32))
    out = biased_attention(q, k, v, bias, 0.3)
    wanted = attention_with_linear_bias(q, k, v, STEEP, scaling=0.3, positions=positions)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-6)


def test_long_and_steep_needs_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8192, 16, generator=g) for _ in range(3))
    rows = torch.arange(0, 8192, 127)
    wanted = attention_with_linear_bias(q, k, v, (0.85, 0.004), rows=rows)

    def error() -> float:
        out = biased_attention(q, k, v, KeyBias((0.85, 0.004)), 0.25)
        return (out[:, :, rows] - wanted).abs().max().item()

    assert error() < 5e-5
    monkeypatch.setitem(cpu_flash._SPAN, torch.float32, 1e9)
    assert error() > 1e-4


def test_flush_denormal_is_put_back() -> None:
    q, k, v = qkv(4, 4)
    tiny = torch.tensor(1e-30)
    for setting in (False, True):
        torch.set_flush_denormal(setting)
        try:
            biased_attention(q, k, v, KeyBias(STEEP), 1.0)
            assert bool(tiny * 1e-10 == 0) is setting
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize("defect", ["absent", "bias ignored", "gradient ignored"])
def test_the_probe_notices_a_changed_operator(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    flash, backward = cpu_flash._flash, cpu_flash._flash_backward

    def without_bias(*args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        if defect == "absent":
            raise AttributeError("no such operator")
        return flash(*args, **{**settings, "attn_mask": None})

    def no_gradient(*args: Any, **settings: Any) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x) for x in backward(*args, **settings))

    if defect == "gradient ignored":
        monkeypatch.setattr(cpu_flash, "_flash_backward", no_gradient)
    else:
        monkeypatch.setattr(cpu_flash, "_flash", without_bias)
    cpu_flash.usable.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="biased attention is correct"):
            assert not cpu_flash.usable()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not cpu_flash.usable()
    finally:
        cpu_flash.usable.cache_clear()


def test_the_probe_passes_here() -> None:
    assert cpu_flash.usable()


def test_the_probe_is_not_misled_by_inference_mode() -> None:
    cpu_flash.usable.cache_clear()
    with torch.inference_mode():
        assert cpu_flash.usable()


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_a_compiled_model_gives_the_same_logits() -> None:
    model = build("llama")
    longctx.extend(model, "alibi")
    ids = tokens(100)
    with torch.no_grad():
        wanted = model(ids).logits
        found = torch.compile(model, backend="eager")(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
