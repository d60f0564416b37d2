"""Adapters: what is trained, and that nothing of it is lost on the way to disk, back and merged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedModel,
)

import longctx
from longctx.errors import ModelError, RunError
from longctx.scoring.token_scores import score
from longctx.train.engine.lora import Lora, add_lora, load_adapter, merged, save_adapter
from longctx.train.loss.cross_entropy import Head, cross_entropy, head_of, projection

from ...families import VOCABULARY, WINDOW, build, tokens
from ...test_matrix import demo_tokenizer

LONG = WINDOW + 40
KINDS = {
    "lora": Lora(r=4),
    "norms": Lora(r=4, norms=True),
    "embeddings": Lora(r=4, embeddings=True),
    "longlora": Lora(r=4, alpha=4, embeddings=True, norms=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(LONG) if ids is None else ids).logits


def train(model: Any, steps: int = 3) -> None:
    """A few real steps, after which each trained weight has moved."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        ids = tokens(LONG, batch=2, seed=step)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(p, was) for p, was in zip(trained, before, strict=True))


def trained(kind: str, method: str = "yarn", tied: bool = True) -> PeftModel:
    base = build("qwen3", tie_word_embeddings=tied)
    longctx.extend(base, method, factor=4)
    model = add_lora(base, KINDS[kind])
    train(model)
    return model


