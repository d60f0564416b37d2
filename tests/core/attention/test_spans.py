"""Splitting a batch into spans: padding, packed documents, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longctx.attention.regions import Plan, up_to
from longctx.attention.remapped import Planner, RegionRule
from longctx.attention.spans import Span, spans_of
from longctx.errors import ModelError


def padding(*rows: str) -> Tensor:
    """Bool [B, 1, 1, N] from rows such as "..xx": a point is padding."""
    return torch.tensor([[mark == "x" for mark in row] for row in rows])[:, None, None]


def positions_of(mask: Tensor) -> Tensor:
    """As transformers counts them: real tokens before, 0 in padding on the left."""
    return (mask[:, 0, 0].long().cumsum(1) - 1).clamp(min=0)


def test_no_mask_is_one_span() -> None:
    where = torch.arange(5, 8)[None]
    assert spans_of(None, where, 2, 3, 8) == [Span((0, 1), slice(0, 3), slice(0, 8), 5, 5)]


def test_rows_that_begin_elsewhere_are_apart() -> None:
    where = torch.tensor([[0, 1, 2], [7, 8, 9], [0, 1, 2]])
    assert spans_of(None, where, 3, 3, 3) == [
        Span((0, 2), slice(0, 3), slice(0, 3), 0, 0),
        Span((1,), slice(0, 3), slice(0, 3), 7, 0),
    ]


def test_left_padding() -> None:
    mask = padding("..xxx", "xxxxx", "..xxx")
    assert spans_of(mask, positions_of(mask), 3, 5, 5) == [
        Span((0, 2), slice(2, 5), slice(2, 5), 0, 0),
        Span((1,), slice(0, 5), slice(0, 5), 0, 0),
    ]


def test_right_padding() -> None:
    mask = padding("xxx..", "xxxxx")
    where = torch.arange(5)[None]
    assert spans_of(mask, where, 2, 5, 5) == [
        Span((0,), slice(0, 3), slice(0, 3), 0, 0),
        Span((1,), slice(0, 5), slice(0, 5), 0, 0),
    ]


def test_cached_keys_of_padded_rows() -> None:
    mask = padding("...xxxxx", "xxxxxxxx", "......xx")
    where = positions_of(mask)[:, -3:]
    assert spans_of(mask, where, 3, 3, 8) == [
        Span((0,), slice(0, 3), slice(3, 8), 2, 2),
        Span((1,), slice(0, 3), slice(0, 8), 5, 5),
        Span((2,), slice(1, 3), slice(6, 8), 0, 0),
    ]


def test_a_row_whose_text_is_all_in_the_cache_has_no_span() -> None:
    mask = padding("xxx...", "xxxxxx")
    found = spans_of(mask, torch.tensor([[0, 0], [4, 5]]), 2, 2, 6)
    assert found == [Span((1,), slice(0, 2), slice(0, 6), 4, 4)]


def test_a_row_of_nothing_but_padding_has_no_span() -> None:
    mask = padding("....", "xxxx")
    found = spans_of(mask, positions_of(mask), 2, 4, 4)
    assert found == [Span((1,), slice(0, 4), slice(0, 4), 0, 0)]


def test_packed_documents() -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 2, 2]])[:, None, None]
    where = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]])
    assert spans_of(mask, where, 2, 5, 5) == [
        Span((0,), slice(0, 3), slice(0, 3), 0, 0),
        Span((0, 1), slice(3, 5), slice(3, 5), 0, 0),
        Span((1,), slice(0, 2), slice(0, 2), 0, 0),
        Span((1,), slice(2, 3), slice(2, 3), 0, 0),
    ]


def test_padding_inside_a_text_is_refused() -> None:
    mask = padding("xx.xx")
    with pytest.raises(ModelError, match="padding inside its text"):
        spans_of(mask, torch.arange(5)[None], 1, 5, 5)


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 1, 4, 4, dtype=torch.bool), torch.zeros(1, 1, 1, 4)]
)
def test_other_masks_are_refused(mask: Tensor) -> None:
    with pytest.raises(ModelError, match=r"Pass attention_mask as \[batch, tokens\]"):
        spans_of(mask, torch.arange(4)[None], 1, 4, 4)


@pytest.mark.parametrize("where", [[0, 1, 9, 10], [0, 1, 0, 1], [3, 2, 1, 0]])
def test_positions_that_skip_are_refused(where: list[int]) -> None:
    with pytest.raises(ModelError, match="skip or go backwards"):
        spans_of(None, torch.tensor([where]), 1, 4, 4)


class Everything(Planner):
    """Plain causal attention."""

    def plan(self, first: int, queries: int, keys: int) -> Plan:
        return Plan((*up_to(slice(0, queries), keys - queries),))


@pytest.mark.parametrize("queries", [6, 2])
@pytest.mark.parametrize("rows", [("......", "xxxxxx"), ("..xxxx", "xxxxxx"), ("xxxx..", "..xxxx")])
def test_a_rule_gives_each_row_what_it_gets_alone(rows: tuple[str, ...], queries: int) -> None:
    mask = padding(*rows)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 8, generator=g, requires_grad=True)
    k, v = (torch.randn(2, 2, 6, 8, generator=g) for _ in range(2))
    where = positions_of(mask)
    rule = RegionRule(Everything())
    out = rule(q, k, v, mask=mask, positions=where[:, -queries:], scaling=0.3)
    seen = torch.ones(queries, 6, dtype=torch.bool).tril(6 - queries) & mask
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = (0.3 * q @ keys.mT).masked_fill(~seen, -torch.inf)
    real = mask[:, :, 0, -queries:, None]
    wanted = logits.softmax(-1).nan_to_num(0.0) @ values * real
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert ((q.grad == 0) | real).all()


def test_a_rule_needs_positions() -> None:
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ModelError, match="no position_ids: there is nothing to count by"):
        RegionRule(Everything())(x, x, x, mask=None, positions=None, scaling=1.0)


def test_rows_are_counted_from_their_first_token_whatever_its_position() -> None:
    mask = padding("..xxx", "xxxxx")
    where = torch.arange(40, 45)[None]
    assert spans_of(mask, where, 2, 5, 5) == [
        Span((0,), slice(2, 5), slice(2, 5), 0, 0),
        Span((1,), slice(0, 5), slice(0, 5), 0, 0),
    ]
