"""The name "longctx" in transformers: masks, and modules that carry no rule of their own."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, sdpa_mask

from longctx.attention import hook
from longctx.attention.dispatch import LinearBias
from longctx.attention.hook import ATTRIBUTE, NAME, IdentityRotary, register
from longctx.attention.reference import attention_with_linear_bias
from longctx.errors import ModelError

from ...families import build, tokens

SLOPES = (0.5, 0.25, 0.1, 0.01)


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def module(rule: Any = None, **attributes: Any) -> nn.Module:
    made = nn.Module()
    for name, value in {"num_key_value_groups": 2, "is_causal": True, **attributes}.items():
        setattr(made, name, value)
    if rule is not None:
        setattr(made, ATTRIBUTE, rule)
    return made


def qkv(queries: int, keys: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(queries)
    shapes = ((batch, 4, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 8))
    q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
    return q, k, v


def run(rule: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **extra: Any) -> Tensor:
    """Output as [B, H, S, D]."""
    return hook.attention_forward(module(rule), q, k, v, mask, **extra)[0].transpose(1, 2)


def test_registering_twice_is_registering_once() -> None:
    register()
    assert AttentionInterface()[NAME] is hook.attention_forward
    assert AttentionMaskInterface()[NAME] is hook.attention_mask


def mask_of(model: Any, queries: int, **arguments: Any) -> Tensor | None:
    """The mask that transformers hands to a model's layers under the name "longctx"."""
    model.config._attn_implementation = NAME
    inputs: dict[str, Any] = {"attention_mask": None, "past_key_values": None, **arguments}
    embeds = torch.zeros(inputs.pop("batch", 1), queries, 64)
    found: Any = create_causal_mask(model.config, embeds, **inputs)
    return found


def test_no_mask_where_none_is_needed() -> None:
    model = build("llama")
    assert mask_of(model, 9) is None
    assert mask_of(model, 9, attention_mask=torch.ones(1, 9)) is None
    cache = filled(DynamicCache(config=model.config), 12)
    assert mask_of(model, 1, past_key_values=cache) is None


def test_padding_is_a_mask_on_keys() -> None:
    padding = torch.ones(2, 9)
    padding[0, :4] = 0
    mask = mask_of(build("llama"), 9, attention_mask=padding, batch=2)
    assert mask is not None
    assert mask.dtype == torch.bool
    assert torch.equal(mask, padding.bool()[:, None, None])


def filled(cache: Any, length: int) -> Any:
    for layer in range(2):
        cache.update(torch.zeros(1, 2, length, 16), torch.zeros(1, 2, length, 16), layer)
    return cache


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_cache_is_cut_to_the_keys_written(queries: int, padded: bool) -> None:
    model = build("llama")
    seen = torch.ones(1, 12 + queries)
    seen[0, :3] = 0
    extra = {"attention_mask": seen} if padded else {}
    for cache in (StaticCache(config=model.config, max_cache_len=40), DynamicCache()):
        mask = mask_of(model, queries, past_key_values=filled(cache, 12), **extra)
        if mask is None:
            assert isinstance(cache, DynamicCache)
            assert queries == 1
            continue
        assert mask.shape == (1, 1, 1, 12 + queries)
        assert torch.equal(mask[0, 0, 0], seen[0].bool() | (not padded))


def test_a_mask_shorter_than_what_is_written_hides_the_rest_as_in_transformers() -> None:
    arguments: dict[str, Any] = {
        "batch_size": 1,
        "q_length": 4,
        "kv_length": 10,
        "q_offset": 6,
        "attention_mask": torch.ones(1, 8, dtype=torch.bool),
    }
    mine, theirs = hook.attention_mask(**arguments), sdpa_mask(**arguments)
    assert mine is not None
    assert theirs is not None
    assert torch.equal(hook._full_mask(mine, 4), theirs)


