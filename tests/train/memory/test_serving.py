"""The cost to serve: bytes as transformers' caches have them, FLOPs as torch counts them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GPT2Config,
    MambaConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

import longctx
from longctx.cli.main import main
from longctx.errors import MethodError, ModelError, RunError
from longctx.train.memory.kv_cache import KvCache
from longctx.train.memory.machine import measure_machine
from longctx.train.memory.serving import ServingPlan, ServingSettings, plan_serving

from ...families import VOCABULARY, WINDOW, build, tokens

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}


def tiny(family: str) -> Any:
    """A small model of a family, random."""
    torch.manual_seed(0)
    if family == "mixtral":
        config: Any = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
        return MixtralForCausalLM(config).eval()
    if family == "deepseek_v3":
        config = DeepseekV3Config(**SIZES, **LATENT, q_lora_rank=16, n_group=1, topk_group=1)
        return DeepseekV3ForCausalLM(config).eval()
    if family == "deepseek_v2":
        config = DeepseekV2Config(**SIZES, **LATENT, q_lora_rank=None)
        return DeepseekV2ForCausalLM(config).eval()
    if family == "sliding mistral":
        return build("mistral", sliding_window=16)
    return build(family)


def planned(model: Any, **fields: Any) -> ServingPlan:
    """The plan of a model's config, in float32."""
    settings: dict[str, Any] = {"dtype": "float32", **fields}
    return plan_serving(model.config, ServingSettings(**settings))


def held(model: Any, *pieces: int) -> int:
    """Bytes that the cache holds once the model has read so many tokens, piece by piece."""
    cache: Any = DynamicCache(config=model.config)
    ids, done = tokens(sum(pieces)), 0
    with torch.no_grad():
        for piece in pieces:
            model(ids[:, done : done + piece], past_key_values=cache, use_cache=True)
            done += piece
    parts = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in parts)


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "qwen3", "gemma3", "phi3", "glm", "smollm3", "olmo2"),
        *("sliding mistral", "mixtral", "deepseek_v2", "deepseek_v3"),
    ],
)
def test_bytes_are_those_of_transformers(family: str) -> None:
    model = tiny(family)
    found = planned(model)
    assert found.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    for pieces in ((1,), (9,), (30,), (40, 1, 1)):
        assert found.cache_bytes(sum(pieces)) == held(model, *pieces)
    half = planned(model, cache_dtype="float8")
    assert 4 * half.cache_bytes(30) == found.cache_bytes(30)
    assert half.weight_bytes == found.weight_bytes


def test_a_method_may_bound_the_cache() -> None:
    model, method = build("llama"), "sink_window:sinks=2,window=10"
    found = planned(model, method=method)
    with longctx.extend(model, method):
        for pieces in ((9,), (11, 1, 1, 1, 1), (5, *[1] * 20)):
            assert found.cache_bytes(sum(pieces)) == held(model, *pieces)
    assert found.longest(4) == math.inf
    assert found.cache.growth == 0
    stacked = planned(model, method="yarn:2+sink_window:sinks=2")
    with longctx.extend(model, "yarn:2+sink_window:sinks=2"):
        for pieces in ((100,), (127, 1, 1), (140, 1)):
            assert stacked.cache_bytes(sum(pieces)) == held(model, *pieces)
    assert planned(model, method="yarn:2+dual_chunk:factor=4").length == 8 * WINDOW
    every = planned(model, method=f"{method},evict=False")
    assert every.cache_bytes(50) == planned(model, method="yarn:2").cache_bytes(50)
    with pytest.raises(MethodError, match="unknown method"):
        planned(model, method="sink")
    with pytest.raises(MethodError, match="sinks \\+ window"):
        planned(model, method="sink_window:window=100")


