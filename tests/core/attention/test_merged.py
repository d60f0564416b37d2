"""Attention over regions: kernels, their merge and its backward pass, against float64."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.attention import cpu_flash, merged
from longctx.attention.merged import Turned, merged_attention
from longctx.attention.reference import attention_at_distances
from longctx.attention.regions import Plan, Region, band, distances, up_to
from longctx.attention.remapped import Planner
from longctx.patches.block_sparse import BlocksPlanner, StridedPlanner
from longctx.patches.dual_chunk import DualChunkPlanner
from longctx.patches.rerope import ReRopePlanner
from longctx.patches.sink_window import SinkWindowPlanner

DIM = 16
INV_FREQ = 100.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
PLANNERS: dict[str, Planner] = {
    "two regions, both turned": ReRopePlanner(8, 4.0),
    "chunks": DualChunkPlanner(10, 12),
    "sinks": SinkWindowPlanner(3, 9, 9),
    "strided": StridedPlanner(4),
    "gathered": BlocksPlanner(4, 2, 1, 3),
}
SHAPES = ((70, 70), (5, 48), (1, 48), (2, 2), (1, 1))
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""Largest root-mean-square error over the size of what is compared."""


@pytest.fixture(params=["operator", "written out"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways there are on the CPU, with blocks and strips that small inputs fill."""
    if request.param == "written out":
        monkeypatch.setattr(cpu_flash, "usable", lambda: False)
    monkeypatch.setattr(merged, "_BLOCK", (3, 7))
    monkeypatch.setattr(merged, "_FOLDED", 2)
    monkeypatch.setattr(merged, "_ROWS", 11)
    return request.param


def qkv(
    queries: int, keys: int, heads: int = 4, kv_heads: int = 2, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64, laid out as transformers does, [B, S, H, D] seen as [B, H, S, D]."""
    g = torch.Generator().manual_seed(queries + keys)

    def draw(length: int, heads: int) -> Tensor:
        x = torch.randn(batch, length, heads, DIM, generator=g, dtype=torch.float64)
        return x.transpose(1, 2)

    return draw(queries, heads), draw(keys, kv_heads), draw(keys, kv_heads)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """In float64, half-split."""
    phase = positions[:, None] * INV_FREQ
    one, other = x.chunk(2, -1)
    cos, sin = phase.cos(), phase.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def sides(planner: Planner, plan: Plan, q: Tensor, k: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys turned every way the plan has, in their frames."""
    positions = torch.arange(k.shape[2], dtype=torch.float64)
    own = positions[k.shape[2] - q.shape[2] :]
    made: list[list[Tensor]] = []
    for x, where, turns in ((q, own, plan.query_turns), (k, positions, plan.key_turns)):
        frame = planner.frame(where)
        made.append([turned(x, frame if turn is None else frame + turn) for turn in turns])
    return made[0], made[1]


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    error = (found.double() - wanted).norm() / wanted.norm().clamp(min=1e-6)
    assert error <= RELATIVE[dtype]


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("name", PLANNERS)
def test_output_is_that_of_the_distances(name: str, queries: int, keys: int) -> None:
    planner = PLANNERS[name]
    plan = planner.plan(keys - queries, queries, keys)
    positions = torch.arange(keys, dtype=torch.float64)
    frame = planner.frame(positions)
    seen_at = distances(plan, frame[keys - queries :], frame)
    q, k, v = qkv(queries, keys)
    wanted = attention_at_distances(q, k, v, seen_at, INV_FREQ, scaling=0.3)
    for dtype in RELATIVE:
        on_q, on_k = ([Turned(x.to(dtype)) for x in side] for side in sides(planner, plan, q, k))
        out = merged_attention(on_q, on_k, v.to(dtype), plan.regions, 0.3, queries)
        assert out.shape == q.shape
        assert_close(out, wanted, dtype)


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("name", PLANNERS)
def test_gradients_are_those_of_written_logits(name: str, queries: int, keys: int) -> None:
    planner = PLANNERS[name]
    plan = planner.plan(keys - queries, queries, keys)
    q, k, v = qkv(queries, keys)
    on_q, on_k = sides(planner, plan, q, k)
    leaves = [x.detach().requires_grad_() for x in (*on_q, *on_k, v)]
    wanted_out = written(leaves, len(on_q), plan.regions, 0.3, queries)
    upstream = torch.linspace(-1, 1, q.numel(), dtype=torch.float64).reshape(q.shape)
    wanted: Any = torch.autograd.grad(wanted_out, leaves, upstream, allow_unused=True)
    for dtype in RELATIVE:
        mine = [x.detach().to(dtype).requires_grad_() for x in leaves]
        parts = [Turned(x) for x in mine[:-1]]
        out = merged_attention(
            parts[: len(on_q)], parts[len(on_q) :], mine[-1], plan.regions, 0.3, queries
        )
        assert_close(out, wanted_out.detach(), dtype)
        found: Any = torch.autograd.grad(out, mine, upstream.to(dtype), allow_unused=True)
        for one, exact in zip(found, wanted, strict=True):
            nothing = torch.zeros(()) if one is None else one
            if exact is None or not exact.any():
                # A query that sees its own key alone has no gradient but rounding.
                assert nothing.abs().max() <= 10 * RELATIVE[dtype]
            else:
                assert one is not None
                assert_close(one, exact, dtype)


def written(
    leaves: Sequence[Tensor], first_key: int, regions: Sequence[Region], scaling: float, rows: int
) -> Tensor:
    """One matrix of logits from the regions, softmax over it: nothing is merged."""
    *_, v = leaves
    keys, groups = v.shape[2], leaves[0].shape[1] // v.shape[1]
    logits = torch.full((*leaves[0].shape[:2], rows, keys), -torch.inf, dtype=torch.float64)
    for region in regions:
        row, column = (
            torch.cat([torch.arange(size)[part] for part in parts])
            for size, parts in ((rows, region.rows), (keys, region.keys))
        )
        q, k = leaves[region.query_turn], leaves[first_key + region.key_turn]
        part = scaling * q[:, :, row] @ k.repeat_interleave(groups, 1)[:, :, column].mT
        place = torch.zeros(rows, keys, dtype=torch.bool)
        place[row[:, None], column] = region.visible()
        spread = torch.zeros(logits.shape, dtype=torch.float64)
        spread[:, :, row[:, None], column] = part
        logits = torch.where(place, spread, logits)
    return logits.softmax(-1) @ v.repeat_interleave(groups, 1)


def test_gradcheck() -> None:
    regions = (*band(slice(0, 7), 2, 4), *up_to(slice(0, 7), -2, query_turn=1, key_turn=1))
    q, k, v = (x[:1, :, :, :4] for x in qkv(7, 9, heads=2, kv_heads=1))
    inputs = [x.detach().requires_grad_() for x in (q, q.flip(2), k, k.flip(2), v)]

    def run(q: Tensor, q_far: Tensor, k: Tensor, k_far: Tensor, v: Tensor) -> Tensor:
        queries, keys = [Turned(q), Turned(q_far)], [Turned(k), Turned(k_far)]
        return merged_attention(queries, keys, v, regions, 0.4, 7)

    assert torch.autograd.gradcheck(run, inputs)


def test_tokens_that_no_region_uses_need_not_be_there() -> None:
    regions = (Region((slice(3, 6),), (slice(4, 8),)), Region((slice(0, 3),), (slice(0, 2),)))
    q, k, v = qkv(6, 8)
    whole = merged_attention([Turned(q)], [Turned(k)], v, regions[:1], 0.3, 6)
    cut = merged_attention(
        [Turned(q[:, :, 3:], 3)], [Turned(k[:, :, 4:], 4)], v, regions[:1], 0.3, 6
    )
    assert torch.equal(whole, cut)
    assert (whole[:, :, :3] == 0).all()
    assert (merged_attention([Turned(q)], [Turned(k)], v, regions, 0.3, 6)[:, :, :3] != 0).all()


@pytest.mark.parametrize("queries", [1, 4])
def test_a_query_in_no_region_is_zero(queries: int) -> None:
    q, k, v = qkv(queries, 8)
    assert (merged_attention([Turned(q)], [Turned(k)], v, (), 0.3, queries) == 0).all()


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_heads_of_one_query(monkeypatch: pytest.MonkeyPatch, threads: int, kv_heads: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v = qkv(1, 20, heads=6, kv_heads=kv_heads)
    regions = (Region((slice(0, 1),), (slice(0, 7),)), Region((slice(0, 1),), (slice(9, 20),)))
    out = merged_attention([Turned(q)], [Turned(k)], v, regions, 0.3, 1)
    wanted = written([q, k, v], 1, regions, 0.3, 1)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


def test_inputs_of_any_layout() -> None:
    q, k, v = qkv(9, 9)
    regions = tuple(up_to(slice(0, 9), 0))
    wanted = merged_attention([Turned(q)], [Turned(k)], v, regions, 0.3, 9)
    q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    assert q.stride(-1) != 1
    torch.testing.assert_close(
        merged_attention([Turned(q)], [Turned(k)], v, regions, 0.3, 9), wanted, rtol=0, atol=1e-14
    )
