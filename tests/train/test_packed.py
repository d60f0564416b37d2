"""Packed documents: the losses and gradients that they have alone, on every kind of model."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

import longctx
from longctx.errors import DataError, ModelError, RunError
from longctx.train.batch import Collator, unpacked_inputs
from longctx.train.packed import DocumentAttention, PackedAttention, packed_attention
from longctx.train.positions import FullLength, PoSE, Positions

from ..families import WINDOW, build, checkpoint_activations, tokens

LENGTHS = (37, 5, 40, 1, 29)
DOCUMENTS = [tokens(length, seed=length)[0].tolist() for length in LENGTHS]
FAMILIES = ("llama", "mistral", "qwen3", "gemma3")


def batches(policy: Positions) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The documents in two packed rows, one of them padded, and each alone."""
    collate = Collator(policy)

    def row(*which: int) -> dict[str, Any]:
        ids = [token for i in which for token in DOCUMENTS[i]]
        return {"input_ids": ids, "labels": ids, "seq_lengths": [LENGTHS[i] for i in which]}

    return collate([row(0, 1, 2), row(3, 4)]), [collate([row(i)]) for i in range(len(LENGTHS))]


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of the next tokens, written out."""
    kept = labels[:, 1:] != -100
    log_p = logits[:, :-1].log_softmax(-1)[kept]
    return -log_p.gather(1, labels[:, 1:][kept][:, None]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_packed_equals_alone(model: Any, policy: Positions) -> None:
    packed_batch, alone = batches(policy)
    total = 0.0
    for batch in alone:
        loss = nats(model(**unpacked_inputs(batch)).logits, batch["labels"])
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
    wanted = gradients(model)
    with packed_attention(model) as packed:
        loss = nats(model(**packed.inputs(packed_batch)).logits, packed_batch["labels"])
        loss.backward()
    found = gradients(model)
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error <= 1e-6, (name, error)


def small(family: str) -> Any:
    """Weights of a size at which float32 rounds the gradients by less than 1e-6 of them."""
    return build(family, initializer_range=0.1)


@pytest.mark.parametrize("policy", [FullLength(), PoSE(window=40, target=4 * WINDOW)], ids=repr)
@pytest.mark.parametrize("method", [None, "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family: str, method: str | None, policy: Positions) -> None:
    model = small(family)
    patch = longctx.extend(model, method, factor=4) if method else contextlib.nullcontext()
    with patch:
        assert_packed_equals_alone(model, policy)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_equals_alone_with_alibi(family: str) -> None:
    model = small(family)
    with longctx.extend(model, "alibi") as patch:
        assert_packed_equals_alone(model, FullLength())
        assert_packed_equals_alone(model, PoSE(window=40, target=4 * WINDOW))
        assert patch.report().ok


def test_packed_equals_alone_under_checkpointing() -> None:
    model = small("llama").train()
    checkpoint_activations(model)
    assert_packed_equals_alone(model, PoSE(window=40, target=4 * WINDOW))


@pytest.mark.parametrize("method", [None, "yarn", "alibi"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_no_gradient_leaks_between_documents(family: str, method: str | None) -> None:
    model = small(family)
    batch, _ = batches(FullLength())
    more: dict[str, Any] = {} if method == "alibi" else {"factor": 4}
    patch = longctx.extend(model, method, **more) if method else contextlib.nullcontext()
    with patch, packed_attention(model) as packed:
        inputs = packed.inputs(batch)
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        embeddings = embeddings.detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, **inputs).logits
        row, ids = logits[0], batch["document_ids"][0]
        (leak,) = torch.autograd.grad(row[ids == 2].square().sum(), embeddings)
    reached = leak[0].abs().sum(-1) > 0
    assert reached.tolist() == (ids == 2).tolist()
    assert not leak[1].any()


def test_the_undo_is_bit_exact_and_other_calls_go_on() -> None:
    for family in FAMILIES:
        model, ids = build(family), tokens(WINDOW)
        before, config = model(ids).logits, model.config.to_dict()
        with packed_attention(model):
            # Evaluation between two steps: a plain call, and one with a cache.
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
            first = model(ids[:, :40], use_cache=True)
            second = model(ids[:, 40:], past_key_values=first.past_key_values)
            both = torch.cat([first.logits, second.logits], 1)
            torch.testing.assert_close(both, before, rtol=1e-4, atol=1e-4)
            padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
            mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), torch.ones_like(ids)], 1)
            places = (mask.cumsum(1) - 1).clamp(min=0)
            left = model(padded, attention_mask=mask, position_ids=places).logits[:, 6:]
            torch.testing.assert_close(left, before, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids).logits, before)
        assert model.config.to_dict() == config
        assert not any("longctx" in name for m in model.modules() for name in vars(m))


def test_taken_off_or_changed_since_is_said() -> None:
    model = build("llama")
    batch, _ = batches(FullLength())
    packed = packed_attention(model)
    packed.remove()
    with pytest.raises(RunError, match="not on the model any more"):
        packed.inputs(batch)
    with longctx.extend(model, "alibi"):
        packed = packed_attention(model)
    # alibi took its attention along.
    with pytest.raises(RunError, match="call packed_attention"):
        packed.inputs(batch)
    packed.remove()
    assert model.config._attn_implementation == "sdpa"


def test_a_bad_batch_is_refused() -> None:
    model = build("llama")
    batch, _ = batches(FullLength())
    del batch["document_ids"]
    with packed_attention(model) as packed, pytest.raises(DataError, match="document_ids"):
        packed.inputs(batch)


TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


def test_what_cannot_be_kept_apart_is_refused() -> None:
    with pytest.raises(ModelError, match="soft-capped"):
        packed_attention(Gemma2ForCausalLM(Gemma2Config(**TINY)))
    with pytest.raises(ModelError, match=r"attention interface|linear_attention"):
        packed_attention(Qwen3NextForCausalLM(Qwen3NextConfig(**TINY, num_experts=2)))
    with pytest.raises(ModelError, match=r"attention_dropout=0\.1"):
        packed_attention(build("llama", attention_dropout=0.1))
    with pytest.raises(RunError, match="kernel='xformers'"):
        packed_attention(build("llama"), "xformers")  # pyright: ignore[reportArgumentType]
    model = build("llama")
    with (
        longctx.extend(model, "alibi"),
        pytest.raises(ModelError, match="flex_attention would leave out"),
    ):
        packed_attention(model, "flex_attention")


def test_a_window_much_shorter_than_the_document() -> None:
    torch.manual_seed(0)
    length, window = 1200, 100
    q, k, v = (
        torch.randn(1, heads, length, 8, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    )
    numbers = torch.tensor([0] * 1100 + [1] * 60 + [-1] * 40, dtype=torch.int32)
    rule = DocumentAttention(window)
    found = rule(q, k, v, mask=numbers[None, None, None], positions=None, scaling=0.3)
    key, value = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    at = torch.arange(length)
    seen = (at[:, None] >= at) & (at[:, None] - at < window) & (numbers[:, None] == numbers)
    wanted = (0.3 * q @ key.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ value
    assert not found[:, :, 1160:].any()
    real = slice(0, 1160)
    torch.testing.assert_close(found[:, :, real], wanted[:, :, real])
    for one, other in zip(
        torch.autograd.grad(found[:, :, real].sin().sum(), (q, k, v)),
        torch.autograd.grad(wanted[:, :, real].sin().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_masks_are_those_of_the_documents(family: str) -> None:
    model = build(family)
    batch, _ = batches(FullLength())
    with packed_attention(model, "flex_attention") as packed:
        assert model.config._attn_implementation == "flex_attention"
        masks = packed.inputs(batch)["attention_mask"]
    assert model.config._attn_implementation == "sdpa"
    ids = batch["document_ids"]
    size = ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril() & (ids[:, :, None] == ids[:, None])
    wanted = {"full_attention": causal, "sliding_attention": causal.triu(-23)}
    kinds = ["full_attention", "sliding_attention"] if family == "gemma3" else ["full_attention"]
    for kind in kinds:
        mask = masks[kind] if family == "gemma3" else masks
        assert isinstance(mask, BlockMask)
        dense = create_mask(mask.mask_mod, len(ids), 1, size, size, device="cpu")
        assert torch.equal(dense[:, 0], wanted[kind])


def test_flash_attention_gets_the_borders_of_all_documents() -> None:
    batch, _ = batches(FullLength())
    model = build("llama")
    packed = PackedAttention(model, "flash_attention_2")
    packed.undo.append((model.config, "_attn_implementation_internal", "sdpa", "sdpa"))
    inputs = packed.inputs(batch)
    # Row 0: 37, 5, 40. Row 1: 1, 29, and padding up to 82.
    assert inputs["cu_seq_lens_q"].tolist() == [0, 37, 42, 82, 83, 112, 164]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["max_length_k"] == 52
    assert "attention_mask" not in inputs
