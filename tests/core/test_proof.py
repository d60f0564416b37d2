"""A patch is proven by the model's logits, and refused where they speak against it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import longctx
from longctx.errors import LongctxError, MethodError, ModelError
from longctx.model import decoder_of
from longctx.patch import Patch
from longctx.patches.linear import Linear

from ..families import WINDOW, build, tokens
from ..test_matrix import demo_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def granite_swa(**settings: Any) -> PreTrainedModel:
    """It keeps a rotary for each base, and one more that no layer reads."""
    types = ["sliding_attention", "full_attention"]
    settings = {"layer_types": types, "sliding_window": 24} | settings
    return made(transformers.GraniteSWAForCausalLM, transformers.GraniteSWAConfig, **settings)


def two_bases() -> PreTrainedModel:
    """A base for each kind of layer."""
    return granite_swa(layer_rope_theta=[10_000.0, 500_000.0])


def gpt_oss() -> PreTrainedModel:
    """It has sinks, and cos and sin of half the width."""
    more = {"head_dim": 16, "sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1}
    return made(transformers.GptOssForCausalLM, transformers.GptOssConfig, **more)


def made(model: Any, config: Any, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return model(config(**SMALL | settings)).eval()


@pytest.mark.parametrize(
    "method",
    [
        "linear:4",
        "dynamic:4",
        "yarn:4",
        "ntk:4",
        "longrope:factor=4,divisors=[1, 2, 3, 4, 4, 4, 4, 4]",
    ],
)
def test_the_rotary_that_is_read_is_replaced(method: str, tmp_path: Path) -> None:
    """Granite-SWA names its base for each layer too, which a method that changes it must say."""
    model = granite_swa(layer_rope_theta=[10_000.0, 0.0])
    before, config = model(tokens(60)).logits, model.config.to_dict()
    patch = longctx.extend(model, method)
    # Built by transformers from the config alone.
    native = type(model)(copy.deepcopy(model.config)).eval()
    native.load_state_dict(model.state_dict())
    found = model(tokens(200)).logits
    assert torch.equal(found, native(tokens(200)).logits)
    assert longctx.save(model, demo_tokenizer(), tmp_path / "out").plain
    loaded, _ = longctx.load(tmp_path / "out")
    assert torch.equal(loaded(tokens(200)).logits, found)
    for extended in (model, loaded):
        longctx.patch_of(extended).remove()  # pyright: ignore[reportOptionalMemberAccess]
        assert torch.equal(extended(tokens(60)).logits, before)
    assert model.config.rope_parameters == config["rope_parameters"]
    assert model.config.layer_rope_theta == config["layer_rope_theta"]
    assert loaded.config.layer_rope_theta == config["layer_rope_theta"]
    assert not patch.active


@pytest.mark.parametrize(
    ("model", "method", "found"),
    [
        (two_bases, "yarn:4", r"by the bases \[10000.0, 500000.0\]"),
        (gpt_oss, "alibi:4", "attention sinks"),
    ],
)
def test_what_a_family_cannot_serve_is_refused_and_undone(
    model: Any, method: str, found: str
) -> None:
    patched = model()
    before, config = patched(tokens(60)).logits, patched.config.to_dict()
    with pytest.raises(LongctxError, match=found):
        longctx.extend(patched, method, replace=True)
    assert torch.equal(patched(tokens(60)).logits, before)
    assert patched.config.to_dict() == config
    assert longctx.patch_of(patched) is None


@pytest.mark.parametrize(
    "word", ["block_sparse+yarn:2", "dual_chunk:4+log_n", "sink_window:window=32+log_n"]
)
def test_a_method_goes_on_top_of_a_rule_that_counts_consecutive_tokens(word: str) -> None:
    model = build("llama")
    before = model(tokens(100)).logits
    patch = longctx.extend(model, word)
    assert patch.report().ok
    assert "cached as uncached" in {check.name for check in patch.proven}
    patch.remove()
    assert torch.equal(model(tokens(100)).logits, before)


def test_the_report_says_what_was_seen() -> None:
    model = build("llama").train()
    report = longctx.extend(model, "linear", factor=4).report()
    assert {"logits change", "logits finite", "cached as uncached"} <= {
        c.name for c in report.checks
    }
    assert all(module.training for module in model.modules())


def test_it_is_left_out_on_request_and_for_a_model_without_weights() -> None:
    assert longctx.extend(build("llama"), Linear(factor=4), prove_effect=False).proven == ()
    with torch.device("meta"):
        sketch = build("llama")
    sketch.model.rotary_emb = build("llama").model.rotary_emb
    assert longctx.extend(sketch, "linear:4").proven == ()


@dataclass(frozen=True, slots=True)
class Forgetful(Linear):
    """Reads every call as if nothing stood before it."""

    def apply(self, model: PreTrainedModel, patch: Patch) -> None:
        """Take the cache away from the decoder."""
        super(Forgetful, self).apply(model, patch)
        patch.hook(decoder_of(model), _without_cache)


def _without_cache(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    del module
    if kwargs.get("past_key_values") is not None:
        kwargs = {**kwargs, "past_key_values": None, "attention_mask": None}
    return args, kwargs


def test_a_cache_that_gives_other_logits_is_found() -> None:
    with pytest.raises(MethodError, match="cached as uncached"):
        longctx.extend(build("llama"), Forgetful(factor=4))


def test_a_setting_that_changes_nothing_needs_no_change() -> None:
    model, ids = build("llama"), tokens(100)
    before = model(ids).logits
    longctx.extend(model, "linear:1")
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("method", ["alibi:4", "dual_chunk:4", "dynamic:4"])
def test_continuous_batching_is_refused_before_it_starts(method: str) -> None:
    model = build("llama")
    with longctx.extend(model, method), pytest.raises(MethodError, match="continuous batching"):
        model.generate_batch([[3, 4, 5]])
    assert "generate_batch" not in vars(model)


def cohere2() -> PreTrainedModel:
    """Its sliding layers have a rotary, its full ones none."""
    types = ["sliding_attention", "full_attention"]
    more = {"layer_types": types, "sliding_window": 24}
    return made(transformers.Cohere2ForCausalLM, transformers.Cohere2Config, **more)


@pytest.mark.parametrize(
    ("model", "which"),
    [
        (cohere2, "all layers that have a rotary slide over 24 tokens"),
        (lambda: build("mistral", sliding_window=24), "all layers slide over 24 tokens"),
        (lambda: build("gemma3"), None),
        (lambda: build("llama"), None),
    ],
)
def test_where_a_longer_window_cannot_help_the_report_says_so(
    model: Any, which: str | None
) -> None:
    text = str(longctx.extend(model(), "linear:4").report())
    assert (which in text) if which else ("reach" not in text)


def test_layers_that_all_slide_are_named() -> None:
    with pytest.raises(ModelError, match="all layers of this 'gemma3_text' model slide"):
        longctx.extend(build("gemma3", layer_types=["sliding_attention"] * 2), "linear:4")


def gemma4() -> PreTrainedModel:
    """Its heads of full attention have another size, and one function turns q or k."""
    config_class: Any = CONFIG_MAPPING["gemma4_text"]
    config = config_class(
        **SMALL,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def llama4() -> PreTrainedModel:
    """Its rotary gives complex numbers, and its text model is its own decoder."""
    more = {"intermediate_size_mlp": 96, "num_local_experts": 2, "attention_chunk_size": 32}
    return made(transformers.Llama4ForCausalLM, transformers.Llama4TextConfig, head_dim=16, **more)


def deepseek_v2() -> PreTrainedModel:
    """A complex rotary, and values of another size than keys."""
    more = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return made(
        transformers.DeepseekV2ForCausalLM,
        transformers.DeepseekV2Config,
        qk_nope_head_dim=16,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        **more,
        **experts | {"num_key_value_heads": 4},
    )


@pytest.mark.parametrize("method", ["linear:4", "yarn:4", "dynamic:4", "alibi:4"])
@pytest.mark.parametrize("family", [gemma4, llama4, deepseek_v2])
def test_rotaries_of_other_forms_are_served(family: Any, method: str) -> None:
    model, ids = family(), tokens(100)
    before = model(ids).logits
    patch = longctx.extend(model, method, replace=True)
    assert patch.report().ok
    assert not torch.equal(model(ids).logits, before)
    patch.remove()
    assert torch.equal(model(ids).logits, before)