def test_fewer_heads_are_what_convert_makes_of_them() -> None:
    model = build("llama")
    made = longctx.convert(model, "multi_query:1", calibration=tokens(40, batch=2)).model
    assert planned(made).cache_bytes(40) == held(made, 40)
    table = planned(model, batch_size=3).heads_table(model.config)
    assert table is not None
    assert [*table.columns[0].cells] == ["2 (as it is)", "1"]
    assert [*table.columns[1].cells] == ["512", "256"]
    assert planned(made).heads_table(made.config) is None
    assert planned(tiny("deepseek_v3")).heads_table(tiny("deepseek_v3").config) is None


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flops_are_those_that_torch_counts(family: str) -> None:
    """With the upper triangle, which a causal kernel leaves out, and weights that only add."""
    model, size = build(family), 40
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(size), use_cache=False, logits_to_keep=1)
    found = planned(model)
    widths = sum(width for width, _ in found.attention)
    unseen = 2 * widths * (size * size - size * (size + 1) // 2)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    counted = counter.get_total_flops() - unseen + 2 * size * norms
    assert found.prefill_flops(size) == counted


def test_a_step_reads_weights_once_and_each_cache() -> None:
    model = build("llama")  # its head is not its embedding
    found = planned(model, bandwidth=2.0, tflops=0.5)
    table = 4 * VOCABULARY * 64
    assert found.step_bytes(30) == found.weight_bytes - table + found.cache_bytes(30)
    assert found.step_bytes(30, 5) - found.step_bytes(30, 2) == 3 * found.cache_bytes(30)
    assert found.tokens_per_second(30, 5) == 5 * 2e9 / found.step_bytes(30, 5)
    assert found.time_to_first_token(30, 2) == 2 * found.prefill_flops(30) / 0.5e12
    tied = planned(build("llama", tie_word_embeddings=True))
    assert tied.step_bytes(30) == found.step_bytes(30)
    assert tied.weight_bytes == found.weight_bytes - table
    sliding = planned(tiny("sliding mistral"))
    assert sliding.step_bytes(50) == sliding.step_bytes(16)  # the window, the token's own in it
    mixture = planned(tiny("mixtral"))
    experts = 4 * 2 * 4 * 3 * 64 * 96
    assert mixture.step_bytes(9, 4) - mixture.step_bytes(9, 1) == (
        experts // 2 + 3 * mixture.cache_bytes(9)
    )
    with pytest.raises(RunError, match="--bandwidth"):
        tied.tokens_per_second(9)
    with pytest.raises(RunError, match="--tflops"):
        tied.time_to_first_token(9)


def test_the_longest_row_is_the_last_that_fits() -> None:
    model = build("gemma3")
    room = 5 * 2**20
    found = planned(model, memory=1.5 + room / 2**30)
    for batch in (1, 7):
        longest = int(found.longest(batch))
        assert found.total_bytes(longest, batch) <= room < found.total_bytes(longest + 1, batch)
    assert planned(model, memory=1.5 + 2**-20).longest(1) == 0
    assert not planned(model, memory=1.5 + 2**-20).fits
    assert found.fits


def test_what_is_not_known_is_refused() -> None:
    positions = GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)
    assert KvCache.of(positions).growth == 64  # learned ones, and keys and values like others
    with pytest.raises(ModelError, match="'mamba' keeps a LinearAttentionLayer"):
        KvCache.of(MambaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=96))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_length": 0}, "max_length=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"memory": 1.0}, "memory=1.0, reserve=1.5"),
        ({"bandwidth": 0.0}, "bandwidth=0.0"),
        ({"tflops": math.inf}, "tflops=inf"),
        ({"dtype": "int4"}, "dtype='int4'"),
    ]
    for fields, said in wrong:
        with pytest.raises(RunError, match=said):
            ServingSettings(**fields)
    made = longctx.convert(
        build("llama"), "linear_attention:window=8,steps=0", calibration=tokens(20)
    )
    with pytest.raises(ModelError, match="made by linear_attention"):
        planned(made.model)


def test_a_machine_is_measured() -> None:
    machine = measure_machine("cpu", torch.float32)
    assert 0 < machine.bandwidth < 1e5
    assert 0 < machine.tflops < 1e4
    assert "measured on" in str(machine)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "demo", "--serve", "--device", "cpu"]
    assert main([*given, "--batch-size", "3", "--max-length", "1024", "--bandwidth", "10"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 rows of 1,024 tokens" in shown
    assert "as given" in shown
    assert "The model's window is 256 tokens" in shown
    assert "2 (as it is) 2,048" in shown
    assert main([*given, "--memory", "1.501"]) == 1
    for options, said in (
        (["plan", "demo"], "--max-length is missing"),
        (["plan", "demo", "--max-length", "9", "--measure"], "--measure is for --serve"),
        ([*given, "--lora-r", "3"], "--lora-r is for training"),
        ([*given, "--method", "rope:3"], "unknown method 'rope'"),
        (["plan", "nowhere/at/all", "--serve"], "nowhere/at/all does not exist"),
    ):
        capsys.readouterr()
        assert main(options) == 2
        assert said in capsys.readouterr().err
