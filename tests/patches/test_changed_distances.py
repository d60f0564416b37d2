"""Methods that change distances, hide keys or scale queries: settings, stacking, layers, proof."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import longctx
from longctx.attention.hook import ATTRIBUTE, SCALE
from longctx.attention.layers import attention_layers
from longctx.attention.probing import probe_turning
from longctx.attention.regions import distances
from longctx.attention.remapped import Planner
from longctx.attention.turning import Rotation
from longctx.errors import MethodError, ModelError
from longctx.model import rope_of
from longctx.patches.dual_chunk import DualChunk
from longctx.patches.log_n import LogN
from longctx.patches.rerope import ReRope
from longctx.patches.self_extend import SelfExtend
from longctx.patches.sink_window import SinkWindow
from longctx.patches.string import String

from ..families import WINDOW, build, tokens

REMAPPED = ("dual_chunk:2", "rerope:2", "self_extend:2", "string", "sink_window")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("dual_chunk:chunk=16,local=16", "chunk=16 must be longer than local=16"),
        ("dual_chunk:chunk=65", r"local < chunk ≤ 64, the model's window"),
        ("dual_chunk:local=0", "local=0: expected a whole number ≥ 1"),
        ("dual_chunk:chunk=16.5", "chunk=16.5: expected a whole number"),
        ("dual_chunk:factor=0.5", "would shrink the window"),
        ("dual_chunk:target=32", "target=32 tokens is below the window of 64"),
        ("rerope:window=64", "window=64: expected fewer tokens than the model's window of 64"),
        ("rerope:leak=0.5", "leak=0.5 must be a finite number ≥ 1"),
        ("self_extend", "needs factor=, target= or group="),
        ("self_extend:factor=8,group=2", r"group=2 with window=16 reaches 112 .* group ≥ 11"),
        ("self_extend:factor=2,window=64", "window=64: expected fewer tokens"),
        ("string:shift=4,window=8", "shift=4, window=8: expected window < shift < 64"),
        ("sink_window:sinks=4,window=61", r"expected sinks \+ window ≤ 64"),
        ("sink_window:limit=65,window=8", "no limit beyond it"),
        ("sink_window:sinks=-1", "sinks=-1: expected a whole number ≥ 0"),
        ("block_sparse:pattern=round", "expected blocks, banded or strided"),
        ("block_sparse:dense_every=1", "leaves every layer dense"),
        ("string:8", "distances trained .up to 494 at 512 tokens"),
        ("rerope:factor=8,leak=2", "distances trained"),
        ("dual_chunk:log_n=yes", "log_n='yes': expected True or False"),
        ("sink_window:evict=no", "evict='no': expected True or False"),
        ("self_extend:group=10000000000000000", "at most 1,099,511,627,776"),
        ("log_n:kind=loud", "expected log_n, ssmax, llama4 or ministral"),
        ("log_n:kind=ssmax,s=0", "s=0 must be a finite number > 0"),
    ],
)
def test_settings_that_do_not_fit(method: str, said: str) -> None:
    model, ids = build("llama"), tokens(WINDOW)
    before = model(ids).logits
    with pytest.raises(MethodError, match=said):
        longctx.extend(model, method)
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_group_is_as_small_as_the_window_allows() -> None:
    planner = SelfExtend(target=1000, window=16).planner(64)
    reach = (64 - planner.window) * planner.group + planner.window
    shorter = (64 - planner.window) * (planner.group - 1) + planner.window
    assert shorter < 1000 <= reach


@pytest.mark.parametrize(
    "planner",
    [
        DualChunk(chunk=12, local=2).planner(16),
        DualChunk(chunk=12, local=2, cap_below_chunk=True).planner(16),
        ReRope(window=8).planner(16),
        ReRope(window=8, leak=3).planner(16),
        SelfExtend(window=7, group=3).planner(16),
        String(shift=6, window=2).planner(16),
        SinkWindow(sinks=3, window=9).planner(16),
        SinkWindow(sinks=3, window=5, limit=11).planner(16),
        SinkWindow(sinks=0, window=5).planner(16),
    ],
)
def test_the_largest_distance_is_that_of_all_pairs(planner: Planner) -> None:
    for tokens_seen in range(1, 60):
        places = torch.arange(tokens_seen, dtype=torch.float64)
        frames = planner.frame(places)
        found = distances(planner.plan(0, tokens_seen, tokens_seen), frames, frames)
        assert planner.furthest(tokens_seen) == pytest.approx(found.nan_to_num(0).max().item())


def test_a_window_of_a_billion_tokens_is_declared_without_writing_it_out() -> None:
    assert longctx.extend(build("llama"), "rerope:target=1000000000").report().ok


def test_another_attention_under_turned_keys_is_refused() -> None:
    model, ids = build("llama"), tokens(20)
    longctx.extend(model, "dual_chunk:2")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="its attention is 'sdpa' now"):
        model(ids)


def test_positions_changed_in_place_in_inference_mode_are_seen() -> None:
    model, ids = build("llama"), tokens(20)
    longctx.extend(model, "dual_chunk:2")
    with torch.inference_mode():
        places = torch.arange(20)[None]
        first = model(ids, position_ids=places).logits
        places += 30
        moved = model(ids, position_ids=places).logits
        wanted = model(ids, position_ids=torch.arange(30, 50)[None]).logits
    assert torch.equal(moved, wanted)
    assert not torch.equal(moved, first)


@pytest.mark.parametrize("method", ["dual_chunk", "self_extend:2", "string", "log_n"])
def test_inside_the_first_chunk_or_window_nothing_changes(method: str) -> None:
    model, ids = build("llama"), tokens(16)  # the nearest that one of them keeps
    before = model(ids).logits
    with longctx.extend(model, method):
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("on_top", [*REMAPPED, "block_sparse", "log_n"])
@pytest.mark.parametrize("below", ["linear:2", "yarn:2"])
def test_they_count_on_the_window_below(below: str, on_top: str) -> None:
    model, ids = build("llama"), tokens(3 * WINDOW)
    original = model(ids).logits
    first = longctx.extend(model, below)
    extended = model(ids).logits
    second = longctx.extend(model, on_top)
    assert second.window_below == 2 * WINDOW
    assert second.report().ok
    further = 2 if on_top.endswith(":2") else 1
    assert second.report().window == further * 2 * WINDOW
    second.remove()
    assert torch.equal(model(ids).logits, extended)
    first.remove()
    assert torch.equal(model(ids).logits, original)


def test_a_frequency_method_goes_on_first() -> None:
    model = build("llama")
    longctx.extend(model, "dual_chunk:2")
    with pytest.raises(MethodError, match=r"extend by yarn first, then by dual_chunk on top"):
        longctx.extend(model, "yarn:2")


@pytest.mark.parametrize(("one", "other"), [("dynamic:2", "rerope"), ("rerope", "dynamic:2")])
def test_frequencies_that_follow_the_request_do_not_go_with_changed_distances(
    one: str, other: str
) -> None:
    model = build("llama")
    longctx.extend(model, one)
    with pytest.raises(MethodError, match="slot"):
        longctx.extend(model, other)


def test_layers_without_a_rotary_are_left_alone() -> None:
    model = build("smollm3")  # whose second layer has none
    patch = longctx.extend(model, "dual_chunk:4,log_n=True")
    first, second = (layer.self_attn for layer in model.model.layers)
    assert hasattr(first, ATTRIBUTE)
    assert not hasattr(second, ATTRIBUTE)
    assert "1 have no rotary" in str(patch.report())
    patch.remove()
    longctx.extend(model, "sink_window:window=8")  # which hides keys from every layer
    assert hasattr(second, ATTRIBUTE)


@pytest.mark.parametrize("family", ["llama", "cohere", "glm", "smollm3", "gemma3", "qwen3", "phi3"])
def test_turning_is_understood_layer_by_layer(family: str) -> None:
    model = build(family)
    layers = attention_layers(model)
    full = [layer for layer in layers if layer.full]
    rope = rope_of(model)
    found = probe_turning(model, full, Rotation(model, rope.layer_type, full[0].module))
    assert found.difference < 1e-5
    assert len(found.turning) + len(found.still) == len(full)


def test_a_layer_that_turns_in_its_own_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    source = __import__("transformers.models.llama.modeling_llama", fromlist=["x"])
    turn = source.apply_rotary_pos_emb

    def other(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        q, k = turn(q, k, *args, **kwargs)
        return (q.roll(1, dims=-1), k.roll(1, dims=-1)) if q.shape[2] == 8 else (q, k)

    monkeypatch.setattr(source, "apply_rotary_pos_emb", other)
    with pytest.raises(ModelError, match="turns its queries in a way of its own"):
        longctx.extend(model, "dual_chunk:2")


@pytest.mark.parametrize(
    ("method", "factor"),
    [
        (LogN(), lambda m: max(1.0, math.log(m + 1) / math.log(WINDOW))),
        (LogN(kind="ssmax", s=0.43), lambda m: 0.43 * math.log(m + 1)),
        (LogN(kind="llama4", floor=8), lambda m: 1 + 0.1 * math.log(1 + (m + 1) // 8)),
        (LogN(kind="ministral", floor=8), lambda m: 1 + 0.1 * math.log(1 + m // 8)),
    ],
)
def test_factors_on_queries(method: LogN, factor: Any) -> None:
    places = torch.arange(200, dtype=torch.float64)[None]
    wanted = torch.tensor([[factor(m) for m in range(200)]], dtype=torch.float64)
    torch.testing.assert_close(method.scale(WINDOW)(places), wanted, rtol=1e-12, atol=0)


def test_queries_are_scaled_once() -> None:
    model = build("llama")
    longctx.extend(model, "log_n")
    with pytest.raises(MethodError, match="queries are scaled already"):
        longctx.extend(model, DualChunk(factor=2, log_n=True))
    patch = longctx.extend(model, DualChunk(factor=2))
    assert hasattr(model.model.layers[0].self_attn, SCALE)
    patch.remove()


def test_the_field_is_the_method_on_top() -> None:
    model, ids = build("llama"), tokens(3 * WINDOW)
    with longctx.extend(model, "dual_chunk:2,log_n=True"):
        field = model(ids).logits
    with longctx.extend(model, "log_n"), longctx.extend(model, "dual_chunk:2"):
        assert torch.equal(model(ids).logits, field)


def test_skipped_positions_and_masks_of_another_kind_are_refused() -> None:
    model, ids = build("llama"), tokens(20)
    longctx.extend(model, "dual_chunk:2")
    skipping = torch.arange(20)[None] * 2
    with pytest.raises(ModelError, match="position_ids that skip"):
        model(ids, position_ids=skipping)
    tree = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(ModelError, match="attention mask of shape"):
        model(ids, attention_mask=tree)
    hole = torch.ones(1, 20, dtype=torch.long)
    hole[0, 5] = 0
    with pytest.raises(ModelError, match="padding inside its text"):
        model(ids, attention_mask=hole)


@pytest.mark.parametrize(
    "method",
    [
        *REMAPPED,
        "sink_window:window=20",
        "sink_window:window=20,limit=60",
        "block_sparse",
        "block_sparse:pattern=strided",
        "block_sparse:stride_blocks=1000000",
        "log_n",
        "log_n:kind=ssmax",
    ],
)
@pytest.mark.parametrize("pad", [9, 200])
def test_padding_that_only_the_mask_tells_of_changes_nothing(method: str, pad: int) -> None:
    model, ids = build("llama"), tokens(150)
    longctx.extend(model, method)
    padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, pad), torch.ones(1, 150)], dim=1).long()
    wanted = model(ids).logits
    found = model(padded, attention_mask=mask, use_cache=False).logits[:, pad:]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    first = model(padded[:, : pad + 100], attention_mask=mask[:, : pad + 100], use_cache=True)
    rest = model(
        padded[:, pad + 100 :], attention_mask=mask, past_key_values=first.past_key_values
    ).logits
    torch.testing.assert_close(rest, wanted[:, 100:], rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", ["block_sparse", "sink_window:window=20", "string"])
def test_positions_that_begin_elsewhere_change_nothing(method: str) -> None:
    model, ids = build("llama"), tokens(150)
    longctx.extend(model, method)
    wanted = model(ids).logits
    for first in (3, 201):
        found = model(ids, position_ids=torch.arange(first, first + 150)[None]).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-4)


def test_changed_distances_need_positions() -> None:
    model = build("llama")
    longctx.extend(model, "drop")
    with pytest.raises(MethodError, match="all frequencies being 0"):
        longctx.extend(model, "dual_chunk:2")


@pytest.mark.parametrize("method", [*REMAPPED, "block_sparse"])
def test_a_batch_of_unequal_rows_is_the_rows_alone(method: str) -> None:
    model = build("llama")
    longctx.extend(model, method)
    long, short = tokens(150, seed=1), tokens(100, seed=2)
    blank = torch.zeros(1, 50, dtype=torch.long)
    for left in (True, False):
        pair = [blank, short] if left else [short, blank]
        ids = torch.cat([long, torch.cat(pair, dim=1)])
        mask = (ids != 0).long()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(ids, attention_mask=mask, position_ids=places).logits
        own = found[1, 50:] if left else found[1, :100]
        torch.testing.assert_close(own, model(short).logits[0], rtol=0, atol=5e-5)
        torch.testing.assert_close(found[0], model(long).logits[0], rtol=0, atol=5e-5)