def test_packed_documents_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "_ROWS", 4)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4], [*range(9), 0]])
    numbers = mask_of(build("llama"), 10, position_ids=positions, batch=2)
    assert numbers is not None
    assert numbers[:, 0, 0].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [0] * 9 + [1]]
    model = build("llama")
    model.config._attn_implementation = "sdpa"
    full: Any = create_causal_mask(
        model.config,
        torch.zeros(2, 10, 64),
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    assert torch.equal(hook._full_mask(numbers, 10), full)


def test_other_patterns_stay_full_masks() -> None:
    def every_other(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((q - k) % 2 == 0)

    extras: list[dict[str, Any]] = [
        {"mask_function": every_other},
        {"local_size": 3},
        {"kv_offset": 2, "q_offset": 2},
        {"use_vmap": True, "allow_is_causal_skip": False},
    ]
    for extra in extras:
        arguments: dict[str, Any] = {"batch_size": 1, "q_length": 6, "kv_length": 6, **extra}
        mine, theirs = hook.attention_mask(**arguments), sdpa_mask(**arguments)
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["none", "padding", "documents", "full", "decode", "chunk"])
def test_a_module_without_a_rule_runs_plain_sdpa(kind: str) -> None:
    queries = {"decode": 1, "chunk": 5}.get(kind, 12)
    q, k, v = qkv(queries, 12)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    visible, mask = None, None
    if kind == "padding":
        visible = mask = (torch.arange(12) >= 3)[None, None, None]
    if kind == "documents":
        mask = (torch.arange(12) >= 5).int()[None, None, None]
        visible = mask == mask.transpose(-1, -2)
    if kind == "full":
        visible = mask = (causal & ((torch.arange(12) % 5 != 2) | causal.diag().diag()))[None, None]
    if kind == "chunk":
        mask = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    out = run(None, q, k, v, mask)
    wanted = attention_with_linear_bias(q, k, v, (0.0,) * 4, visible=visible)
    real = slice(3, None) if kind == "padding" else slice(None)
    assert (out - wanted)[:, :, real].abs().max() < 2e-6


@pytest.mark.parametrize("rule", [None, LinearBias(SLOPES)])
def test_a_static_cache_on_its_first_use(rule: LinearBias | None) -> None:
    q, k, v = qkv(6, 20)
    out = run(rule, q, k, v, None)
    slope = (0.0,) * 4 if rule is None else SLOPES
    wanted = attention_with_linear_bias(q, k[:, :, :6], v[:, :, :6], slope)
    assert (out - wanted).abs().max() < 2e-6


def test_positions_that_jump_are_the_keys_positions() -> None:
    q, k, v = qkv(12, 12, batch=2)
    positions = torch.arange(12) + 100 * (torch.arange(12) >= 7)
    out = run(LinearBias(SLOPES), q, k, v, None, position_ids=positions[None], scaling=0.2)
    wanted = attention_with_linear_bias(q, k, v, SLOPES, scaling=0.2, positions=positions[None])
    assert (out - wanted).abs().max() < 2e-6


def test_consecutive_positions_are_recognised() -> None:
    q, k, _ = qkv(6, 6, batch=2)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], dtype=torch.bool)[:, None, None]
    documents = torch.tensor([[0, 0, 1, 1, 1, 1], [0] * 6], dtype=torch.int32)[:, None, None]
    for mask, rows, simple in (
        (None, [[5, 6, 7, 8, 9, 10]], True),
        (None, [[0, 1, 2, 3, 4, 6]], False),
        (padding, [[1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]], True),
        (padding, [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 9]], False),
        (documents, [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]], True),
        (documents, [[0, 1, 0, 1, 2, 8], [0, 1, 2, 3, 4, 5]], False),
    ):
        found = hook.key_positions(torch.tensor(rows), q, k, mask)
        assert (found is None) == simple, rows


def test_what_it_does_not_compute_is_refused() -> None:
    q, k, v = qkv(5, 5)
    rule = LinearBias(SLOPES)
    for extra, message in (
        ({"dropout": 0.1}, "attention_dropout = 0"),
        ({"softcap": 50.0}, "soft-capped"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"is_causal": False}, "decoders only"),
        ({"position_ids": torch.zeros(3, 1, 5)}, "several dimensions"),
    ):
        with pytest.raises(ModelError, match=message):
            run(rule, q, k, v, None, **extra)


def test_the_rule_is_read_from_the_module_and_called_with_the_mask() -> None:
    calls: list[dict[str, Any]] = []

    def rule(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        calls.append(settings)
        return torch.zeros_like(q)

    q, k, v = qkv(5, 5)
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    out, weights = hook.attention_forward(module(rule), q, k, v, mask)
    assert out.shape == (1, 5, 4, 8)
    assert out.is_contiguous()
    assert weights is None
    assert calls == [{"mask": mask, "positions": None, "scaling": 8**-0.5}]


def test_a_whole_model_under_the_name_is_the_native_model() -> None:
    model, ids = build("gemma3"), tokens(60)
    with torch.no_grad():
        wanted = model(ids).logits
        model.config._attn_implementation = NAME
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-5)


def test_the_identity_rotary_turns_one_layer_type_only() -> None:
    model = build("gemma3")
    native: Any = model.model.rotary_emb
    rotary = IdentityRotary(native, "full_attention")
    x, where = torch.zeros(2, 3, 64, dtype=torch.bfloat16), torch.arange(3)[None]
    cos, sin = rotary(x, where, "full_attention")
    assert cos.shape == sin.shape == (1, 3, 16)
    assert cos.dtype == torch.bfloat16
    assert (cos == 1).all()
    assert (sin == 0).all()
    for mine, theirs in zip(
        rotary(x, where, "sliding_attention"), native(x, where, "sliding_attention"), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert not dict(rotary.state_dict())
