"""The rotary that is put in place: exact, cheap, and float32 whatever happens to the model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import longctx
from longctx.model import rope_of, rotary_of
from longctx.patches._frequency import FrequencyMethod
from longctx.registry import method_class
from longctx.rope import Frequencies, Rope, phase_error, phase_tolerance

from ..families import WINDOW, build, tokens
from ..test_matrix import FAMILIES, settings


class Operators(TorchDispatchMode):
    """Writes down every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


STATIC = [n for n in longctx.available() if issubclass(method_class(n), FrequencyMethod)]


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frequency_method_runs_the_operators_of_the_native_model(family: str, name: str) -> None:
    model, ids = build(family), tokens(100)
    with torch.no_grad(), Operators() as native:
        model(ids)
    with longctx.extend(model, settings(name)), torch.no_grad(), Operators() as patched:
        model(ids)
    assert patched.names == native.names
    assert len(native.names) > 50


def test_geometry_is_read_from_the_model() -> None:
    assert rope_of(build("llama")) == Rope(16, 10_000.0, WINDOW)
    assert rope_of(build("gemma3")).layer_type == "full_attention"
    theta = {"rope_type": "default", "rope_theta": 123.0}
    assert rope_of(build("qwen3", rope_parameters=theta)).theta == 123.0


@pytest.mark.parametrize("name", ["yarn", "dynamic", "alibi"])
def test_what_people_read_off_a_rotary_is_there(name: str) -> None:
    model = build("llama")
    with longctx.extend(model, name, factor=4):
        rotary: Any = model.model.rotary_emb
        scaling = 0.1 * math.log(4) + 1 if name == "yarn" else 1.0
        assert rotary.attention_scaling == pytest.approx(scaling)
        assert rotary.inv_freq.shape == (8,)
        assert bool(rotary.inv_freq.any()) == (name != "alibi")
        assert rotary.config is model.config
        assert not hasattr(rotary, "no_such_thing")
        copied = copy.deepcopy(model).model.rotary_emb
        assert torch.equal(copied.inv_freq, rotary.inv_freq)
    gemma = build("gemma3")
    with longctx.extend(gemma, name, factor=4):
        rotary = gemma.model.rotary_emb
        assert bool(rotary.full_attention_inv_freq.any()) == (name != "alibi")
        assert rotary.sliding_attention_inv_freq.any()


def test_frequencies_of_another_design_are_refused() -> None:
    model = build("llama")
    rotary_of(model).inv_freq = torch.linspace(1, 0.1, 8)
    with pytest.raises(longctx.ModelError, match="does not follow"):
        longctx.extend(model, "yarn", factor=2)


def test_a_model_that_was_cast_is_still_understood() -> None:
    model = build("llama").to(torch.bfloat16)
    assert rotary_of(model).inv_freq.dtype == torch.bfloat16
    assert longctx.extend(model, "linear", factor=2).report().ok


@pytest.mark.parametrize("position", [0, 1000, 131_071])
def test_the_phase_check_tells_float32_from_bfloat16(position: int) -> None:
    rope = Rope(64, 500_000.0, 8192)
    parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    model = build("llama", head_dim=64, rope_parameters=parameters)
    wanted = Frequencies(rope.inv_freq())
    assert phase_error(rotary_of(model), rope, wanted, position) < phase_tolerance(position)
    model.to(torch.bfloat16)
    if position:
        assert phase_error(rotary_of(model), rope, wanted, position) > phase_tolerance(position)
