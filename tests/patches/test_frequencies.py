"""Formulas against golden values from transformers, and against the naive form written out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import longctx
from longctx.errors import MethodError
from longctx.patches.abf import Abf
from longctx.patches.dynamic import Dynamic
from longctx.patches.linear import Linear
from longctx.patches.longrope import LongRope
from longctx.patches.ntk import Ntk
from longctx.patches.ntk_by_parts import NtkByParts
from longctx.patches.resonance import Resonance
from longctx.patches.yarn import Yarn
from longctx.registry import make_method, method_class
from longctx.rope import Rope

from ..families import build
from ..test_matrix import settings

CASES = json.loads((Path(__file__).parents[1] / "golden/inv_freq.json").read_text())["cases"]
ROPE = Rope(dim=128, theta=10_000.0, length=4096)


def relative(actual: torch.Tensor, wanted: Any) -> float:
    return (actual / torch.as_tensor(wanted, dtype=torch.float64) - 1).abs().max().item()


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['method']}-{c.get('factor', 1):g}-{c['rope_theta']:g}"
)
def test_golden_values(case: dict[str, Any]) -> None:
    rope = Rope(case["head_dim"], case["rope_theta"], case["original_length"])
    if case["method"] == "default":
        assert relative(rope.inv_freq(), case["inv_freq"]) < 1e-6
        return
    found = make_method(case["method"], {"factor": case["factor"]}).frequencies(rope)  # pyright: ignore[reportAttributeAccessIssue]
    assert relative(found.inv_freq, case["inv_freq"]) < 1e-6
    assert found.attention_scaling == pytest.approx(case["attention_scaling"], rel=1e-9)


def test_ntk_reaches_the_factor_in_the_last_plane_and_one_in_the_first() -> None:
    stretch = ROPE.inv_freq() / Ntk(8).frequencies(ROPE).inv_freq
    assert stretch[0].item() == 1.0
    assert stretch[-1].item() == pytest.approx(8.0, rel=1e-12)


def test_linear_is_longchats_condensed_position() -> None:
    condensed = torch.arange(100, dtype=torch.float64)[:, None] / 8 * ROPE.inv_freq()
    ours = torch.arange(100, dtype=torch.float64)[:, None] * Linear(8).frequencies(ROPE).inv_freq
    torch.testing.assert_close(ours, condensed, rtol=1e-14, atol=0)


def test_by_parts_is_the_ramp_written_plane_by_plane() -> None:
    s, low, high = 4.0, 20, 46  # ⌊128·ln(4096/64π)/(2 ln 1e4)⌋ and ⌈128·ln(4096/2π)/(2 ln 1e4)⌉
    wanted = []
    for plane in range(64):
        theta = 10_000.0 ** (-2 * plane / 128)
        kept = 1 - min(max((plane - low) / (high - low), 0.0), 1.0)
        wanted.append((1 - kept) * theta / s + kept * theta)
    assert relative(NtkByParts(4).frequencies(ROPE).inv_freq, wanted) < 1e-12
    assert torch.equal(NtkByParts(4).frequencies(ROPE).inv_freq, Yarn(4).frequencies(ROPE).inv_freq)


def test_by_parts_agrees_with_the_paper_at_the_ends_and_differs_between() -> None:
    """The paper's ramp is linear in turns; ours, as in every implementation, in the index."""
    own = ROPE.inv_freq()
    turns = ROPE.length * own / (2 * math.pi)
    gamma = ((turns - 1) / 31).clamp(0, 1)
    paper = (1 - gamma) * own / 4 + gamma * own
    ours = NtkByParts(4).frequencies(ROPE).inv_freq
    ratio = ours / paper
    assert torch.allclose(ratio[:20], torch.ones(20, dtype=torch.float64))
    assert torch.allclose(ratio[46:], torch.ones(18, dtype=torch.float64))
    assert 0.3 < (ratio - 1).abs().max().item() < 0.75


def test_yarn_temperature() -> None:
    assert Yarn(16).attention_scaling(ROPE) == pytest.approx(0.1 * math.log(16) + 1)
    assert Yarn(16, attention_factor=1.5).frequencies(ROPE).attention_scaling == 1.5


def test_longrope_divides_each_plane() -> None:
    divisors = [1 + plane / 10 for plane in range(64)]
    found = LongRope(factor=8, divisors=divisors).frequencies(ROPE)
    for plane in (0, 1, 31, 63):
        naive = 10_000.0 ** (-2 * plane / 128) / divisors[plane]
        assert found.inv_freq[plane].item() == pytest.approx(naive, rel=1e-12)
    assert found.attention_scaling == pytest.approx(math.sqrt(1 + math.log(8) / math.log(4096)))


