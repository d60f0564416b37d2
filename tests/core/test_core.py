"""`extend` and its handle: slots, records, and every way to ask for the impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import longctx
from longctx.errors import MethodError, ModelError
from longctx.model import learned_positions, text_config
from longctx.patch import Patch, methods_of
from longctx.patches.linear import Linear
from longctx.patches.yarn import Yarn
from longctx.registry import parse_method, parse_methods

from ..families import WINDOW, build, tokens
from ..test_matrix import demo_tokenizer


def test_the_public_names_are_the_declared_ones() -> None:
    assert sorted(longctx.__all__) == longctx.__all__
    assert all(hasattr(longctx, name) for name in longctx.__all__)


def test_a_name_an_instance_and_a_command_line_word_are_the_same() -> None:
    model, ids = build("llama"), tokens(100)
    results = []
    asks: list[tuple[Any, dict[str, Any]]] = [
        ("yarn", {"factor": 4}),
        (Yarn(4), {}),
        ("yarn:4", {}),
        ("yarn", {"target": 256}),
    ]
    for ask, fields in asks:
        with longctx.extend(model, ask, **fields):
            results.append(model(ids).logits)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("ask", "fields", "message"),
    [
        ("yran", {"factor": 2}, r"unknown method 'yran'; did you mean 'yarn'\? \(available: abf"),
        ("yarn", {"facotr": 2}, r"yarn has no field 'facotr'; did you mean 'factor'\?"),
        ("yarn:2", {"factor": 2}, "not both"),
        ("none", {}, "nothing to extend"),
        ("yarn:2,3", {}, "expected field=value"),
        ("log_n+sink_window", {"sinks": 2}, "not both"),
        ("yarn:2+sink_window:window=999", {}, "sink_window in yarn\\+sink_window: .* ≤ 128"),
        ("yarn:factor=2,factor=8", {}, "'factor' stands twice"),
        ("yarn:1e18", {}, "factor=1e\\+18 is beyond reason"),
        ("yarn:target=10000000000000", {}, "is beyond reason; expected ≤"),
        ("resonance:4,over=5", {}, "5"),
        ("yarn", {"factor": float("nan")}, "factor=nan"),
        ("yarn", {"target": 8}, "target=8 tokens is below the window of 64"),
        (Yarn(2), {"factor": 3}, "set factor on it instead"),
        (Yarn, {}, "expected a method instance"),
        ("yarn", {}, "needs factor="),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    ask: Any, fields: dict[str, Any], message: str
) -> None:
    model, ids = build("llama"), tokens(80)
    before, config = model(ids).logits, model.config.to_dict()
    with pytest.raises(MethodError, match=message):
        longctx.extend(model, ask, **fields)
    assert torch.equal(model(ids).logits, before)
    assert model.config.to_dict() == config
    assert longctx.patch_of(model) is None


def test_several_methods_are_one_patch(tmp_path: Path) -> None:
    model, ids = build("llama"), tokens(150)
    before, config = model(ids).logits, model.config.to_dict()
    with longctx.extend(model, "yarn:2+log_n") as patch:
        assert [method.name for method in methods_of(model)] == ["yarn", "log_n"]
        assert patch.report().ok
        assert str(patch.report()).startswith("Yarn(factor=2")
        assert "LogN(kind='log_n'" in str(patch.report())
        wanted = model(ids).logits
        with pytest.warns(UserWarning, match="log_n cannot be said"):
            longctx.save(model, demo_tokenizer(), tmp_path / "saved")
    assert longctx.patch_of(model) is None
    written = ("architectures", "dtype")  # by saving
    assert {k: v for k, v in model.config.to_dict().items() if config[k] != v}.keys() <= {*written}
    assert torch.equal(model(ids).logits, before)
    loaded: Any = longctx.load(tmp_path / "saved", device="cpu")[0]
    assert methods_of(loaded) == parse_methods("yarn:2+log_n")
    assert torch.equal(loaded(ids).logits, wanted)
    one, other = longctx.extend_all(model, parse_methods("yarn:2+log_n"))
    assert torch.equal(model(ids).logits, wanted)
    other.remove()
    assert longctx.patch_of(model) is one


def test_extending_twice_is_refused_with_the_way_out() -> None:
    model = build("llama")
    longctx.extend(model, "linear", factor=2)
    with pytest.raises(MethodError, match=r"Linear\(factor=2.*patch_of\(model\)\.remove\(\)"):
        longctx.extend(model, "yarn", factor=2)
    patch = longctx.patch_of(model)
    assert patch is not None
    patch.remove()
    longctx.extend(model, "yarn", factor=2)


def test_a_patch_can_be_removed_once() -> None:
    model = build("llama")
    patch = longctx.extend(model, "linear", factor=2)
    patch.remove()
    with pytest.raises(MethodError, match="not on this model any more"):
        patch.remove()
    with pytest.raises(MethodError, match="nothing to report"):
        patch.report()
    with longctx.extend(model, "linear", factor=2) as borrowed:
        borrowed.remove()  # by hand inside the block is fine
    assert longctx.patch_of(model) is None


def test_an_error_in_the_block_still_undoes() -> None:
    model = build("llama")
    with pytest.raises(RuntimeError, match="boom"), longctx.extend(model, "linear", factor=2):
        raise RuntimeError("boom")
    assert longctx.patch_of(model) is None


def scaled(kind: str) -> Any:
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 5000.0, "factor": 2.0}
    if kind != "linear":
        parameters["original_max_position_embeddings"] = WINDOW // 2
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return build("llama", rope_parameters=parameters)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaling_that_a_model_ships_with_is_not_overwritten_unasked(kind: str) -> None:
    model, ids = scaled(kind), tokens(100)
    before = model(ids).logits
    with pytest.raises(MethodError, match=f"ships with '{kind}'.*replace=True.*32 tokens"):
        longctx.extend(model, "ntk_by_parts", factor=8)
    with longctx.extend(model, "ntk_by_parts", factor=8, replace=True) as patch:
        assert patch.rope.length == WINDOW // 2
        assert patch.rope.theta == 5000.0
        assert text_config(model).rope_parameters["rope_theta"] == 5000.0
        assert text_config(model).max_position_embeddings == 256
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


def test_a_model_without_a_reachable_rotary_is_refused_clearly() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    with pytest.raises(ModelError, match=r"'gpt2' has no reachable rotary.*GPT2Model"):
        longctx.extend(model, "yarn", factor=2)
    assert learned_positions(model) == 1024


def test_a_method_that_does_not_take_effect_is_undone() -> None:
    class Idle(Linear):
        """Promises linear and installs nothing."""

        def apply(self, model: PreTrainedModel, patch: Patch) -> None:
            patch.set(text_config(model), "max_position_embeddings", 999)

    model = build("llama")
    with pytest.raises(MethodError, match=r"did not take effect.*inverse frequencies"):
        longctx.extend(model, Idle(4))
    assert text_config(model).max_position_embeddings == WINDOW
    assert longctx.patch_of(model) is None


def test_only_the_full_attention_rotary_of_gemma3_is_extended() -> None:
    model = build("gemma3")
    sliding = dict(text_config(model).rope_parameters["sliding_attention"])
    with longctx.extend(model, "yarn", factor=4):
        parameters = text_config(model).rope_parameters
        assert parameters["sliding_attention"] == sliding
        # Older transformers cannot read yarn there, and gets the same numbers as longrope.
        assert parameters["full_attention"]["rope_type"] in ("yarn", "longrope")
        assert parameters["full_attention"]["original_max_position_embeddings"] == WINDOW


def test_bookkeeping_of_the_window() -> None:
    model = build("llama")
    for method, length in (("yarn:4", 256), ("yarn:target=200", 200), ("dynamic:4", WINDOW)):
        with longctx.extend(model, method):
            found = text_config(model).max_position_embeddings
            assert found == length
            assert type(found) is int
    assert text_config(model).max_position_embeddings == WINDOW


def test_methods_are_read_as_the_command_line_writes_them() -> None:
    assert parse_method("none") is None
    assert parse_method(" linear:8 ") == Linear(8)
    assert parse_method("yarn:factor=4,attention_factor=None") == Yarn(4)
    longrope: Any = parse_method("longrope:2,divisors=[1,1.5,2]")
    assert longrope.divisors == (1, 1.5, 2)
    resonance: Any = parse_method("resonance:2,over=linear")
    assert resonance.over == "linear"


def test_the_report_reads_as_proof() -> None:
    model = build("llama")
    text = str(longctx.extend(model, "yarn", factor=4).report())
    assert "window 64 → 256 tokens" in text
    assert "plain transformers" in text
    assert text.count("ok  ") == 8
    assert "FAIL" not in text
