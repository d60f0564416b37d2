"""Sinks and a window with bounded caches: the same as with all keys, in a bounded memory."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import longctx
from longctx.attention.sink_cache import SinkLayer
from longctx.before_transformers_5_24 import cache_argument
from longctx.errors import ModelError
from longctx.eval import Passkey, Perplexity, sweep
from longctx.patches.sink_window import SinkWindow

from ..families import build, tokens

SINKS, WINDOW = 4, 16
everywhere = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])


def bounded(**changes: Any) -> SinkWindow:
    settings: dict[str, Any] = {"sinks": SINKS, "window": WINDOW, **changes}
    return SinkWindow(**settings)


def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def in_chunks(model: PreTrainedModel, ids: Tensor, chunks: list[int], cache: Any) -> Tensor:
    parts = ids.split([*chunks, ids.shape[1] - sum(chunks)], dim=1)
    name = cache_argument(model.forward) or "past_key_values"
    return torch.cat([logits(model, part, **{name: cache}) for part in parts], dim=1)


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    assert (actual - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def sink_layers(cache: Any) -> list[SinkLayer]:
    return [layer for layer in cache.layers if isinstance(layer, SinkLayer)]


def held(cache: Any) -> set[int]:
    """Bytes of memory that a bounded layer's keys take."""
    layers: list[Any] = [*sink_layers(cache)]
    return {layer.keys.untyped_storage().nbytes() for layer in layers}


def most_keys(cache: Any) -> int:
    return max(layer.keys.shape[2] for layer in cache.layers)


@everywhere
@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize(
    "chunks", [[60] + [1] * 59, [9, 30, 1, 1, 1, 7, 25, 2, 1, 1], [1] * 119, [70, 40]]
)
def test_a_bounded_cache_gives_the_logits_of_all_keys(
    family: str, limit: int | None, chunks: list[int]
) -> None:
    model, ids = build(family), tokens(120)
    cache = DynamicCache(config=model.config)
    with longctx.extend(model, bounded(limit=limit)):
        assert_close(in_chunks(model, ids, chunks, cache), logits(model, ids, use_cache=False))
    layers = sink_layers(cache)
    assert len(layers) == (1 if family == "gemma3" else 2)
    assert cache.get_seq_length() == 120
    for layer in layers:
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.keys.shape[2] == layer.values.shape[2] <= SINKS + WINDOW


@everywhere
def test_memory_is_the_same_after_any_number_of_tokens(family: str) -> None:
    model, ids = build(family), tokens(300)
    cache = DynamicCache(config=model.config)
    with longctx.extend(model, bounded()):
        in_chunks(model, ids, [200, 1], cache)
        assert held(cache) == {4 * 2 * 16 * (SINKS + WINDOW - 1)}
        for _ in range(300):
            in_chunks(model, ids[:, :1], [], cache)
        assert held(cache) == {4 * 2 * 16 * (SINKS + WINDOW)}
    assert cache.get_seq_length() == 600


