"""`attend` against the naive float64 form: lengths, masks, kernels, devices."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from longctx.attention import cpu_flash, cuda, dispatch
from longctx.attention.dispatch import LinearBias, attend
from longctx.attention.reference import attention_with_linear_bias
from longctx.errors import ModelError
from longctx.patches.alibi import slopes

HALF_DTYPES = (torch.bfloat16, torch.float16)


def qkv(
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int | None = None,
    *,
    batch: int = 1,
    dim: int = 64,
    size: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(heads * 1000 + queries)
    keys = queries if keys is None else keys

    def draw(heads: int, length: int, size: float) -> Tensor:
        x = torch.randn(batch, length, heads, dim, generator=g).transpose(1, 2)
        return (x * size).to(dtype)

    return draw(heads, queries, size), draw(kv_heads, keys, size), draw(kv_heads, keys, 1.0)


@pytest.fixture(params=["cpu operator", "plain", "extra dimensions", "few queries"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the ways to compute it, forced on the CPU."""
    if request.param != "cpu operator":
        monkeypatch.setattr(cpu_flash, "usable", lambda: False)
    cuda_ways = {
        "extra dimensions": cuda.extended_attention,
        "few queries": cuda.few_queries_attention,
    }
    if request.param in cuda_ways:
        monkeypatch.setattr(dispatch, "_plain", _refuse)
        monkeypatch.setattr(dispatch, "_causal", cuda_ways[request.param])
    return request.param


def _refuse(*_: Any) -> Tensor:
    raise AssertionError("another kernel was asked for")


@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(9, 3), (8, 8), pytest.param(32, 8, marks=pytest.mark.slow)]
)
def test_8k_tokens_in_float32(heads: int, kv_heads: int, size: float) -> None:
    q, k, v = qkv(heads, kv_heads, 8192, dim=16, size=size * 2**0.5)
    rows = torch.cat([torch.arange(0, 8192, 197), torch.tensor([1023, 1024, 1217, 1218, 8191])])
    wanted = attention_with_linear_bias(q, k, v, slopes(heads), rows=rows)
    out = attend(q, k, v, slopes=slopes(heads))[:, :, rows]
    assert (out - wanted).abs().max() <= 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 8), (32, 8)])
def test_8k_tokens_at_the_real_head_dim(heads: int, kv_heads: int, size: float) -> None:
    q, k, v = qkv(heads, kv_heads, 8192, size=size)
    rows = torch.arange(0, 8192, 17)
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 1e-2)):
        qd, kd, vd = (x.to(dtype) for x in (q, k, v))
        wanted = attention_with_linear_bias(qd, kd, vd, slopes(heads), rows=rows)
        out = attend(qd, kd, vd, slopes=slopes(heads))[:, :, rows]
        # A bf16 above 4 is up to 2⁻⁶ off before anything is computed: that much is allowed on top.
        rounding = (wanted - wanted.to(dtype).double()).abs().max().item()
        assert (out - wanted).abs().max() <= max(tolerance, 1.25 * rounding)


def test_8k_tokens_in_bfloat16() -> None:
    q, k, v = qkv(9, 3, 8192, dtype=torch.bfloat16)
    rows = torch.arange(0, 8192, 97)
    wanted = attention_with_linear_bias(q, k, v, slopes(9), rows=rows)
    assert (attend(q, k, v, slopes=slopes(9))[:, :, rows] - wanted).abs().max() <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (70, 300), (1, 300)])
def test_every_kernel(kernel: str, queries: int, keys: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(6, 2, queries, keys, batch=2, dim=12, dtype=dtype)
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., :270] = False
    tolerance = 5e-6 if dtype == torch.float32 else 1e-2
    for visible in (None, mask):
        out = attend(q, k, v, slopes=slopes(6), mask=visible, scaling=0.2)
        wanted = attention_with_linear_bias(q, k, v, slopes(6), scaling=0.2, visible=visible)
        assert out.dtype == dtype
        assert (out - wanted).abs().max() <= tolerance, kernel


def test_every_kernel_is_differentiable(kernel: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(4, 2, 520, batch=2, dim=8))
    exact_q, exact_k, exact_v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, slopes=slopes(4))
    wanted = attention_with_linear_bias(exact_q, exact_k, exact_v, slopes(4))
    found = torch.autograd.grad(out.sin().sum(), (q, k, v))
    exact = torch.autograd.grad(wanted.sin().sum(), (exact_q, exact_k, exact_v))
    for mine, theirs in zip(found, exact, strict=True):
        assert (mine - theirs).abs().max() < 2e-5, kernel


def test_packed_documents_do_not_see_each_other(kernel: str) -> None:
    q, k, v = qkv(4, 2, 100, batch=2, dim=8)
    numbers = torch.zeros(2, 1, 1, 100, dtype=torch.int32)
    numbers[0, ..., 30:] += 1
    numbers[0, ..., 31:] += 1
    numbers[1, ..., 64:] += 1
    same = numbers == numbers.transpose(-1, -2)
    wanted = attention_with_linear_bias(q, k, v, slopes(4), visible=same)
    out = attend(q, k, v, slopes=slopes(4), mask=numbers)
    assert (out - wanted).abs().max() < 5e-6
    jumped = torch.arange(100)[None] + 40 * (torch.arange(100)[None] > 50)
    wanted = attention_with_linear_bias(q, k, v, slopes(4), visible=same, positions=jumped)
    out = attend(q, k, v, slopes=slopes(4), mask=numbers, positions=jumped)
    assert (out - wanted).abs().max() < 5e-6


