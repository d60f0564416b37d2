"""Regions: no pair of query and key twice, none missing, and the distances of the papers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longctx.attention.regions import Plan, Region, band, distances, lengths, up_to
from longctx.attention.remapped import Planner
from longctx.patches.block_sparse import BandedPlanner, BlocksPlanner, StridedPlanner
from longctx.patches.dual_chunk import DualChunkPlanner
from longctx.patches.rerope import ReRopePlanner
from longctx.patches.self_extend import SelfExtendPlanner
from longctx.patches.sink_window import SinkWindowPlanner
from longctx.patches.string import StringPlanner

NAN = float("nan")
SHAPES = ((48, 48), (5, 48), (1, 48), (1, 1), (7, 7), (9, 11))


def seen_by(regions: list[Region], queries: int, keys: int) -> Tensor:
    """How many regions each pair is in, [S, N]."""
    count = torch.zeros(queries, keys, dtype=torch.int)
    for region in regions:
        rows, columns = (
            torch.cat([torch.arange(size)[part] for part in parts])
            for size, parts in ((queries, region.rows), (keys, region.keys))
        )
        count[rows[:, None], columns] += region.visible()
    return count


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_up_to_holds_each_pair_once(data: st.DataObject) -> None:
    queries, keys = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 40))
    start = data.draw(st.integers(0, queries))
    rows = slice(start, data.draw(st.integers(start, queries)))
    last = data.draw(st.integers(-35, keys - queries)) if keys >= queries else keys - queries
    first_key = data.draw(st.integers(0, keys))
    made = list(up_to(rows, last, first_key=first_key, query_turn=2, key_turn=1))
    query, key = torch.arange(queries)[:, None], torch.arange(keys)
    wanted = (
        (query >= rows.start) & (query < rows.stop) & (key >= first_key) & (key <= query + last)
    )
    assert torch.equal(seen_by(made, queries, keys), wanted.int())
    assert all((region.query_turn, region.key_turn) == (2, 1) for region in made)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_a_band_holds_each_pair_once(data: st.DataObject) -> None:
    queries, keys = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 40))
    start = data.draw(st.integers(0, queries))
    rows = slice(start, data.draw(st.integers(start, queries)))
    last = data.draw(st.integers(-35, keys - queries)) if keys >= queries else keys - queries
    window = data.draw(st.integers(1, 45))
    made = list(band(rows, last, window))
    query, key = torch.arange(queries)[:, None], torch.arange(keys)
    own = query + last
    wanted = (query >= rows.start) & (query < rows.stop) & (key <= own) & (key > own - window)
    assert torch.equal(seen_by(made, queries, keys), wanted.int())


@pytest.mark.parametrize("seen", ["all", "causal", "band"])
def test_a_region_says_what_its_rows_see(seen: str) -> None:
    keys = {"all": 5, "causal": 3, "band": 4}[seen]
    region = Region((slice(0, 3),), (slice(0, keys),), seen=seen, window=2)  # pyright: ignore
    wanted = {
        "all": [[1, 1, 1, 1, 1]] * 3,
        "causal": [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        "band": [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]],
    }[seen]
    assert region.visible().int().tolist() == wanted


def test_lengths_count_steps() -> None:
    assert lengths((slice(0, 3), slice(2, 9, 3), slice(4, 4))) == [3, 3, 0]


def test_a_pair_in_two_regions_is_refused() -> None:
    twice = Region((slice(0, 2),), (slice(0, 2),))
    with pytest.raises(ValueError, match="another region holds too"):
        distances(Plan((twice, twice)), torch.arange(2).double(), torch.arange(2).double())


def test_distances_follow_turns_of_both_sides() -> None:
    region = Region((slice(0, 2, 1),), (slice(0, 1), slice(2, 3)), query_turn=1, key_turn=1)
    plan = Plan((region,), (None, torch.tensor([10.0, 20.0])), (None, torch.tensor([1.0, 2, 3])))
    found = distances(plan, torch.zeros(2).double(), torch.zeros(3).double())
    torch.testing.assert_close(
        found, torch.tensor([[9, NAN, 7], [19, NAN, 17]]).double(), equal_nan=True
    )


Formula = Callable[[int, int], float]
"""From the positions of a query and of a key it may see to their distance, NaN if it does not."""


def self_extend(window: int, group: int) -> Formula:
    def far(m: int, n: int) -> float:
        return m // group + window - window // group - n // group

    return lambda m, n: m - n if m - n < window else far(m, n)


def rerope(window: int, leak: float | None) -> Formula:
    slope = 0.0 if leak is None else 1 / leak
    return lambda m, n: m - n if m - n < window else window + slope * (m - n - window)


def dual_chunk(stride: int, cap: int) -> Formula:
    def distance(m: int, n: int) -> float:
        chunks, place, key = m // stride - n // stride, m % stride, n % stride
        return (place, min(place + stride, cap), cap)[min(chunks, 2)] - key

    return distance


def string(shift: int, window: int) -> Formula:
    return lambda m, n: m - n if m - n < shift else m - n - shift + window


def sinks(count: int, window: int, limit: int | None) -> Formula:
    def distance(m: int, n: int) -> float:
        if m - n < window:
            return m - n
        if n >= count:
            return NAN
        return min(m, count + window - 1) - n if limit is None else limit

    return distance


def blocks(size: int, local: int, first: int, stride: int) -> Formula:
    def distance(m: int, n: int) -> float:
        back = m // size - n // size
        strided = stride > 0 and back % stride == 0
        return m - n if back < local or n // size < first or strided else NAN

    return distance


CASES: dict[str, tuple[Planner, Formula]] = {
    "self_extend": (SelfExtendPlanner(8, 3), self_extend(8, 3)),
    "rerope": (ReRopePlanner(8, None), rerope(8, None)),
    "leaky": (ReRopePlanner(8, 4.0), rerope(8, 4.0)),
    "dual_chunk": (DualChunkPlanner(10, 12), dual_chunk(10, 12)),
    "dual_chunk, paper": (DualChunkPlanner(10, 11), dual_chunk(10, 11)),
    "string": (StringPlanner(8, 3), string(8, 3)),
    "sinks": (SinkWindowPlanner(3, 9, None), sinks(3, 9, None)),
    "sinks at a limit": (SinkWindowPlanner(3, 9, 9), sinks(3, 9, 9)),
    "no sinks": (SinkWindowPlanner(0, 9, None), sinks(0, 9, None)),
    "banded": (BandedPlanner(8), lambda m, n: m - n if m - n < 8 else NAN),
    "strided": (StridedPlanner(4), lambda m, n: m - n if m - n < 4 or (m - n) % 4 == 0 else NAN),
    "blocks": (BlocksPlanner(4, 2, 1, 3), blocks(4, 2, 1, 3)),
    "blocks, every one": (BlocksPlanner(4, 1, 0, 1), blocks(4, 1, 0, 1)),
    "blocks, none far": (BlocksPlanner(5, 3, 0, 0), blocks(5, 3, 0, 0)),
}


def assert_formula(name: str, queries: int, keys: int) -> None:
    planner, formula = CASES[name]
    first = keys - queries
    positions = torch.arange(keys, dtype=torch.float64)
    plan = planner.plan(first, queries, keys)
    found = distances(plan, planner.frame(positions[first:]), planner.frame(positions))
    wanted = [[formula(m, n) if n <= m else NAN for n in range(keys)] for m in range(first, keys)]
    exact = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_planners_follow_their_papers(name: str, queries: int, keys: int) -> None:
    assert_formula(name, queries, keys)


@given(st.sampled_from(sorted(CASES)), st.integers(1, 70), st.integers(1, 70))
@settings(deadline=None, max_examples=150)
def test_planners_follow_their_papers_at_any_length(name: str, queries: int, before: int) -> None:
    assert_formula(name, queries, queries + before - 1)


@pytest.mark.parametrize("name", [name for name in CASES if "sinks" not in name])
def test_the_first_key_need_not_be_at_position_0(name: str) -> None:
    planner, formula = CASES[name]
    first, queries, keys = 37, 6, 20
    places = torch.arange(first + queries - keys, first + queries, dtype=torch.float64)
    plan = planner.plan(first, queries, keys)
    found = distances(plan, planner.frame(places[-queries:]), planner.frame(places))
    wanted = [
        [formula(int(m), int(n)) if n <= m else NAN for n in places] for m in places[-queries:]
    ]
    exact = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9, equal_nan=True)
