"""ALiBi: its slopes, and whole models against a hand-written one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

import longctx
from longctx.attention.dispatch import LinearBias
from longctx.attention.hook import ATTRIBUTE
from longctx.errors import MethodError, ModelError
from longctx.model import attention_modules
from longctx.patches.alibi import Alibi, slopes
from longctx.train.parallel.compatibility import trainable_window

from ..families import WINDOW, build, tokens

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "alibi_slopes.json").read_text())
LONG = WINDOW + 40


@pytest.mark.parametrize("heads", [int(key) for key in GOLDEN if key.isdigit()])
def test_slopes_are_the_golden_ones(heads: int) -> None:
    assert slopes(heads) == pytest.approx(GOLDEN[str(heads)], rel=1e-12)


@pytest.mark.parametrize("heads", range(1, 70))
def test_slopes_are_different_and_of_the_right_number(heads: int) -> None:
    found = slopes(heads)
    assert len(set(found)) == len(found) == heads
    assert all(0 < slope < 1 for slope in found)


def by_hand(ids: Tensor) -> Tensor:
    """The LLaMA's logits in float64 with ALiBi written as in the paper, [1, S, vocab]."""
    model = build("llama").double()
    heads, length = model.config.num_attention_heads, ids.shape[1]
    i = torch.arange(length)
    distance = (i[:, None] - i).double()
    bias = -torch.tensor(GOLDEN[str(heads)], dtype=torch.float64)[:, None, None] * distance
    bias = bias.masked_fill(distance < 0, -torch.inf)
    x = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            project(h).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
            for project in (a.q_proj, a.k_proj, a.v_proj)
        )
        k, v = (repeat_kv(x, a.num_key_value_groups) for x in (k, v))
        weights = (q @ k.mT * a.head_dim**-0.5 + bias).softmax(-1)
        x = x + a.o_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def test_a_whole_model_is_the_one_written_by_hand() -> None:
    model, ids = build("llama"), tokens(LONG)
    with torch.no_grad():
        wanted = by_hand(ids)
    with longctx.extend(model, Alibi()):
        found = logits(model, ids)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_documents_equal_each_alone(family: str) -> None:
    model = build(family)
    documents = [tokens(n, seed=n)[0] for n in (40, 1, 30)]
    packed: Any = DataCollatorWithFlattening(return_tensors="pt")(
        [{"input_ids": document.tolist()} for document in documents]
    )
    with longctx.extend(model, Alibi()):
        ids, positions = packed["input_ids"], packed["position_ids"]
        whole = logits(model, ids, position_ids=positions, use_cache=False)
        with pytest.raises(ModelError, match="use_cache=False"):
            logits(model, ids, position_ids=positions)
        alone = torch.cat([logits(model, document[None]) for document in documents], dim=1)
    assert (whole - alone).abs().max() < 2e-5 * alone.abs().max()


def test_skipped_positions_are_greater_distances() -> None:
    model, ids = build("llama"), tokens(50)
    skipped = (torch.arange(50) + 30 * (torch.arange(50) >= 20))[None]
    everything = torch.ones(1, 50, dtype=torch.long)
    with longctx.extend(model, Alibi()):
        consecutive = logits(model, ids)
        jumped = logits(model, ids, attention_mask=everything, position_ids=skipped)
        shifted = logits(model, ids, position_ids=torch.arange(50)[None] + 1000)
    assert (jumped - consecutive)[:, :20].abs().max() < 1e-4
    assert (jumped - consecutive)[:, 20:].abs().max() > 1e-2
    assert torch.equal(shifted, consecutive)


def test_casting_leaves_the_slopes_alone() -> None:
    model = build("llama")
    longctx.extend(model, Alibi())
    model.to(torch.float16)
    for _, module, _ in attention_modules(model):
        rule = getattr(module, ATTRIBUTE)
        assert rule == LinearBias(slopes(4))


def test_only_full_attention_layers_of_gemma3() -> None:
    model = build("gemma3")
    with longctx.extend(model, Alibi()):
        for _, module, kind in attention_modules(model):
            assert hasattr(module, ATTRIBUTE) == (kind == "full_attention")
    assert not any(hasattr(module, ATTRIBUTE) for _, module, _ in attention_modules(model))


def test_the_attention_in_use_is_put_back_and_another_is_noticed() -> None:
    model = build("llama")
    config: Any = model.config
    before = config._attn_implementation
    patch = longctx.extend(model, Alibi(factor=4))
    assert model.config.max_position_embeddings == 4 * WINDOW
    model.set_attn_implementation("sdpa")
    failed = [check.name for check in patch.report().checks if not check.ok]
    assert failed == ["attention in use"]
    patch.remove()
    assert config._attn_implementation == before
    assert model.config.max_position_embeddings == WINDOW


def test_soft_capped_attention_is_refused() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = Gemma2ForCausalLM(config)
    with pytest.raises(ModelError, match="frequencies work"):
        longctx.extend(model, Alibi())
    assert not any(hasattr(module, ATTRIBUTE) for module in model.modules())


def test_training_with_attention_dropout_is_refused() -> None:
    model = build("llama", attention_dropout=0.1)
    with longctx.extend(model, Alibi()):
        assert logits(model.eval(), tokens(8)).isfinite().all()
        with pytest.raises(ModelError, match="attention_dropout = 0"):
            model.train()(tokens(8))


def test_a_plain_config_cannot_say_it_and_any_length_may_be_trained_on() -> None:
    assert not Alibi.plain_loadable
    assert trainable_window(build("llama")) == WINDOW
    model = build("llama")
    longctx.extend(model, Alibi())
    assert trainable_window(model) is None


def test_a_window_below_the_original_is_refused() -> None:
    with pytest.raises(MethodError, match="shrink"):
        Alibi(factor=0.5)
    with pytest.raises(MethodError, match="pass one"):
        Alibi(factor=2, target=100)
