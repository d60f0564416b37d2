"""The CUDA ways, whose mathematics is tested on the CPU; on a GPU itself under the marker `gpu`."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from longctx.attention import cpu_flash, cuda, merged
from longctx.attention.cpu_flash import KeyBias
from longctx.attention.dispatch import attend
from longctx.attention.merged import Turned, merged_attention
from longctx.attention.reference import attention_with_linear_bias
from longctx.attention.regions import Region
from longctx.attention.remapped import Planner
from longctx.patches.alibi import slopes
from longctx.patches.block_sparse import BlocksPlanner
from longctx.patches.rerope import ReRopePlanner

from .test_dispatch import HALF_DTYPES, qkv


def test_8k_tokens_by_extra_dimensions() -> None:
    q, k, v = qkv(2, 2, 8192, dim=8)
    rows, slope = torch.arange(0, 8192, 127), (0.85, 0.004)
    wanted = attention_with_linear_bias(q, k, v, slope, rows=rows)
    out = cuda.extended_attention(q, k, v, KeyBias(slope), 8**-0.5)[:, :, rows]
    assert (out - wanted).abs().max() < 5e-5


def test_bfloat16_dimensions_hold_far_positions() -> None:
    q, k, v = qkv(2, 2, 300, dim=8, dtype=torch.bfloat16)
    positions = (torch.arange(300) + 300_001 * (torch.arange(300) >= 200))[None]
    bias = KeyBias((0.5, 0.25), positions)
    out = cuda._chunk(q, k, v, bias, 0.3)
    wanted = attention_with_linear_bias(q, k, v, bias.slopes, scaling=0.3, positions=positions)
    assert (out - wanted).abs().max() < 2e-2  # float32 logits of 75,000 are 2⁻⁸ off


def test_bfloat16_dimensions_hold_the_slope() -> None:
    """The mean distance under the bias alone, which a slope rounded to bf16 moves by 0.2 tokens."""
    slope, keys = 0.010_04, 1024
    distance = torch.arange(keys).flip(0)[None, None, :, None].expand(1, 1, -1, 8)
    k, v = torch.zeros(1, 1, keys, 8).bfloat16(), (distance - 99).bfloat16()
    out = cuda.extended_attention(k[:, :, -1:], k, v, KeyBias((slope,)), 0.3)
    wanted = attention_with_linear_bias(k[:, :, -1:], k, v, (slope,), scaling=0.3)
    assert (out - wanted).abs().max() < 0.02


def test_flash_attn_is_given_what_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with flash_attn_func's documented layout and its lower-right causality."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, alibi_slopes: Tensor
    ) -> Tensor:
        assert causal
        assert alibi_slopes.dtype == torch.float32
        s, n = q.shape[1], k.shape[1]
        i, j = torch.arange(s)[:, None], torch.arange(n)
        added = -alibi_slopes[:, None, None] * (i + n - s - j).abs()
        key, value = (x.float().repeat_interleave(3, 2) for x in (k, v))
        logits = torch.einsum("bshd,bnhd->bhsn", q.float(), key) * softmax_scale + added
        logits = logits.masked_fill(j > i + n - s, -torch.inf)
        return torch.einsum("bhsn,bnhd->bshd", logits.softmax(-1), value).to(q.dtype)

    package = SimpleNamespace(flash_attn_func=flash_attn_func)
    q, k, v = qkv(6, 2, 40, 90, dim=8, dtype=torch.bfloat16)
    bias = KeyBias(slopes(6), mask=torch.ones(1, 90, dtype=torch.bool))
    monkeypatch.setattr(cuda, "_package", lambda: None)
    assert not cuda.flash_applies(q, bias)
    monkeypatch.setattr(cuda, "_package", lambda: package)
    assert cuda.flash_applies(q, bias)
    assert not cuda.flash_applies(q.float(), bias)
    assert not cuda.flash_applies(q, KeyBias(slopes(6), torch.arange(90)[None]))
    assert not cuda.flash_applies(q, KeyBias(slopes(6), mask=torch.arange(90)[None] > 5))
    out = cuda.flash_attention(q, k, v, bias, 0.3)
    wanted = attention_with_linear_bias(q, k, v, slopes(6), scaling=0.3)
    assert (out - wanted).abs().max() < 1e-2


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_blocks_are_those_of_the_whole_mask(data: st.DataObject) -> None:
    keys = data.draw(st.integers(1, 700))
    queries = data.draw(st.integers(1, keys))
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[0, : data.draw(st.integers(0, keys))] = False
    cuts = torch.zeros(2, keys, dtype=torch.int)
    for row in cuts:
        row[data.draw(st.lists(st.integers(0, keys - 1), max_size=5))] = 1
    masked, packed = data.draw(st.booleans()), data.draw(st.booleans())
    documents = cuts.cumsum(1) if packed else None
    window = data.draw(st.none() | st.integers(1, keys))
    made = cuda.block_mask(
        queries, keys, torch.device("cpu"), mask if masked else None, documents, window
    )
    own = torch.arange(keys - queries, keys)
    seen = (torch.arange(keys) <= own[:, None]).expand(2, -1, -1)
    if window is not None:
        seen = seen & (torch.arange(keys) > own[:, None] - window)
    if masked:
        seen = seen & mask[:, None]
    if documents is not None:
        seen = seen & (documents[:, own, None] == documents[:, None])
    padding = (0, -keys % 128, 0, -queries % 128)
    some, whole = (
        functional.pad(seen, padding, value=filled).unfold(1, 128, 128).unfold(2, 128, 128)
        for filled in (False, True)
    )
    rows, columns = some.shape[1:3]
    wanted = some.flatten(-2).any(-1)
    for b in range(2):
        for row in range(rows):
            partial = _blocks(made.kv_num_blocks, made.kv_indices, b, row)
            full = _blocks(made.full_kv_num_blocks, made.full_kv_indices, b, row)
            assert not set(partial) & set(full)
            # A block may be looked at and found empty by its mask; none may be missed.
            assert {c for c in range(columns) if wanted[b, row, c]} <= {*partial, *full}
            assert all(bool(whole[b, row, c].all()) for c in full)
            if not (masked or packed):
                assert {*partial, *full} == {c for c in range(columns) if wanted[b, row, c]}


def _blocks(count: Tensor | None, indices: Tensor | None, b: int, row: int) -> list[int]:
    assert count is not None
    assert indices is not None
    b = min(b, len(count) - 1)
    return indices[b, 0, row, : int(count[b, 0, row])].tolist()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("kind", "queries"), [("padded", 150), pytest.param("packed", 200, marks=pytest.mark.slow)]
)
def test_flex_attention_uncompiled(kind: str, queries: int) -> None:
    q, k, v = qkv(6, 2, queries, 200, batch=2, dim=16)
    slope, documents, mask = slopes(6), None, None
    if kind == "packed":
        documents = (torch.arange(200) >= torch.tensor([[70], [130]])).int()
        positions = torch.arange(200) * 2 + 5
        visible = (documents[:, None] == documents[..., None])[:, None]
        bias = KeyBias(slope, positions[None])
    else:
        mask = torch.arange(200) >= torch.tensor([[0], [180]])
        positions, visible = None, mask[:, None, None]
        bias = KeyBias(slope, mask=mask)
    out = cuda.flex_attention(q, k, v, bias, 0.3, documents)
    wanted = attention_with_linear_bias(
        *(q, k, v, slope),
        scaling=0.3,
        visible=visible,
        positions=None if positions is None else positions[None],
    )
    assert (out - wanted).abs().max() < 2e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize(("queries", "keys"), [(2048, 2048), (500, 2048), (1, 2048)])
def test_on_cuda(queries: int, keys: int, dtype: torch.dtype, padded: bool) -> None:
    q, k, v = (x.cuda().requires_grad_() for x in qkv(9, 3, queries, keys, batch=2, dtype=dtype))
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool, device="cuda")
    mask[1, ..., :700] = False
    visible = mask if padded else None
    out = attend(q, k, v, slopes=slopes(9), mask=visible)
    wanted = attention_with_linear_bias(q, k, v, slopes(9), visible=visible)
    tolerance = 2e-4 if dtype == torch.float32 else 2e-2
    assert (out - wanted).abs().max() <= tolerance
    gradients = torch.autograd.grad(out.float().sin().sum(), (q, k, v))
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("queries", [1, 5, 12])
def test_without_a_bias_the_last_query_stands_on_the_last_key(queries: int) -> None:
    q, k, v = (torch.randn(2, heads, n, 8) for heads, n in ((4, queries), (2, 12), (2, 12)))
    visible = torch.ones(queries, 12, dtype=torch.bool).tril(12 - queries)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = (0.3 * q @ keys.mT).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(cuda.unbiased_attention(q, k, v, 0.3), logits.softmax(-1) @ values)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("seen", ["all", "causal", "band"])
def test_a_region_by_flex_attention_uncompiled(seen: str) -> None:
    keys = {"all": 90, "causal": 150, "band": 189}[seen]
    q, k, v = qkv(6, 2, 150, keys, batch=2, dim=16)
    region = Region((slice(0, 150),), (slice(0, keys),), seen=seen, window=40)  # pyright: ignore
    out, lse = cuda.region_attention(q, k, v, seen, 40, 0.3)
    exact_q, exact_k, exact_v = (x.double() for x in (q, k, v))
    wanted, wanted_lse = merged._region_rows(exact_q, exact_k, exact_v, region, 0, 0.3)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("planner", [ReRopePlanner(40, None), BlocksPlanner(32, 2, 0, 3)])
def test_regions_by_flex_attention_uncompiled(
    monkeypatch: pytest.MonkeyPatch, planner: Planner
) -> None:
    q, k, v = qkv(6, 2, 200, batch=2, dim=16)
    regions = planner.plan(0, 200, 200).regions
    on_q, on_k = ([Turned(x), Turned(x.flip(2))] for x in (q, k))
    wanted = merged_attention(on_q, on_k, v, regions, 0.3, 200)
    monkeypatch.setattr(cpu_flash, "usable", lambda: False)
    monkeypatch.setattr(cuda, "flex_applies", lambda q: True)
    monkeypatch.setattr(cuda, "FEW_QUERIES", 64)
    with torch.no_grad():
        found = merged_attention(on_q, on_k, v, regions, 0.3, 200)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("planner", [ReRopePlanner(300, None), BlocksPlanner(128, 2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regions_on_cuda(planner: Planner, dtype: torch.dtype) -> None:
    found: list[tuple[Tensor, ...]] = []
    regions = planner.plan(0, 1000, 1000).regions
    for device in ("cpu", "cuda"):
        exact = dtype if device == "cuda" else torch.float64
        leaves = [x.to(dtype).to(device, exact) for x in qkv(6, 2, 1000)]
        q, k, v = (x.requires_grad_() for x in leaves)
        on_q, on_k = ([Turned(x), Turned(x.flip(2))] for x in (q, k))
        out = merged_attention(on_q, on_k, v, regions, 0.125, 1000)
        gradients = torch.autograd.grad(out.double().sin().sum(), (q, k, v))
        found.append(tuple(x.detach().double().cpu() for x in (out, *gradients)))
    for mine, wanted in zip(found[1], found[0], strict=True):
        error = (mine - wanted).norm() / wanted.norm()
        assert error < (2e-5 if dtype == torch.float32 else 2e-2)
