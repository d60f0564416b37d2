"""Fewer key/value heads: turning heads is exact, averaging is the paper's, and it loads plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import longctx
from longctx.errors import DataError, MethodError, ModelError
from longctx.model import evaluating
from longctx.patches._kv_heads import (
    Planes,
    align,
    aligned_weights,
    grouped,
    head_layers,
    planes_in,
    residual,
)
from longctx.patches.multi_query import MultiQuery, read_heads
from longctx.prompts.haystacks import Texts

from ..families import build, tokens
from ..test_matrix import assert_same, demo_tokenizer, logits

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "cohere", "glm", "smollm3")
READ = tokens(60, batch=4, seed=3)


def test_planes_that_rope_turns_are_those_of_the_family() -> None:
    halves = planes_in(build("llama"), head_layers(build("llama"), "x")[0])
    assert halves is not None
    assert halves.first.tolist() == list(range(8))
    assert halves.second.tolist() == list(range(8, 16))
    neighbours = planes_in(build("cohere"), head_layers(build("cohere"), "x")[0])
    assert neighbours is not None
    assert neighbours.second.tolist() == list(range(1, 16, 2))
    partial = planes_in(build("glm"), head_layers(build("glm"), "x")[0])
    assert partial is not None
    assert partial.free.tolist() == list(range(16, 32))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_aligning_alone_leaves_the_logits(family: str, kv_heads: int) -> None:
    """Heads are turned and change places, and none is averaged yet."""
    model = build(family, num_key_value_heads=kv_heads)
    for name, parameter in model.named_parameters():  # biases and norms that do something
        if name.endswith("bias") or "_norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    ids, wanted = tokens(60, batch=2), logits(model, tokens(60, batch=2))

    def turn(layer: Any, keys: Tensor, values: Tensor) -> None:
        planes = None if layer.normed else planes_in(model, layer)
        alignment = align(keys, values, 1, planes)
        assert not torch.equal(alignment.values[0], alignment.values[-1])
        found[layer.index] = aligned_weights(layer, alignment)

    found: dict[int, dict[str, Tensor]] = {}
    layers = head_layers(model, "multi_query")
    with evaluating(model), torch.no_grad():
        read_heads(model, layers, READ, turn)
        for layer in layers:
            layer.module.load_state_dict(found[layer.index], strict=False)
    assert_same(logits(model, ids), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_loads_plainly(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = longctx.convert(model, MultiQuery(1), calibration=READ)
    report = made.report()
    assert report.ok
    assert not report.exact
    assert report.cache[0] == 2 * report.cache[1]
    assert made.model.config.num_key_value_heads == 1
    assert model.config.num_key_value_heads == 2
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert longctx.save(made.model, demo_tokenizer(), tmp_path / "out").plain
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = tokens(60, batch=2)
    assert torch.equal(logits(plain.eval(), ids), logits(made.model, ids))


def test_heads_that_say_the_same_in_other_words_are_joined_without_loss() -> None:
    """The second head is the first one turned: averaging loses nothing once they are aligned."""
    model = build("llama", num_key_value_heads=2)
    layers = head_layers(model, "x")
    planes = planes_in(model, layers[0])
    assert planes is not None
    torch.manual_seed(1)
    for layer in layers:
        with torch.no_grad():
            rotation = torch.linalg.qr(torch.randn(16, 16))[0]
            phase = torch.polar(torch.ones(8), 6 * torch.rand(8))[:, None]
            k, v = layer.module.k_proj.weight, layer.module.v_proj.weight
            turned = torch.complex(k[:8], k[8:16]) * phase
            k[16:] = torch.cat([turned.real, turned.imag])
            v[16:] = rotation @ v[:16]
    wanted = logits(model, tokens(60))
    made = longctx.convert(model, MultiQuery(1), calibration=READ)
    assert_same(logits(made.model, tokens(60)), wanted)
    assert made.report().exact
    plainly = longctx.convert(model, MultiQuery(1, align=False), calibration=READ)
    assert not plainly.report().exact


def test_without_alignment_it_is_the_mean_of_neighbours() -> None:
    model = build("qwen2", num_key_value_heads=4)
    made = longctx.convert(model, MultiQuery(2, align=False), calibration=READ).model
    for old, new in zip(model.model.layers, made.model.layers, strict=True):
        for name in ("k_proj", "v_proj"):
            for key in ("weight", "bias"):
                was = getattr(getattr(old.self_attn, name), key)
                mean = rearrange(was, "(n s d) ... -> n s d ...", s=2, d=16).mean(1)
                found = getattr(getattr(new.self_attn, name), key)
                torch.testing.assert_close(found, mean.flatten(0, 1))
        assert torch.equal(old.self_attn.q_proj.weight, new.self_attn.q_proj.weight)


def test_alike_heads_make_a_group() -> None:
    one, other = torch.randn(2, 50, 16, dtype=torch.float64).unbind()
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    keys = torch.stack([one, other, other, one])
    values = torch.stack([one, other, other @ rotation, one @ rotation])
    planes = Planes(torch.arange(8), torch.arange(8, 16), torch.arange(0))
    alignment = align(keys, values, 2, planes)
    assert alignment.order == (0, 3, 1, 2)
    assert residual(values, alignment.values, [[0, 3], [1, 2]]) < 1e-12
    likeness = torch.eye(6)
    likeness[0, 5] = likeness[5, 0] = likeness[2, 3] = likeness[3, 2] = 0.5
    assert grouped(likeness, 3) == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize("heads", [1, 4])
def test_heads_that_say_nothing_are_joined_too(heads: int) -> None:
    model = build("llama", num_key_value_heads=4)
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.data[: 16 * heads] = 0
    report = longctx.convert(model, MultiQuery(2), calibration=READ).report()
    assert "nan" not in str(report)
    assert ("keys 0%" in str(report)) == (heads == 4)


def test_a_model_of_one_group_for_each_head_is_refused_by_what_there_is() -> None:
    model = build("llama", num_key_value_heads=4)
    for kv_heads in (3, 4, 8):
        with pytest.raises(MethodError, match=rf"kv_heads={kv_heads} and .* 4: .* \(1, 2\)"):
            longctx.convert(model, MultiQuery(kv_heads), calibration=READ)
    for wrong in (0, True, 1.5):
        with pytest.raises(MethodError, match="kv_heads="):
            MultiQuery(wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("family", "what"),
    [("phi3", "no linear q_proj, k_proj, v_proj"), ("olmo2", "a norm over all of its heads")],
)
def test_families_without_the_structure_are_refused_by_it(family: str, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        longctx.convert(build(family), MultiQuery(1), calibration=READ)


def test_what_convert_refuses(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(MethodError, match=r"reads text .* pass the model's tokenizer="):
        longctx.convert(model, MultiQuery(1))
    with pytest.raises(DataError, match="float32"):
        longctx.convert(model, MultiQuery(1), calibration=READ.float())
    with pytest.raises(DataError, match="ids from 500 to 500"):
        longctx.convert(model, MultiQuery(1), calibration=torch.full((1, 9), 500))
    with pytest.raises(DataError, match="'few' has"):
        few = Texts(("1 2 3",), name="few")
        longctx.convert(model, MultiQuery(1), tokenizer=demo_tokenizer(), calibration=few)
    with pytest.raises(MethodError, match="longctx extend MODEL OUT --method yarn"):
        longctx.convert(model, "yarn:4")
    with pytest.raises(MethodError, match=r"`longctx\.extend` puts that one on"):
        longctx.convert(model, longctx.parse_method("yarn:4"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(MethodError, match="longctx convert MODEL OUT --to multi_query"):
        longctx.extend(model, "multi_query:1")
    with pytest.raises(MethodError, match="longctx convert MODEL OUT --to multi_query"):
        longctx.extend(model, MultiQuery(1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(MethodError, match="did you mean 'multi_query'"):
        longctx.convert(model, "multi_qery:1")
    with longctx.extend(model, "yarn:2") as patch, pytest.raises(MethodError, match="yarn is on"):
        assert patch.active
        longctx.convert(model, MultiQuery(1), calibration=READ)
    longctx.save(model, demo_tokenizer(), tmp_path / "base")
    loaded, tokenizer = longctx.load(tmp_path / "base")
    made = longctx.convert(loaded, MultiQuery(1), calibration=READ)
    with pytest.raises(longctx.RunError, match="is or holds the input"):
        longctx.save(made.model, tokenizer, tmp_path / "base", overwrite=True)
    with pytest.raises(MethodError, match="which is not undone"):
        made.remove()
    assert longctx.patch_of(made.model) is None


def test_a_cache_that_fails_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise IndexError("no such layer")

    monkeypatch.setattr("longctx.converting.DynamicCache.update", failing)
    with pytest.raises(IndexError, match="no such layer"):
        longctx.convert(build("llama"), MultiQuery(1), calibration=READ)


def test_biases_in_float64_lose_nothing() -> None:
    """Many heads and a bias on all projections, in double precision."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, head_dim=8,
        num_attention_heads=8, num_key_value_heads=8, attention_bias=True, initializer_range=0.2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    report = longctx.convert(model, MultiQuery(2), calibration=READ).report()
    aligned = next(c for c in report.checks if c.name.startswith("heads aligned"))
    assert float(aligned.detail.split()[3]) < 1e-6  # logits are compared in float32