def assert_tied(model: Any, tied: bool) -> None:
    """The head and the embeddings in use are one storage, or are not."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings.data_ptr() == head.data_ptr()) == tied


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@every_kind
@pytest.mark.parametrize("method", ["yarn", "linear"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_adapters_on_a_fresh_base_are_the_model(
    kind: str, method: str, tied: bool, tmp_path: Path
) -> None:
    model = trained(kind, method, tied)
    patch = longctx.patch_of(model.get_base_model())  # pyright: ignore[reportArgumentType]
    assert patch is not None
    wanted = logits(model)
    untrained = build("qwen3", tie_word_embeddings=tied)
    longctx.extend(untrained, method, factor=4)
    assert (wanted - logits(untrained)).abs().max() > 0.1
    save_adapter(model, tmp_path / "adapter")
    for base in (untrained, build("qwen3", tie_word_embeddings=tied)):
        again = load_adapter(base, tmp_path / "adapter")
        assert not again.training
        assert torch.equal(logits(again), wanted)
        assert_tied(again, tied)
        restored = longctx.patch_of(again.get_base_model())  # pyright: ignore[reportArgumentType]
        assert restored is not None
        assert restored.method == patch.method
        train(again, steps=1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@every_kind
@pytest.mark.parametrize("tied", [True, False])
def test_plain_peft_serves_the_folder(kind: str, tied: bool, tmp_path: Path) -> None:
    """The base by transformers under the config beside the adapters, these by peft."""
    build("qwen3", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = trained(kind, tied=tied)
    save_adapter(model, tmp_path / "adapter")
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=config)
    served = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), torch_device="cpu")
    assert torch.equal(logits(served), logits(model))
    with pytest.raises(OSError, match="no file named"):  # and not the unextended model
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


@every_kind
@pytest.mark.parametrize("method", ["yarn", "linear"])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_is_a_plain_model_with_the_same_logits(
    kind: str, method: str, tied: bool, tmp_path: Path
) -> None:
    model = trained(kind, method, tied)
    base: Any = model.get_base_model()
    patch, wanted = longctx.patch_of(base), logits(model)
    plain: Any = merged(model)
    assert_near(logits(plain), wanted)
    assert plain is base
    assert patch is not None
    assert longctx.patch_of(plain) is patch
    assert patch.report().ok
    native = build("qwen3", tie_word_embeddings=tied)
    assert set(plain.state_dict()) == set(native.state_dict())
    assert all(p.requires_grad for p in plain.parameters())
    assert_tied(plain, tied)
    longctx.save(plain, demo_tokenizer(), tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(plain))
    assert again.config.tie_word_embeddings == tied
    assert_tied(again, tied)
    patch.remove()
    assert (logits(plain) - wanted).abs().max() > 1e-3
    assert str(plain) == str(native)
    add_lora(plain, Lora())  # nothing of the first is left


def test_the_embedded_model_stays_tied(tmp_path: Path) -> None:
    base, tokenizer = longctx.load("demo", device="cpu")
    assert_tied(base, True)
    longctx.extend(base, "linear", factor=4)
    model = add_lora(base, KINDS["longlora"])
    train(model)
    ids = tokens(500)
    wanted = logits(model, ids)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(longctx.load("demo", device="cpu")[0], tmp_path / "adapter")
    assert torch.equal(logits(again, ids), wanted)
    plain = merged(again)
    assert_near(logits(plain, ids), wanted)
    longctx.save(plain, tokenizer, tmp_path / "out")
    loaded, _ = longctx.load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(loaded, ids), logits(plain, ids))
    for each in (again, plain, loaded):
        assert_tied(each, True)


NORMS = {  # by hand: hidden size 64, heads of 16, two layers
    "llama": 2 * 2 * 64 + 64,
    "qwen3": 2 * (2 * 64 + 2 * 16) + 64,
    "gemma3": 2 * (4 * 64 + 2 * 16) + 64,
    "olmo2": 2 * (2 * 64 + 64 + 32) + 64,
}


@every_kind
@pytest.mark.parametrize("family", NORMS)
def test_as_many_weights_are_trained_as_the_formula_says(family: str, kind: str) -> None:
    lora = KINDS[kind]
    model = add_lora(build(family), lora)
    # q and o are 64 → 64, k and v 64 → 32: rank · (in + out) each
    wanted = 2 * lora.r * (2 * 128 + 2 * 96)
    wanted += lora.norms * NORMS[family] + lora.embeddings * VOCABULARY * 64
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted


@every_kind
def test_adapters_begin_as_nothing_from_a_seed_of_their_own(kind: str) -> None:
    ids, before = tokens(LONG), logits(build("llama"))
    state = torch.get_rng_state()
    models = [add_lora(build("llama"), KINDS[kind], seed=seed) for seed in (0, 0, 1)]
    torch.manual_seed(0)  # which build does as well
    build("llama")
    after_build = torch.get_rng_state()
    torch.set_rng_state(state)
    add_lora(build("llama"), KINDS[kind], seed=3)
    assert torch.equal(torch.get_rng_state(), after_build)
    weights = [
        torch.cat([p.flatten() for n, p in m.named_parameters() if "lora_A" in n]) for m in models
    ]
    assert torch.equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).all()
    assert all(torch.equal(logits(model, ids), before) for model in models)


@every_kind
@pytest.mark.parametrize("tied", [True, False])
def test_the_chunked_loss_and_scores_know_the_model(kind: str, tied: bool) -> None:
    model: Any = trained(kind, tied=tied).train()
    ids = tokens(LONG)
    assert head_of(model) == head_of(model.get_base_model()) == Head()
    assert model.training
    linear = projection(model)
    assert linear.weight.shape == (VOCABULARY, 64)
    assert_tied(model, tied)
    hidden = model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state
    loss = cross_entropy(hidden[0, :-1], linear.weight, ids[0, 1:]) / (LONG - 1)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(found)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5)
    for training in (True, False):
        scores = score(model.train(training), ids)
        assert model.training == training
        nats = functional.cross_entropy(logits(model)[0, :-1], ids[0, 1:], reduction="none")
        torch.testing.assert_close(scores.nll[0], nats, rtol=1e-5, atol=1e-5)
        model.train(training)


def test_half_precision_weights_have_float32_adapters(tmp_path: Path) -> None:
    base = build("llama", tie_word_embeddings=True).to(torch.bfloat16)
    model: Any = add_lora(base, KINDS["longlora"])
    types = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert types == {torch.float32}
    train(model)
    save_adapter(model, tmp_path / "adapter")
    fresh = build("llama", tie_word_embeddings=True).to(torch.bfloat16)
    assert torch.equal(logits(load_adapter(fresh, tmp_path / "adapter")), logits(model))


def test_targets_that_a_model_lacks_are_named() -> None:
    phi3 = build("phi3")
    with pytest.raises(RunError) as caught:
        add_lora(phi3, Lora(target_modules=("q_proj", "o_proj")))
    said = str(caught.value)
    assert "'phi3' has no linear layer 'q_proj' below its head" in said
    assert "(it has down_proj, gate_up_proj, o_proj, qkv_proj)" in said
    add_lora(phi3, Lora(target_modules=("qkv_proj", "down_proj")))
    with pytest.raises(RunError, match="no linear layer 'lm_head' below its head"):
        add_lora(build("llama"), Lora(target_modules=("q_proj", "lm_head")))
    with pytest.raises(RunError, match="did you mean 'up_proj'"):
        add_lora(build("llama"), Lora(target_modules=("up_porj",)))


def test_embeddings_that_peft_would_untie_are_refused() -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    falcon: Any = FalconForCausalLM(FalconConfig(vocab_size=96, **sizes))
    assert_tied(falcon, True)
    with pytest.raises(ModelError, match=r"'transformer\.word_embeddings'.*embeddings=False"):
        add_lora(falcon, Lora(target_modules=("query_key_value",), embeddings=True))
    add_lora(falcon, Lora(target_modules=("query_key_value",), norms=True))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, r"r=2\.5"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"target_modules": "q_proj"}, "target_modules='q_proj'"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RunError, match=said):
        Lora(**fields)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(trained("norms"), tmp_path / "adapter")
    return tmp_path / "adapter"


def other_base(what: str) -> PreTrainedModel:
    if what == "method":
        model = build("qwen3", tie_word_embeddings=True)
        longctx.extend(model, "linear", factor=4)
        return model
    if what == "factor":
        model = build("qwen3", tie_word_embeddings=True)
        longctx.extend(model, "yarn", factor=8)
        return model
    changes: dict[str, Any] = {"window": {"max_position_embeddings": 128}, "size": {"head_dim": 32}}
    return build("qwen3", tie_word_embeddings=True, **changes[what])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("method", r"under Yarn\(factor=4.* the model is under Linear\(factor=4"),
        ("factor", r"factor=4.*factor=8.*patch_of\(model\)\.remove\(\)"),
        ("window", "'max_position_embeddings': 64.* this one has .*128"),
        ("size", "do not fit Qwen3ForCausalLM"),
    ],
)
def test_another_base_or_method_is_refused(what: str, said: str, adapter: Path) -> None:
    with pytest.raises(ModelError, match=f"(?s){said}"):
        load_adapter(other_base(what), adapter)


def test_a_base_under_a_method_is_refused_by_adapters_trained_without(tmp_path: Path) -> None:
    model = add_lora(build("llama"), Lora())
    save_adapter(model, tmp_path / "adapter")
    base = build("llama")
    patch = longctx.extend(base, "yarn", factor=4)
    with pytest.raises(ModelError, match="trained under no method, the model is under"):
        load_adapter(base, tmp_path / "adapter")
    patch.remove()
    assert torch.equal(logits(load_adapter(base, tmp_path / "adapter")), logits(model))


def test_adapters_by_others_take_the_base_as_it_is(adapter: Path) -> None:
    wanted = logits(load_adapter(build("qwen3", tie_word_embeddings=True), adapter))
    (adapter / "config.json").unlink()
    base = build("qwen3", tie_word_embeddings=True)
    longctx.extend(base, "yarn", factor=4)
    assert torch.equal(logits(load_adapter(base, adapter)), wanted)


def test_an_incomplete_adapter_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    for name in ("lora_B", "q_norm"):
        dropped = next(key for key in weights if name in key)
        save_file({k: v for k, v in weights.items() if k != dropped}, file)
        with pytest.raises(ModelError, match=f"do not fit.*{name}"):
            load_adapter(build("qwen3", tie_word_embeddings=True), adapter)
    file.write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="do not fit"):
        load_adapter(build("qwen3", tie_word_embeddings=True), adapter)
    file.unlink()
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(build("qwen3", tie_word_embeddings=True), adapter)


def test_a_second_set_of_adapters_is_refused(adapter: Path) -> None:
    base = build("qwen3", tie_word_embeddings=True)
    model = load_adapter(base, adapter)
    for again in (model, base):
        with pytest.raises(ModelError, match="has adapters already"):
            add_lora(again, Lora())  # pyright: ignore[reportArgumentType]
        with pytest.raises(ModelError, match="has adapters already"):
            load_adapter(again, adapter)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RunError, match="exists and is not empty"):
        save_adapter(model, adapter)
    save_adapter(model, adapter, overwrite=True)


def test_no_peft_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match=r"pip install 'longctx-toolkit\[train\]'"):
        add_lora(build("llama"), Lora())
