"""The layer that keeps sinks and a window: which tokens it holds, row by row."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from longctx.attention.sink_cache import SinkCaching, SinkLayer
from longctx.attention.spans import spans_of
from longctx.errors import ModelError

from ...families import build, tokens


def numbered(first: int, count: int, batch: int) -> Tensor:
    """Keys [B, 1, S, 1] that hold their row's number and their token's: 1000 · row + token."""
    found = torch.arange(first, first + count) + 1000.0 * torch.arange(batch)[:, None]
    return found[:, None, :, None]


def add(layer: SinkLayer, count: int, starts: tuple[int, ...]) -> list[list[int]]:
    """Add so many tokens; return of each row the tokens that it may attend to, by number."""
    new, seen = numbered(layer.seen, count, len(starts)), layer.seen + count
    layer.begin(starts)
    keys, values = layer.update(new, -new)
    assert torch.equal(keys, -values)
    real = torch.arange(seen) >= torch.tensor(starts)[:, None]
    queries = torch.arange(seen - count, seen).expand(len(starts), -1)
    found: list[list[int]] = [[] for _ in starts]
    spans = spans_of(real[:, None, None], queries, len(starts), count, keys.shape[2])
    for span in spans:
        for row in span.rows:
            found[row] = (keys[row, 0, span.keys, 0] - 1000 * row).int().tolist()
    return found


@pytest.mark.parametrize("chunks", [[30, 1, 1, 1, 9, 40, 1, 2, 1], [1] * 40, [3, 3, 50, 4, 1]])
@pytest.mark.parametrize(("sinks", "window"), [(4, 8), (0, 5), (3, 1), (1, 20)])
def test_each_row_holds_its_first_tokens_and_its_last(
    sinks: int, window: int, chunks: list[int]
) -> None:
    layer, starts = SinkLayer(sinks, window), (0, 2, 11, 28)
    for count in chunks:
        before = layer.seen
        found = add(layer, count, tuple(min(start, before + count) for start in starts))
        for start, there in zip(starts, found, strict=True):
            seen = before + count
            assert there == sorted(set(there))
            assert set(there) <= set(range(start, seen))
            needed = {*range(start, start + sinks), *range(before - window + 1, seen)}
            assert {n for n in needed if start <= n < seen} <= set(there)
            assert there[:sinks] == [*range(start, seen)][:sinks]  # by index, too
        assert layer.keys is not None
        assert layer.keys.shape[2] <= sinks + window
        assert layer.get_seq_length() == before + count
        assert layer.get_mask_sizes(3) == (before + count + 3, 0)


def test_a_long_prompts_memory_is_let_go() -> None:
    layer = SinkLayer(4, 8)
    add(layer, 10_000, (0,))
    assert layer.keys is not None
    assert layer.keys.untyped_storage().nbytes() == 4 * (4 + 7)


def test_rows_are_picked_with_their_padding() -> None:
    layer = SinkLayer(2, 4)
    add(layer, 9, (0, 6))
    layer.batch_repeat_interleave(2)
    assert layer.starts == (0, 0, 6, 6)
    layer.batch_select_indices(torch.tensor([False, True, True, True]))
    assert layer.starts == (0, 6, 6)
    layer.reorder_cache(torch.tensor([1, 0, 2]))
    assert layer.starts == (6, 0, 6)
    assert layer.keys is not None
    assert (layer.keys[:, 0, -1, 0] // 1000).tolist() == [1, 0, 1]
    twin = copy.deepcopy(layer)
    assert add(layer, 1, (6, 0, 6)) == add(twin, 1, (6, 0, 6))


def test_reset_begins_anew() -> None:
    layer = SinkLayer(2, 4)
    layer.reset()
    add(layer, 30, (3,))
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.batch_repeat_interleave(2)  # nothing to repeat
    assert add(layer, 3, (0, 1)) == [[0, 1, 2], [1, 2]]


def test_tokens_cannot_be_taken_back() -> None:
    layer = SinkLayer(2, 4)
    add(layer, 9, (0,))
    for nothing in (0, 9, 12):  # a positive number is what is left, in older versions
        layer.crop(nothing)
    for some in (-2, 7):
        with pytest.raises(ModelError, match=r"cannot take 2 back.*evict=False"):
            layer.crop(some)
    assert not layer.is_croppable


def test_it_must_be_told_of_every_call() -> None:
    layer = SinkLayer(2, 4)
    add(layer, 9, (3, 0))
    with pytest.raises(ModelError, match="the model that it was given to sees all tokens"):
        layer.update(numbered(9, 1, 2), numbered(9, 1, 2))
    with pytest.raises(ModelError, match=r"begin at tokens \[0, 0\].*at \[3, 0\] in the cache"):
        layer.begin((0, 0))
    with pytest.raises(ModelError, match="the mask of all tokens seen"):
        layer.begin((3, 0, 0))


def test_only_empty_layers_of_a_plain_cache_are_exchanged() -> None:
    decoder = build("gemma3").get_decoder()
    caching = SinkCaching.of(decoder, [1], 2, 4)
    assert caching is not None

    class Kept(DynamicCache):
        pass

    for cache, kinds in (
        (DynamicCache(config=decoder.config), ["DynamicSlidingWindowLayer", "SinkLayer"]),
        (DynamicCache(), ["DynamicLayer", "SinkLayer"]),
        (Kept(), []),
    ):
        assert caching(decoder, (tokens(5),), {caching.name: cache}) is None
        assert [type(layer).__name__ for layer in cache.layers] == kinds
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), layer)
    caching(decoder, (), {"input_ids": tokens(5), caching.name: cache})
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * 2


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 5, 5), {"full_attention": None}])
def test_padding_is_read_from_a_mask_of_tokens(mask: object) -> None:
    decoder = build("llama").get_decoder()
    caching = SinkCaching.of(decoder, [0, 1], 2, 4)
    assert caching is not None
    given = {"input_ids": tokens(5), "attention_mask": mask, caching.name: DynamicCache()}
    with pytest.raises(ModelError, match=r"attention_mask .* pass it as \[batch, tokens\]"):
        caching(decoder, (), given)
