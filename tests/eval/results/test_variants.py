"""Methods as a sweep sees them: named, tried out, and taken off again."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import MambaConfig, MambaForCausalLM

import longctx
from longctx.errors import MethodError, RunError
from longctx.eval.results.variants import label, original_window, variants_of
from longctx.fingerprint import model_digest
from longctx.patches.abf import Abf
from longctx.patches.longrope import LongRope
from longctx.patches.yarn import Yarn

from ..conftest import WINDOW


def test_methods_are_written_as_the_command_line_reads_them() -> None:
    for method in (Yarn(factor=8), Yarn(target=4096, beta_fast=16.0), Yarn(factor=2.5), Abf(1e6)):
        assert longctx.parse_method(label(method)) == method
    assert label(Yarn(factor=8.0)) == "yarn:8"
    assert label(None) == "none"


def test_each_method_is_tried_and_leaves_no_trace(model: Any) -> None:
    before = model_digest(model)
    found = variants_of(model, ["none", "yarn:4", "dynamic:2", Abf(theta=1e6)], replace=False)
    assert model_digest(model) == before
    assert [(v.label, v.factor, v.window, v.length_invariant) for v in found] == [
        ("none", None, WINDOW, True),
        ("yarn:4", 4.0, 4 * WINDOW, True),
        ("dynamic:2", 2.0, 2 * WINDOW, False),
        ("abf:theta=1000000.0", None, found[3].window, True),
    ]
    assert found[0].record() is None
    record = found[1].record()
    assert record is not None
    assert (record["name"], record["factor"], record["target"]) == ("yarn", 4.0, None)


def test_a_patched_model_is_itself_a_variant(model: Any) -> None:
    with longctx.extend(model, "dynamic", factor=4.0):
        (variant,) = variants_of(model, None, replace=False)
        assert (variant.label, variant.factor, variant.window) == ("dynamic:4", 4.0, 4 * WINDOW)
        assert not variant.length_invariant
        assert original_window(model) == WINDOW
        with pytest.raises(MethodError, match="already on this model"):
            variants_of(model, ["yarn:2"], replace=False)


def test_the_checkpoint_own_scaling_counts(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not variants_of(model, None, replace=False)[0].length_invariant


def test_models_without_rotary_are_variants_too() -> None:
    config = MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1)
    model = MambaForCausalLM(config)
    (variant,) = variants_of(model, ["none"], replace=False)
    assert (variant.window, variant.length_invariant) == (None, True)
    assert original_window(model) is None
    with pytest.raises(longctx.ModelError, match="no reachable rotary"):
        variants_of(model, ["yarn:2"], replace=False)


def test_what_cannot_be_swept_fails_before_any_work(model: Any) -> None:
    with pytest.raises(RunError, match="'yarn:2' is asked for twice"):
        variants_of(model, ["yarn:2", Yarn(factor=2)], replace=False)
    with pytest.raises(MethodError, match="did you mean 'yarn'"):
        variants_of(model, ["yarm:2"], replace=False)


def test_methods_on_top_of_each_other_are_one_variant(model: Any) -> None:
    before = model_digest(model)
    stacked, yarn = variants_of(model, ["yarn:2+dual_chunk:factor=2", "yarn:2"], replace=False)
    assert model_digest(model) == before
    assert (stacked.label, stacked.factor) == ("yarn:2 + dual_chunk:2", 4.0)
    assert stacked.window == 4 * WINDOW
    record = stacked.record()
    assert record is not None
    assert [one["name"] for one in record["methods"]] == ["yarn", "dual_chunk"]
    assert record["effect"] != yarn.effect
    with pytest.raises(MethodError, match="yarn holds the rotary slot already"):
        variants_of(model, ["yarn:2+linear:2"], replace=False)
    assert model_digest(model) == before


def test_a_long_list_is_a_digest_in_a_label() -> None:
    one, other = (LongRope(factor=2, divisors=(1.0,) * 7 + (last,)) for last in (2.0, 3.0))
    assert label(one).startswith("longrope:2,divisors=8@")
    assert label(one) != label(other)