def test_abf_is_a_base() -> None:
    assert relative(Abf(factor=4, theta=1e6).frequencies(ROPE).inv_freq, ROPE.inv_freq(1e6)) == 0


def test_resonant_wavelengths_are_whole() -> None:
    found = Resonance(4).frequencies(ROPE)
    wavelengths = 2 * math.pi / found.inv_freq
    assert (wavelengths - wavelengths.round()).abs().max() < 1e-9
    yarn = 2 * math.pi / Yarn(4).frequencies(ROPE).inv_freq
    assert (wavelengths - yarn).abs().max() <= 0.5 + 1e-9
    assert found.attention_scaling == Yarn(4).frequencies(ROPE).attention_scaling


@pytest.mark.parametrize("length", [100, 4096, 6000, 20_000])
def test_dynamic_is_that_of_transformers_and_ntk_at_factor_one(length: int) -> None:
    config = LlamaConfig(
        head_dim=128,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=length)
    assert relative(Dynamic(2).frequencies(ROPE, length).inv_freq, theirs) < 1e-5
    ntk = Ntk(max(length / 4096, 1)).frequencies(ROPE).inv_freq
    assert relative(Dynamic(1).frequencies(ROPE, length).inv_freq, ntk) < 1e-12


@pytest.mark.parametrize("name", ["linear", "ntk", "abf"])
def test_neutral_settings_that_round_nothing(name: str) -> None:
    neutral = method_class(name).example(ROPE).neutral(ROPE)
    assert torch.equal(neutral.frequencies(ROPE).inv_freq, ROPE.inv_freq())


@pytest.mark.parametrize("name", [n for n in longctx.available() if n != "dynamic"])
def test_every_static_method_reaches_a_config_class_that_takes_longrope_only(name: str) -> None:
    with longctx.extend(build("phi3"), settings(name)) as patch:
        assert patch.report().ok


@pytest.mark.parametrize("name", ["linear", "ntk", "ntk_by_parts", "yarn", "llama3", "dynamic"])
@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf, 0.5, True, "8"])
def test_impossible_factors_are_refused(name: str, factor: object) -> None:
    with pytest.raises(MethodError, match=f"{name}: factor="):
        make_method(name, {"factor": factor})


def test_extents_that_contradict_the_window_are_refused() -> None:
    with pytest.raises(MethodError, match="target=2048 tokens is below the window of 4096"):
        Yarn(target=2048).frequencies(ROPE)
    with pytest.raises(MethodError, match="pass one"):
        Yarn(factor=2, target=8192)
    with pytest.raises(MethodError, match="needs factor="):
        Yarn().frequencies(ROPE)
    with pytest.raises(MethodError, match="whole number"):
        Linear(target=8192.5)  # pyright: ignore[reportArgumentType]
    assert relative(Linear(target=8192).frequencies(ROPE).inv_freq, ROPE.inv_freq() / 2) == 0


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("yarn", {"beta_fast": 1, "beta_slow": 32}, "beta_fast=1 must be larger"),
        ("yarn", {"attention_factor": -1.0}, "attention_factor=-1.0"),
        ("llama3", {"low_freq_factor": 4.0, "high_freq_factor": 1.0}, "high_freq_factor=1"),
        ("abf", {"theta": math.nan}, "theta=nan"),
        ("longrope", {"divisors": [1.0, 0.5]}, "below the one before"),
        ("longrope", {"divisors": [1.0, "x"]}, r"divisors\[1\]='x'"),
        ("longrope", {"divisors": "1,2"}, "list of numbers"),
        ("longrope", {"divisors": b"12345678"}, "list of numbers"),
        ("longrope", {"divisors": [10**400, 1]}, "must be a finite number"),
        ("yarn", {"beta_slow": 10**400}, "must be a finite number"),
        ("abf", {"theta": 10**400}, "must be a finite number"),
        ("drop", {"coefficient": 10**400}, "must be a finite number"),
        ("resonance", {"over": "dynamic"}, "over=.dynamic."),
        ("resonance", {"over": "yran"}, "did you mean 'yarn'"),
    ],
)
def test_impossible_fields_are_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make_method(name, {"factor": 4, **fields})


def test_longrope_wants_one_divisor_a_plane() -> None:
    with pytest.raises(MethodError, match=r"each of the model's 64 planes; got 3"):
        LongRope(factor=2, divisors=[1, 2, 3]).frequencies(ROPE)