@pytest.mark.parametrize("kind", ["bool", "added", "per head", "integer"])
def test_a_full_mask_says_everything(kind: str) -> None:
    q, k, v = qkv(4, 2, 300, 400, batch=2, dim=8)
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 4 if kind == "per head" else 1, 300, 400, generator=g) < 0.7
    mask[0, :, 5] = False
    causal = torch.ones(300, 400, dtype=torch.bool).tril(100)
    wanted = attention_with_linear_bias(q, k, v, slopes(4), visible=mask)
    given_mask = mask & causal
    if kind == "added":
        given_mask = torch.zeros(given_mask.shape).masked_fill(~given_mask, -torch.inf)
    if kind == "integer":
        given_mask = given_mask.long()
    out = attend(q, k, v, slopes=slopes(4), mask=given_mask)
    assert (out - wanted).abs().max() < 5e-6


def test_a_mask_per_head_for_one_query() -> None:
    q, k, v = qkv(4, 2, 1, 50, dim=8)
    mask = torch.ones(1, 4, 1, 50, dtype=torch.bool)
    mask[0, 2, 0, 40:] = False
    out = attend(q, k, v, slopes=slopes(4), mask=mask)
    wanted = attention_with_linear_bias(q, k, v, slopes(4), visible=mask)
    assert (out - wanted).abs().max() < 5e-6


def test_the_mask_cuts_the_keys_of_a_static_cache(kernel: str) -> None:
    q, k, v = qkv(4, 2, 20, 64, dim=8)
    k[:, :, 45:] = torch.nan
    v[:, :, 45:] = torch.nan
    mask = torch.ones(1, 1, 1, 45, dtype=torch.bool)
    out = attend(q, k, v, slopes=slopes(4), mask=mask)
    wanted = attention_with_linear_bias(q, k[:, :, :45], v[:, :, :45], slopes(4))
    assert (out - wanted).abs().max() < 5e-6
    positions = (torch.arange(64) + 9000 * (torch.arange(64) >= 50))[None]
    out = attend(q, k, v, slopes=slopes(4), mask=mask, positions=positions)
    assert (out - wanted).abs().max() < 5e-6


def test_zero_slopes_are_plain_causal_attention(kernel: str) -> None:
    q, k, v = qkv(4, 4, 90, dim=8)
    wanted = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (attend(q, k, v, slopes=(0.0,) * 4) - wanted).abs().max() < 5e-6


def test_positions_shifted_alike_change_nothing(kernel: str) -> None:
    q, k, v = qkv(4, 2, 90, dim=8)
    positions = torch.arange(90)[None] * 3
    wanted = attention_with_linear_bias(q, k, v, slopes(4), positions=positions)
    for shift in (0, 60_000):
        out = attend(q, k, v, slopes=slopes(4), positions=positions + shift)
        assert (out - wanted).abs().max() < 5e-6


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    lengths=st.tuples(st.integers(1, 24), st.integers(0, 24)),
    dim=st.integers(1, 20),
    steepness=st.floats(0, 50),
    padding=st.integers(0, 40),
)
@example(heads=(1, 1), lengths=(1, 0), dim=1, steepness=5e-324, padding=0)
def test_any_shape(
    heads: tuple[int, int], lengths: tuple[int, int], dim: int, steepness: float, padding: int
) -> None:
    (groups, kv_heads), (queries, before) = heads, lengths
    q, k, v = qkv(groups * kv_heads, kv_heads, queries, queries + before, batch=2, dim=dim)
    mask = torch.ones(2, 1, 1, queries + before, dtype=torch.bool)
    mask[1, ..., :padding] = False
    slope = tuple(steepness / (h + 1) for h in range(groups * kv_heads))
    wanted = attention_with_linear_bias(q, k, v, slope, visible=mask)
    assert (attend(q, k, v, slopes=slope, mask=mask) - wanted).abs().max() < 1e-4


def test_the_rule_is_attend_with_its_slopes() -> None:
    q, k, v = qkv(4, 2, 30, dim=8)
    rule = LinearBias(slopes(4))
    assert hash(rule) == hash(LinearBias(slopes(4)))
    out = rule(q, k, v, mask=None, positions=None, scaling=0.5)
    assert torch.equal(out, attend(q, k, v, slopes=slopes(4), scaling=0.5))


def test_nothing_in_nothing_out() -> None:
    q, k, v = qkv(4, 2, 0, 5, dim=8)
    assert attend(q, k, v, slopes=slopes(4)).shape == (1, 4, 0, 8)


@pytest.mark.parametrize(
    ("shapes", "slope", "mask", "message"),
    [
        ((8, 2, 6, 5), 8, None, "more queries than keys"),
        ((8, 3, 5, 5), 8, None, "the kv heads divide"),
        ((8, 2, 5, 5), 4, None, "4 slopes"),
        ((8, 2, 5, 5), 8, torch.ones(1, 1, 5, 6, dtype=torch.bool), "last two sizes"),
        ((8, 2, 3, 5), 8, torch.zeros(1, 1, 1, 5, dtype=torch.int32), "documents"),
        ((8, 2, 5, 5), 8, torch.ones(1, 1, 1, 4, dtype=torch.bool), "more queries than keys"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: tuple[int, int, int, int], slope: int, mask: Tensor | None, message: str
) -> None:
    q, k, v = qkv(*shapes, dim=8)
    with pytest.raises(ModelError, match=message):
        attend(q, k, v, slopes=(0.1,) * slope, mask=mask)
