"""S²-Attn: against masks written out head by head, no look ahead, and plain outside training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

import longctx
from longctx.attention.hook import ATTRIBUTE
from longctx.errors import MethodError, ModelError
from longctx.model import attention_modules
from longctx.patches.shifted import GroupedAttention, Shifted
from longctx.train.engine.packed_attention import packed_attention
from longctx.train.parallel.before_transformers_5_23 import checkpoint_activations

from ..families import WINDOW, build, tokens

LONG = WINDOW + 40
HEADS = ((4, 4), (4, 2), (4, 1), (6, 2), (6, 3), (12, 3), (3, 3), (3, 1), (1, 1))


def visible(documents: list[int], groups: int, shifted: bool) -> Tensor:
    """Who sees whom [N, N], from the number of each token's group."""
    blocks: list[Tensor] = []
    for length in documents:
        size = (length + groups - 1) // groups
        before = size - size // 2 if shifted else 0  # missing from the first group
        number = (torch.arange(length) + before) // size
        blocks.append((number[:, None] == number).tril())
    return torch.block_diag(*blocks).bool()


def masks(documents: list[int], groups: int, heads: int) -> Tensor:
    """The same for every head, [H, N, N]."""
    return torch.stack([visible(documents, groups, h >= heads // 2) for h in range(heads)])


def naive(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention under masks [H, N, N], in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q.double() @ k.double().mT / 3).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v.double()


def draw(heads: int, kv_heads: int, length: int, batch: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)
    sizes = ((heads, 8), (kv_heads, 8), (kv_heads, 8))
    made = [torch.randn(batch, n, length, d, generator=g, dtype=torch.float64) for n, d in sizes]
    return [x.requires_grad_() for x in made]


def attend(
    qkv: list[Tensor], groups: int = 4, mask: Tensor | None = None, training: bool = True
) -> Tensor:
    rule = GroupedAttention(groups).train(training)
    return rule(*qkv, mask=mask, positions=None, scaling=1 / 3)


def assert_same_with_gradients(found: Tensor, wanted: Tensor, qkv: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    pairs = zip(
        *(torch.autograd.grad((x * weights).sum(), qkv) for x in (found, wanted)), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_groups_of_a_small_case() -> None:
    """Nine tokens in groups of ⌈9/4⌉ = 3: three groups, or 1 + 3 + 3 + 2."""
    wanted = {False: "aaabbbccc", True: "abbbcccdd"}
    for shifted, letters in wanted.items():
        same = torch.tensor([[a == b for b in letters] for a in letters]).tril()
        assert torch.equal(visible([9], 4, shifted), same)
    qkv = draw(2, 1, 9)
    seen = attend([*qkv[:2], torch.eye(9, dtype=torch.float64).expand(2, 1, 9, 9)]) > 0
    assert torch.equal(seen[0], masks([9], 4, 2))


@pytest.mark.parametrize("groups", [2, 4, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 37, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_values_and_gradients_are_those_of_the_masks(
    heads: int, kv_heads: int, length: int, groups: int
) -> None:
    qkv = draw(heads, kv_heads, length)
    wanted = naive(qkv[0], qkv[1], qkv[2], masks([length], groups, heads))
    assert_same_with_gradients(attend(qkv, groups), wanted, qkv)


@pytest.mark.parametrize(
    "rows", [[[17, 1, 12, 10]] * 2, [[8, 8, 8, 8, 8]] * 2, [[20, 20], [39, 1]]]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
def test_packed_documents_are_grouped_each_on_its_own(
    heads: int, kv_heads: int, rows: list[list[int]]
) -> None:
    qkv = draw(heads, kv_heads, 40)
    numbers = [torch.repeat_interleave(torch.tensor(row)) for row in rows]
    allowed = torch.stack([masks(row, 4, heads) for row in rows])
    found = attend(qkv, mask=torch.stack(numbers)[:, None, None].int())
    assert_same_with_gradients(found, naive(qkv[0], qkv[1], qkv[2], allowed), qkv)


def test_padding_on_either_side_changes_nothing() -> None:
    qkv = draw(4, 2, 30, batch=3)
    real = torch.ones(3, 1, 1, 30, dtype=torch.bool)
    real[0, ..., :7] = False
    real[1, ..., 19:] = False
    found = attend(qkv, mask=real)
    for row, (first, last) in enumerate([(7, 30), (0, 19), (0, 30)]):
        alone = attend([x[row, None, :, first:last] for x in qkv])
        torch.testing.assert_close(found[row, None, :, first:last], alone, rtol=0, atol=1e-12)


def leaks(attention: Any, heads: int, length: int) -> float:
    """Largest gradient of a head's output at a token with respect to anything after it."""
    qkv = draw(heads, 2, length, batch=1)
    out = attention(qkv)
    worst = 0.0
    for head in range(heads):
        for token in range(length - 1):
            gradients = torch.autograd.grad(out[0, head, token].sum(), qkv, retain_graph=True)
            worst = max(worst, *(g[:, :, token + 1 :].abs().max().item() for g in gradients))
    return worst


def rolled(qkv: list[Tensor]) -> Tensor:
    """The reference code's way, 4 groups: roll half the heads, attend within groups, roll back."""
    q, k, v = (x.repeat_interleave(4 // x.shape[1], dim=1) for x in qkv)
    size = q.shape[2] // 4

    def roll(x: Tensor, by: int) -> Tensor:
        return torch.cat([x[:, :2], x[:, 2:].roll(by, dims=2)], dim=1)

    q, k, v = (roll(x, -(size // 2)).unflatten(2, (4, size)) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return roll(out.flatten(2, 3), size // 2)


@pytest.mark.parametrize("length", [20, 23])
def test_no_head_sees_the_future(length: int) -> None:
    assert leaks(attend, 4, length) == 0.0


def test_the_reference_code_does() -> None:
    """So that the test above is known to see a leak."""
    assert leaks(rolled, 4, 20) > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_no_logits_depend_on_later_tokens(family: str) -> None:
    model = build(family).train()
    longctx.extend(model, Shifted())
    embeds = model.get_input_embeddings()(tokens(31)).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
    for token in range(30):
        (gradient,) = torch.autograd.grad(logits[token].sum(), embeds, retain_graph=True)
        assert not gradient[0, token + 1 :].any()
        assert gradient[0, : token + 1].any()


def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "phi3", "olmo2"])
def test_training_is_grouped_evaluation_is_the_model_to_the_last_bit(family: str) -> None:
    model, ids = build(family), tokens(LONG)
    before, config = logits(model, ids), model.config.to_dict()
    with longctx.extend(model, Shifted()) as patch:
        assert torch.equal(logits(model, ids), before)
        assert "until model.train()" in str(patch.report())
        model.train()
        assert (logits(model, ids) - before).abs().max() > 1e-2
        assert "acting now" in str(patch.report())
        model.eval()
        assert torch.equal(logits(model, ids), before)
        assert model.generate(ids, max_new_tokens=4).shape == (1, LONG + 4)
    assert torch.equal(logits(model, ids), before)
    assert model.config.to_dict() == config
    assert not any(hasattr(module, ATTRIBUTE) for module in model.modules())


def test_a_model_in_training_is_grouped_at_once() -> None:
    model, ids = build("llama").train(), tokens(LONG)
    before = logits(model, ids)
    with longctx.extend(model, Shifted()):
        assert (logits(model, ids) - before).abs().max() > 1e-2
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("factor", [None, 8])
def test_a_whole_model_is_the_eager_one_under_its_masks(factor: int | None) -> None:
    """With its rotary, native or extended, under a mask for every head that transformers adds."""
    model, ids = build("llama"), tokens(LONG)
    if factor:
        longctx.extend(model, "linear", factor=factor)
    allowed = masks([LONG], 4, 4)[None]
    model.set_attn_implementation("eager")
    wanted = logits(model, ids, attention_mask=torch.zeros(()).where(allowed, -torch.inf))
    model.set_attn_implementation("sdpa")
    plain = logits(model, ids)
    patch = longctx.extend(model, "shifted", groups=4)
    assert torch.equal(logits(model, ids), plain)
    found = logits(model.train(), ids)
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert (found - plain).abs().max() > 1e-2
    if factor:
        assert patch.below is not None
        assert patch.below.method.name == "linear"
        assert model.config.max_position_embeddings == 8 * WINDOW
        patch.remove()
        assert torch.equal(logits(model, ids), plain)


def test_a_rotary_on_top_of_it_replaces_no_shipped_scaling_unasked() -> None:
    shipped = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = build("llama", rope_parameters=shipped)
    longctx.extend(model, "shifted")
    with pytest.raises(MethodError, match="ships with 'linear' RoPE scaling"):
        longctx.extend(model, "yarn", factor=4)
    longctx.extend(model, "yarn", factor=4, replace=True)


def test_a_copy_is_undone_without_a_trace() -> None:
    model = build("llama")
    longctx.extend(model, "shifted")
    twin = copy.deepcopy(model)
    patch = longctx.patch_of(twin)
    assert patch is not None
    patch.remove()
    assert not any(hasattr(module, ATTRIBUTE) for module in twin.modules())
    assert longctx.patch_of(model) is not None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("training", [True, False])
def test_packed_in_a_model_equals_each_alone(family: str, training: bool) -> None:
    model = build(family).train(training)
    documents = [tokens(length, seed=length) for length in (40, 1, 30)]
    longctx.extend(model, "shifted")
    alone = torch.cat([logits(model, ids) for ids in documents], dim=1)
    lengths = [ids.shape[1] for ids in documents]
    batch = {
        "input_ids": torch.cat(documents, dim=1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "document_ids": torch.repeat_interleave(torch.tensor(lengths))[None],
    }
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    with packed_attention(model) as packed, torch.no_grad():
        found = model(**packed.inputs(batch)).logits
    assert (found - alone).abs().max() < 2e-5 * alone.abs().max()


@pytest.mark.parametrize("queries", [1, 9])
def test_tokens_after_cached_ones_see_everything(queries: int) -> None:
    q, k, v = draw(4, 2, 30)
    q = q[:, :, -queries:]
    causal = torch.ones(30, 30, dtype=torch.bool).tril()[-queries:]
    mask = None if queries == 1 else torch.ones(2, 1, 1, 30, dtype=torch.bool)
    for training in (True, False):
        found = attend([q, k, v], mask=mask, training=training)
        torch.testing.assert_close(found, naive(q, k, v, causal), rtol=0, atol=1e-12)


def test_evaluation_takes_every_mask() -> None:
    model, ids = build("llama"), tokens(LONG, batch=2)
    left = torch.ones(2, LONG, dtype=torch.long)
    left[0, :30] = 0
    full = torch.ones(2, 1, LONG, LONG, dtype=torch.bool).tril()
    for mask in (left, full):
        before = logits(model, ids, attention_mask=mask)
        with longctx.extend(model, "shifted"):
            found = logits(model, ids, attention_mask=mask)
            cache = DynamicCache(config=model.config)
            if mask is left:
                logits(model, ids[:, :80], attention_mask=left[:, :80], past_key_values=cache)
                rest = logits(model, ids[:, 80:], attention_mask=left, past_key_values=cache)
                torch.testing.assert_close(rest, found[:, 80:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:, 30:], before[:, 30:], rtol=1e-4, atol=1e-4)


def test_training_refuses_masks_that_it_cannot_group() -> None:
    model, ids = build("llama").train(), tokens(20)
    longctx.extend(model, "shifted")
    holes = torch.ones(1, 20, dtype=torch.long)
    holes[0, 5:9] = 0
    with pytest.raises(ModelError, match=r"20 tokens with padding inside its text \(16 are real"):
        model(ids, attention_mask=holes)
    with pytest.raises(ModelError, match=r"mask of shape \[1, 1, 20, 20\]"):
        model(ids, attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool).tril())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    """A reentrant checkpoint runs first without gradients, and must be grouped then too."""
    model, ids = build("llama").train(), tokens(LONG)
    longctx.extend(model, "shifted")
    found: list[list[Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_it_trains_under_autocast() -> None:
    model, ids = build("llama").train(), tokens(LONG)
    longctx.extend(model, "shifted")
    exact = model(input_ids=ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_only_full_attention_layers_are_grouped() -> None:
    model = build("gemma3")
    with longctx.extend(model, "shifted"):
        for _, module, kind in attention_modules(model):
            assert hasattr(module, ATTRIBUTE) == (kind == "full_attention")


def test_another_attention_and_another_mode_are_noticed() -> None:
    model = build("llama")
    patch = longctx.extend(model, "shifted")
    model.set_attn_implementation("sdpa")
    getattr(model.model.layers[1].self_attn, ATTRIBUTE).train()
    failed = [check.name for check in patch.report().checks if not check.ok]
    assert failed == ["attention in use", "training only"]


@pytest.mark.parametrize("groups", [1, 0, -4, 2.5, True, "4"])
def test_groups_that_are_none_are_refused(groups: Any) -> None:
    with pytest.raises(MethodError, match="whole number ≥ 2"):
        Shifted(groups)


def test_attention_that_it_does_not_compute_is_refused() -> None:
    with pytest.raises(ModelError, match="attention dropout"):
        longctx.extend(build("llama", attention_dropout=0.1), "shifted")
    with pytest.raises(ModelError, match=r"sliding window \(32 tokens\)"):
        longctx.extend(build("mistral", sliding_window=32), "shifted")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    capped = Gemma2ForCausalLM(Gemma2Config(vocab_size=96, **sizes, **heads))
    with pytest.raises(ModelError, match="soft-capped"):
        longctx.extend(capped, "shifted")