def padded(lengths: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A batch with padding on the left, its mask, and its rows alone."""
    rows = [tokens(length, seed=seed) for seed, length in enumerate(lengths)]
    ids, mask = (torch.zeros(len(lengths), max(lengths), dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, -row.shape[1] :], mask[i, -row.shape[1] :] = row[0], 1
    return ids, mask, rows


@everywhere
@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("first", [60, 10])
def test_rows_of_a_padded_batch_are_as_alone(family: str, limit: int | None, first: int) -> None:
    model, lengths, steps = build(family), [60, 3, 21, 45], 40
    ids, mask, rows = padded(lengths)
    more = tokens(steps, batch=len(rows), seed=9)
    ids, mask = torch.cat([ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    name = cache_argument(model.forward) or "past_key_values"
    ends = [first, 60, *range(61, 78), 90, *range(91, 101)]
    with longctx.extend(model, bounded(limit=limit)):
        cache, found, begin = DynamicCache(config=model.config), [], 0
        for end in dict.fromkeys(ends):
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            found.append(logits(model, ids[:, begin:end], **inputs, **{name: cache}))
            begin = end
        batch = torch.cat(found, dim=1)
        for i, row in enumerate(rows):
            alone = torch.cat([row, more[i : i + 1]], dim=1)
            wanted = logits(model, alone, use_cache=False)[0]
            assert_close(batch[i, -len(wanted) :], wanted)
    assert all(layer.starts == (0, 57, 39, 15) for layer in sink_layers(cache))


@everywhere
def test_generation_of_a_padded_batch_is_that_of_each_row_alone(family: str) -> None:
    model = build(family)
    ids, mask, rows = padded([50, 5, 30])
    settings: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    with longctx.extend(model, bounded()):
        batch: Any = model.generate(ids, attention_mask=mask, **settings)
        for i, row in enumerate(rows):
            alone: Any = model.generate(row, **settings)
            assert alone[0, row.shape[1] :].tolist() == batch[i, 50:].tolist()


@everywhere
def test_three_beams_are_those_of_all_keys(family: str) -> None:
    model = build(family)
    ids, mask, _ = padded([50, 5, 30])
    found: list[Any] = []
    for evict in (True, False):
        with longctx.extend(model, bounded(evict=evict)):
            found.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    num_beams=3,
                    max_new_tokens=40,
                    min_new_tokens=40,
                    return_dict_in_generate=True,
                    output_scores=True,
                )
            )
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert_close(found[0].sequences_scores, found[1].sequences_scores)


def test_the_cache_that_a_call_returns_is_bounded_and_goes_on() -> None:
    model, ids = build("llama"), tokens(100)
    name = cache_argument(model.forward) or "past_key_values"
    with longctx.extend(model, bounded()), torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        first = model(ids[:, :60])
        cache = first[name]
        assert len(sink_layers(cache)) == 2
        assert_close(logits(model, ids[:, 60:], **{name: cache}), wanted[:, 60:])
        cache.reset()
        assert_close(in_chunks(model, ids, [40], cache), wanted)
        assert model(ids, use_cache=False).get(name) is None


def test_generation_goes_on_from_a_cache_of_its_own() -> None:
    model, ids = build("llama"), tokens(30)
    name = cache_argument(model.forward) or "past_key_values"
    settings: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    with longctx.extend(model, bounded()):
        whole: Any = model.generate(ids, max_new_tokens=60, min_new_tokens=60, **settings)
        part: Any = model.generate(ids, max_new_tokens=30, min_new_tokens=30, **settings)
        more: Any = model.generate(
            part.sequences,
            max_new_tokens=30,
            min_new_tokens=30,
            **settings,
            **{name: part[name]},
        )
    assert torch.equal(more.sequences, whole.sequences)
    assert most_keys(part[name]) <= SINKS + WINDOW


def test_caches_that_keep_all_keys_stay_and_are_right() -> None:
    model, ids = build("llama"), tokens(100)
    filled = DynamicCache(config=model.config)
    in_chunks(model, ids[:, :1], [], filled)  # a token alone is the same under any rule
    with longctx.extend(model, bounded()):
        wanted = logits(model, ids, use_cache=False)
        rest = in_chunks(model, ids[:, 1:], [60], filled)
        assert_close(rest, wanted[:, 1:])
        assert sink_layers(filled) == []
        static = StaticCache(config=model.config, max_cache_len=128)
        assert_close(in_chunks(model, ids, [60, 1, 1], static), wanted)
    with longctx.extend(model, bounded(evict=False)):
        whole = DynamicCache(config=model.config)
        assert_close(in_chunks(model, ids, [60, 1, 1], whole), wanted)
        assert most_keys(whole) == 100


def test_training_makes_no_bounded_cache() -> None:
    model, ids = build("llama").train(), tokens(40)
    with longctx.extend(model, bounded()):
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        name = cache_argument(model.forward) or "past_key_values"
        assert sink_layers(output[name]) == []


@everywhere
def test_undo_takes_the_hook_away(family: str) -> None:
    model, ids = build(family), tokens(100)
    before = in_chunks(model, ids, [60], DynamicCache(config=model.config))
    with longctx.extend(model, bounded()) as patch:
        report = patch.report()
        assert report.ok
        assert f"caches bounded: at most {SINKS + WINDOW} keys a layer" in str(report)
        assert len(model.get_decoder()._forward_pre_hooks) == 1
    assert not model.get_decoder()._forward_pre_hooks
    cache = DynamicCache(config=model.config)
    assert torch.equal(in_chunks(model, ids, [60], cache), before)
    assert sink_layers(cache) == []


@pytest.mark.parametrize("evict", [True, False])
def test_a_saved_model_bounds_its_caches_again(evict: bool, tmp_path: Path) -> None:
    model: Any
    model, tokenizer = longctx.load("demo")
    ids = torch.randint(5, 500, (1, 60), generator=torch.Generator().manual_seed(0))
    longctx.extend(model, bounded(evict=evict))
    wanted: Any = model.generate(ids, max_new_tokens=20, do_sample=False)
    with pytest.warns(UserWarning, match=r"longctx\.load"):
        longctx.save(model, tokenizer, tmp_path / "out")
    again: Any = longctx.load(tmp_path / "out")[0]
    settings: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    found: Any = again.generate(ids, max_new_tokens=20, **settings)
    assert torch.equal(found.sequences, wanted)
    cache = found[cache_argument(again.forward) or "past_key_values"]
    assert len(sink_layers(cache)) == (len(cache.layers) if evict else 0)


def test_what_a_bounded_cache_cannot_do_is_refused() -> None:
    model, ids = build("llama"), tokens(30)
    cache = DynamicCache(config=model.config)
    lookup: dict[str, Any] = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 30}
    with longctx.extend(model, bounded()):
        in_chunks(model, ids, [], cache)
        with pytest.raises(ModelError, match="cannot take 2 back"):
            cache.crop(-2)
        if hasattr(DynamicCache, "is_croppable"):
            assert not cache.is_croppable
        with pytest.raises((ModelError, ValueError), match=r"take \d+ back|crop|rollback"):
            model.generate(tokens(20).repeat(1, 3), **lookup)
        mask = torch.ones(1, 31)
        mask[0, :4] = 0
        name = cache_argument(model.forward) or "past_key_values"
        with pytest.raises(ModelError, match=r"begin at tokens \[4\].*\[0\] in the cache"):
            model(ids[:, :1], attention_mask=mask, **{name: cache})
    with pytest.raises(ModelError, match="sees all tokens: start with a new cache"):
        in_chunks(model, ids[:, :1], [], cache)
    with (
        longctx.extend(model, bounded(window=8)),
        pytest.raises(ModelError, match="4 sinks and the last 16 tokens, and the model sees 4 and"),
    ):
        in_chunks(model, ids[:, :1], [], cache)
    with longctx.extend(model, bounded(evict=False)):  # prompt lookup keeps its right
        model.generate(tokens(20).repeat(1, 3), **lookup)


def test_sweeps_give_the_same_numbers() -> None:
    model, tokenizer = longctx.load("demo")
    methods = [f"sink_window:window=100,evict={evict}" for evict in (True, False)]
    tasks = [Passkey(samples=6), Perplexity(windows=2)]
    result = sweep(model, tokenizer, tasks, [256, 512], methods=methods)
    for task in ("passkey", "perplexity"):
        for length in (256, 512):
            one, other = (result.row(v.label, task, length) for v in result.variants)
            assert (one.value, one.nll) == pytest.approx((other.value, other.nll), rel=1e-5)
            assert one.tokens == other.tokens
