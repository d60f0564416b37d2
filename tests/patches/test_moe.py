"""Experts out of dense models: exact at the start, native, trainable, and refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import longctx
from longctx.errors import MethodError, ModelError
from longctx.patches.moe import Moe
from longctx.train.engine.loss_forward import LossForward
from longctx.train.loss.load_balance import LoadBalance, expert_load
from longctx.train.loss.objective import Losses

from ..families import build, tokens
from ..test_matrix import assert_same, demo_tokenizer, logits

BECOMES = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
}
IDS = tokens(60, batch=2)


@pytest.mark.parametrize("family", BECOMES)
def test_it_starts_as_the_dense_model_and_loads_plainly(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = longctx.convert(model, Moe(experts=4, active=2))
    assert made.model.config.model_type == BECOMES[family]
    assert made.report().ok
    assert made.report().exact
    assert_same(logits(made.model, IDS), logits(model, IDS))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert made.report().cache[0] == made.report().cache[1]
    assert made.report().parameters[1] == sum(p.numel() for p in made.model.parameters())
    assert longctx.save(made.model, demo_tokenizer(), tmp_path / "out").plain
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same(logits(plain.eval(), IDS), logits(model, IDS))


def test_what_comes_of_it_can_be_extended(tmp_path: Path) -> None:
    made = longctx.convert(build("llama"), "moe", experts=2, active=1).model
    longctx.extend(made, "yarn", factor=2)
    longctx.save(made, demo_tokenizer(), tmp_path / "out")
    again, _ = longctx.load(tmp_path / "out")
    assert_same(logits(again, IDS), logits(made, IDS))


def test_scaled_rope_windows_and_ties_are_carried_over() -> None:
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = build("llama", rope_parameters=scaled, tie_word_embeddings=True)
    made = longctx.convert(model, Moe(experts=2)).model
    assert made.config.rope_parameters == model.config.rope_parameters
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert_same(logits(made, IDS), logits(model, IDS))
    sliding = build("mistral", sliding_window=16)
    made = longctx.convert(sliding, Moe(experts=2)).model
    assert_same(logits(made, IDS), logits(sliding, IDS))


@pytest.mark.parametrize(
    ("family", "becomes", "full", "kept"),
    [
        ("mistral", "qwen2_moe", None, False),
        ("qwen2", "auto", 1, True),
        ("qwen3", "auto", 1, False),
        ("qwen3", "auto", 0, True),
    ],
)
def test_windows_longer_than_the_proof_are_carried_over_or_refused(
    family: str, becomes: Any, full: int | None, kept: bool
) -> None:
    qwen = {} if full is None else {"use_sliding_window": True, "max_window_layers": full}
    model = build(family, sliding_window=100, **qwen)
    if not kept:
        with pytest.raises(ModelError, match=r"see the last .*100 tokens, and those of"):
            longctx.convert(model, Moe(experts=2, family=becomes))
        return
    made = longctx.convert(model, Moe(experts=2, family=becomes)).model
    ids = tokens(160)
    assert_same(logits(made, ids), logits(model, ids))


def test_a_few_updates_part_the_experts_and_balance_the_load() -> None:
    made = longctx.convert(build("llama"), Moe(experts=4, active=2)).model.train()
    ids = tokens(64, batch=4, seed=1)
    count = torch.tensor([4 * 63])
    loss_forward = LossForward.on(made, Losses(load_balance=LoadBalance(0.05)))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    found: list[float] = []
    for _ in range(20):
        loss: Any = made(input_ids=ids, labels=ids, count=count)
        loss.backward()
        found.append(loss.item())
        assert made.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
    loss_forward.remove()
    assert found[-1] < 0.9 * found[0]
    first, second = made.model.layers[0].mlp.experts.down_proj[:2]
    assert not torch.equal(first, second)
    routed: Any = made.eval()(input_ids=ids, output_router_logits=True)
    shares = [expert_load(x, 2) for x in routed.router_logits]
    assert all(0.05 < float(share.min()) <= float(share.max()) < 0.5 for share in shares)


def test_the_loss_of_one_layer_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    one = torch.randn(40, 4)
    real = torch.arange(40) < 30
    for mask, theirs in ((None, None), (real, real[None].int())):
        wanted: Any = load_balancing_loss_func((one,), 4, 2, theirs)
        assert torch.allclose(LoadBalance()([one], 2, mask), wanted)
    even = LoadBalance()([torch.zeros(40, 4) + torch.eye(4).repeat(10, 1) * 1e-6], 1)
    assert even.item() == pytest.approx(1, rel=1e-3)
    # Over all layers together one layer's collapse hides behind the other's.
    left = torch.tensor([9.0, 9, 0, 0]).expand(40, 4)
    both: Any = (left, left.flip(1))
    hidden: Any = load_balancing_loss_func(both, 4, 2)
    assert hidden.item() == pytest.approx(2, rel=1e-3)
    assert LoadBalance()(both, 2).item() == pytest.approx(4, rel=1e-3)


def test_what_is_refused() -> None:
    mixture = longctx.convert(build("llama"), Moe(experts=2)).model
    with pytest.raises(ModelError, match="a mixture of experts already"):
        longctx.convert(mixture, Moe(experts=2))
    with pytest.raises(ModelError, match="'phi3' has gate_up_proj, down_proj"):
        longctx.convert(build("phi3"), Moe())
    with pytest.raises(ModelError, match="model type 'gemma3_text' could become"):
        longctx.convert(build("gemma3"), Moe())
    with pytest.raises(ModelError, match=r"q_norm\.weight is missing"):
        longctx.convert(build("llama"), Moe(family="qwen3_moe"))
    with pytest.raises(ModelError, match="logits of the original"):  # layers without a rotary
        longctx.convert(build("smollm3"), Moe(family="mixtral"))
    with pytest.raises(MethodError, match="active=3 of experts=2"):
        Moe(experts=2, active=3)
    with pytest.raises(MethodError, match="experts=1: expected 2 or more"):
        Moe(experts=1)
    with pytest.raises(MethodError, match="seed=9223372036854775808: expected less"):
        Moe(seed=2**63)
    with pytest.raises(MethodError, match="family='x'"):
        Moe(family="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(MethodError, match="moe reads no text"):
        longctx.convert(build("llama"), Moe(), calibration=tokens(8))
    with pytest.raises(ModelError, match="load balancing is for mixtures"):
        LossForward.on(build("llama"), Losses(load_balance=LoadBalance()))
