"""Digests follow content, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import longctx
from longctx.errors import ModelError
from longctx.eval import Perplexity, sweep
from longctx.eval.results.variants import variants_of
from longctx.fingerprint import effect_digest, json_digest, model_digest, tokenizer_digest
from longctx.patches import resonance
from longctx.rope import Frequencies

from ...families import build
from ..conftest import byte_model, byte_tokenizer


def test_a_model_is_known_by_config_and_weights() -> None:
    model: Any = byte_model()
    digest = model_digest(model)
    assert digest == model_digest(byte_model())
    assert digest != model_digest(byte_model(seed=1))
    model.name_or_path = "elsewhere"
    assert digest == model_digest(model)
    with longctx.extend(model, "yarn", factor=2.0):
        assert digest != model_digest(model)
    assert digest == model_digest(model)
    assert digest != model_digest(model.to(torch.bfloat16))
    trained: Any = byte_model()
    with torch.no_grad():
        trained.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    assert digest != model_digest(trained)
    pruned: Any = byte_model()
    with torch.no_grad():
        pruned.model.layers[0].mlp.down_proj.weight[17, 23] = 0
    assert digest != model_digest(pruned)


def test_buffers_that_are_saved_count_as_weights() -> None:
    model: Any = byte_model()
    layer = model.model.layers[0].mlp.up_proj
    plain = model_digest(model)
    layer.register_buffer("scratch", torch.arange(4), persistent=False)
    assert model_digest(model) == plain
    layer.register_buffer("qweight", torch.arange(4))
    quantised = model_digest(model)
    layer.qweight[3] = 7
    assert len({plain, quantised, model_digest(model)}) == 3


def test_a_model_under_a_device_map_is_known_and_measured_as_in_one_place(
    tmp_path: Path, texts: tuple[str, ...]
) -> None:
    byte_model().save_pretrained(tmp_path / "model")
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "model")
    names = ("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb")
    places = {"model.layers.0": "disk"} | dict.fromkeys(names, "cpu")
    spread = load(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert any(p.is_meta for p in spread.parameters())
    assert model_digest(spread) == model_digest(model)

    def values(model: Any) -> list[float]:
        task = Perplexity(last=64, windows=2, text=texts)
        how: dict[str, Any] = {"methods": ["none", "yarn:2"], "progress": False}
        found = sweep(model, byte_tokenizer(), [task], (300, 600), **how)
        return [row.value for row in found.rows]

    assert values(spread) == values(model)
    empty: Any = byte_model()
    with pytest.raises(ModelError, match="has no values"):
        model_digest(empty.to("meta"))


def test_a_method_is_known_by_what_it_puts_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def effects(*methods: str) -> list[str]:
        return [variant.effect for variant in variants_of(byte_model(), methods, replace=False)]

    found = effects("resonance:4", "ntk:8", "yarn:4", "alibi", "dynamic:4")
    assert len(set(found)) == 5
    assert found == effects("resonance:4", "ntk:8", "yarn:4", "alibi", "dynamic:4")
    formula = resonance.Resonance.frequencies
    monkeypatch.setattr(
        resonance.Resonance,
        "frequencies",
        lambda self, rope: Frequencies(formula(self, rope).inv_freq / 2),
    )
    assert effects("resonance:4") != found[:1], (
        "results of the old formula are not those of the new one"
    )


@pytest.mark.parametrize(
    ("method", "rotary", "prefix", "rule"),
    [
        ("yarn:4", "ScaledRotary", "native.", None),
        (
            "alibi",
            "IdentityRotary",
            "native.",
            "LinearBias(slopes=(0.25, 0.0625, 0.015625, 0.00390625))",
        ),
    ],
)
def test_the_effect_is_recorded_as_results_files_have_it(
    method: str, rotary: str, prefix: str, rule: str | None
) -> None:
    """Another digest of the same effect would compute known results again."""
    model: Any = build("llama")
    longctx.extend(model, method)
    native = model.model.rotary_emb.native
    buffers = [
        (prefix + name, getattr(native, name).double().tolist())
        for name in ("inv_freq", "original_inv_freq")
    ]
    assert effect_digest(model) == json_digest([rotary, buffers, None, [(rule, 0.25)] * 2])


def test_a_tokenizer_is_known_by_its_rules() -> None:
    tokenizer = byte_tokenizer()
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert digest == tokenizer_digest(tokenizer) == tokenizer_digest(byte_tokenizer())
    assert digest != tokenizer_digest(byte_tokenizer(bos=False))
    tokenizer.chat_template = "{{ messages }}"  # is told apart by itself
    assert digest == tokenizer_digest(tokenizer)


def test_json_digests_do_not_depend_on_the_order() -> None:
    assert json_digest({"a": 1, "b": (2,)}) == json_digest({"b": [2], "a": 1})
    assert json_digest([1, 2]) != json_digest([2, 1])
