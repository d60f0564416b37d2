"""Windows in chosen layers: the original under that mask, native, saved, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import longctx
from longctx.attention.layers import attention_layers
from longctx.errors import MethodError, ModelError
from longctx.patches.sliding_window import SlidingWindow
from longctx.serving.engines import checkpoint_of, readings

from ..families import build, tokens
from ..test_matrix import assert_same, demo_tokenizer, logits

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
IDS = tokens(60, batch=2)


def masked(model: Any, window: int, kept: tuple[int, ...], ids: Tensor) -> Tensor:
    """The original's logits with a mask of our own in every layer that is to slide."""
    model.set_attn_implementation("eager")
    where = torch.arange(ids.shape[1])
    seen = where[:, None] - where[None, :]
    mask = torch.where((seen >= 0) & (seen < window), 0.0, -torch.inf)[None, None]

    def slide(module: Any, arguments: Any, settings: dict[str, Any]) -> Any:
        return arguments, {**settings, "attention_mask": mask}

    hooks = [
        layer.module.register_forward_pre_hook(slide, with_kwargs=True)
        for layer in attention_layers(model)
        if layer.index not in kept
    ]
    found = logits(model, ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_original_under_that_mask_and_loads_plainly(family: str, tmp_path: Path) -> None:
    model = build(family)
    made = longctx.convert(model, SlidingWindow(window=8, keep=(1,)))
    wanted = masked(model, 8, (1,), IDS)
    assert_same(logits(made.model, IDS), wanted)
    assert not torch.allclose(wanted, logits(model, IDS), atol=1e-2)
    assert made.report().ok
    one = made.report().cache[0] // 2  # of two layers alike
    assert made.report().cache == (2 * one, one)
    assert made.report().bounded == (0, 7 * one)
    saved = longctx.save(made.model, demo_tokenizer(), tmp_path / "out")
    assert saved.plain
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same(logits(plain.eval(), IDS), wanted)
    with torch.no_grad():
        cache: Any = DynamicCache(config=plain.config)
        pieces = [
            plain(IDS[:, a:b], past_key_values=cache).logits
            for a, b in ((0, 20), (20, 21), (21, 60))
        ]
    assert_same(torch.cat(pieces, dim=1), wanted)
    held = {layer.keys.shape[2] for layer in cache.layers}
    assert held == {7, 60}


def test_the_original_keeps_its_weights_and_ties_stay_ties() -> None:
    model = build("llama", tie_word_embeddings=True)
    made = longctx.convert(model, "sliding_window:8,keep=0").model
    assert made.lm_head.weight is made.model.embed_tokens.weight
    with torch.no_grad():
        made.model.norm.weight.add_(1)
    assert not torch.equal(made.model.norm.weight, model.model.norm.weight)


def test_kept_layers_are_those_that_find_keys() -> None:
    model, tokenizer = longctx.load("demo")
    made = longctx.convert(model, "sliding_window:64,keep=auto:1", tokenizer=tokenizer)
    kinds = made.model.config.layer_types
    assert kinds.count("full_attention") == 1
    found = next(check for check in made.report().checks if check.detail.startswith("sees all"))
    assert found.name == f"layer {kinds.index('full_attention')}"
    lost = [c.detail for c in made.report().checks if c.name.startswith("layer ")]
    nats = [float(detail.split("keys lose ")[1].split()[0]) for detail in lost]
    assert max(nats) == nats[kinds.index("full_attention")] > 1
    with pytest.raises(MethodError, match="pass the model's tokenizer"):
        longctx.convert(model, "sliding_window:64,keep=auto:1")
    settings: dict[str, Any] = {"tokenizer": tokenizer}
    with pytest.raises(MethodError, match="pass texts"):
        longctx.convert(model, "sliding_window:64,keep=auto:1", calibration=IDS, **settings)
    with pytest.raises(MethodError, match="costs the keys of 256 tokens nothing"):
        longctx.convert(model, "sliding_window:250,keep=auto:1", **settings)


def test_a_window_is_never_called_exact_and_other_classes_are_refused() -> None:
    model = build("llama").bfloat16()
    made = longctx.convert(model, "sliding_window:40,keep=1")
    assert not made.report().exact
    with pytest.raises(ModelError, match="load it by longctx"):
        longctx.convert(model.model, "sliding_window:8,keep=1")


def test_scaled_rope_is_carried_over() -> None:
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = build("llama", rope_parameters=scaled)
    made = longctx.convert(model, "sliding_window:8,keep=1").model
    assert made.config.rope_parameters == model.config.rope_parameters
    assert_same(logits(made, IDS), masked(model, 8, (1,), IDS))


def test_what_comes_of_it_can_be_extended(tmp_path: Path) -> None:
    made = longctx.convert(build("llama"), "sliding_window:8,keep=1").model
    longctx.extend(made, "yarn", factor=2)
    assert longctx.save(made, demo_tokenizer(), tmp_path / "out").plain
    again, _ = longctx.load(tmp_path / "out")
    assert_same(logits(again, IDS), logits(made, IDS))


@pytest.mark.parametrize(
    ("family", "changes", "method", "said"),
    [
        ("llama", {}, "sliding_window:64,keep=1", "expected fewer"),
        ("llama", {}, "sliding_window:8,keep=(0,1)", "leaves no layer to change"),
        ("llama", {}, "sliding_window:8,keep=2", "layer 2 is not one of full attention"),
        ("llama", {}, "sliding_window:1,keep=1", "expected 2 tokens or more"),
        ("llama", {}, "sliding_window:8,keep=auto:0", "how many are to be chosen"),
        ("llama", {"attention_bias": True}, "sliding_window:8,keep=1", "has no place"),
        ("mistral", {"sliding_window": 16}, "sliding_window:8,keep=()", "slide over 16 tokens"),
        ("gemma3", {}, "sliding_window:8,keep=1", "'gemma3_text' is not one of those"),
        ("phi3", {}, "sliding_window:8,keep=1", "'phi3' is not one of those"),
    ],
)
def test_what_does_not_fit_is_refused(
    family: str, changes: dict[str, Any], method: str, said: str
) -> None:
    with pytest.raises((MethodError, ModelError), match=said):
        longctx.convert(build(family, **changes), method)


def test_no_engine_is_said_to_read_windows_that_was_not_seen_to() -> None:
    for family in ("llama", "qwen2", "qwen3"):
        made = longctx.convert(build(family), "sliding_window:8,keep=1").model
        said = {r.engine: r.does for r in readings(checkpoint_of(made.config.to_dict()))}
        assert said.pop("transformers") == "reads"
        measured = "reads" if family == "llama" else "unmeasured"
        assert said.pop("vllm") == measured
        assert "reads" not in said.values()
        longctx.extend(made, "yarn", factor=2)
        said = {r.engine: r.does for r in readings(checkpoint_of(made.config.to_dict()))}
        assert said["vllm"] == "unmeasured"
