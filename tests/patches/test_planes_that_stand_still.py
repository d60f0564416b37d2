"""p_rope, cope and drop: against transformers, their papers' code, and the formulas written out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import longctx
from longctx.errors import MethodError
from longctx.model import rotary_of
from longctx.patches.cope import Cope
from longctx.patches.drop import Drop
from longctx.patches.p_rope import PRope
from longctx.registry import make_method
from longctx.rope import STANDSTILL, Rope, frequencies_of

from ..families import WINDOW, build, tokens
from ..test_matrix import assert_same, logits

ROPE = Rope(dim=128, theta=10_000.0, length=4096)
LLAMA3 = Rope(dim=128, theta=500_000.0, length=8192)
LONG = 104


def saved_rope(model: Any, folder: Path) -> dict[str, Any]:
    """What `config.json` says of RoPE, if every number in it is finite."""
    model.save_pretrained(folder)
    text = (folder / "config.json").read_text()
    config = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in config.json"))
    return config["rope_parameters"]


@pytest.mark.parametrize("p", [0.02, 0.25, 0.29, 0.5, 0.75, 1.0])
def test_p_rope_is_the_proportional_rope_of_transformers(p: float) -> None:
    entry = {"rope_type": "proportional", "rope_theta": 10_000.0, "partial_rotary_factor": p}
    config = LlamaConfig(head_dim=128, max_position_embeddings=4096, rope_parameters=entry)
    theirs, scaling = ROPE_INIT_FUNCTIONS["proportional"](config, torch.device("cpu"))
    ours = PRope(p=p).frequencies(ROPE)
    torch.testing.assert_close(ours.inv_freq, theirs.double(), rtol=1e-6, atol=0)
    assert ours.attention_scaling == scaling == 1.0


def test_p_rope_stops_the_slowest_planes_and_leaves_the_others_alone() -> None:
    found = PRope(p=0.75).frequencies(ROPE).inv_freq.tolist()
    for plane in range(48):
        assert found[plane] == pytest.approx(10_000.0 ** (-2 * plane / 128), rel=1e-12)
    assert found[48:] == [0.0] * 16


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_p_rope_is_saved_in_the_words_of_transformers(family: str, tmp_path: Path) -> None:
    model = build(family)
    with longctx.extend(model, "p_rope", factor=4, p=0.5):
        entry = saved_rope(model, tmp_path)
        entry = entry.get("full_attention", entry)
        assert entry == {
            "rope_type": "proportional",
            "rope_theta": entry["rope_theta"],
            "partial_rotary_factor": 0.5,
        }
        inv_freq, _ = frequencies_of(
            rotary_of(model), "full_attention" if family == "gemma3" else None
        )
        assert inv_freq[:4].all()
        assert not inv_freq[4:].any()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert plain.config.max_position_embeddings == 4 * WINDOW
        ids = tokens(LONG)
        assert torch.equal(logits(plain, ids), logits(model, ids))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_p_rope_on_a_model_with_a_partial_rotary_of_its_own_is_longrope(share: float) -> None:
    """`partial_rotary_factor` cannot say both; transformers would leave the head's share out."""
    rope = Rope(dim=8, theta=10_000.0, length=WINDOW, partial_rotary_factor=share)
    entry = PRope(p=0.5).native_rope(rope)
    assert (entry["rope_type"], entry["partial_rotary_factor"]) == ("longrope", share)
    wanted = [1.0, 1.0, 1e-2 / STANDSTILL, 1e-3 / STANDSTILL]
    assert entry["long_factor"] == pytest.approx(wanted)


def test_p_rope_on_a_config_class_that_takes_longrope_only() -> None:
    model, twin, ids = build("phi3"), build("phi3"), tokens(LONG)
    inv_freq, _ = frequencies_of(rotary_of(twin), None)
    inv_freq[4:] = 0.0
    with longctx.extend(model, "p_rope", factor=4, p=0.5):
        assert model.config.rope_parameters["rope_type"] == "longrope"
        assert_same(logits(model, ids), logits(twin, ids))


def test_a_model_that_ships_proportional_rope_is_understood() -> None:
    entry = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model, twin, ids = build("llama", rope_parameters=entry), build("llama"), tokens(LONG)
    with (
        longctx.extend(model, "yarn", factor=4, replace=True) as patch,
        longctx.extend(twin, "yarn", factor=4),
    ):
        assert patch.report().ok
        assert model.config.rope_parameters == twin.config.rope_parameters
        assert torch.equal(logits(model, ids), logits(twin, ids))


def reference_cope(own: torch.Tensor, clip_low_n: int) -> torch.Tensor:
    """The mask of the authors' modeling_cope.py (`LlamaRotaryEmbedding.__init__`), in words."""
    return torch.stack(
        [
            value * 0.5 * (1 + math.cos(math.pi * max(k, 0) / (clip_low_n - 1)))
            for k, value in enumerate(own, start=clip_low_n - len(own))
        ]
    )


@pytest.mark.parametrize("n", [2, 5, 20, 64])
def test_cope_is_the_mask_of_the_reference_implementation(n: int) -> None:
    found = Cope(factor=8, n=n).frequencies(LLAMA3)
    wanted = reference_cope(LLAMA3.inv_freq(), n)
    torch.testing.assert_close(found.inv_freq, wanted, rtol=1e-12, atol=1e-24)
    assert found.attention_scaling == 1.0


def test_cope_begins_at_one_and_ends_at_zero() -> None:
    kept = (Cope(factor=4, n=5).frequencies(ROPE).inv_freq / ROPE.inv_freq()).tolist()
    half = math.sqrt(0.5)
    assert kept[:60] == [1.0] * 60
    assert kept[59:] == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2, 0], abs=1e-15)
    assert kept[63] == 0.0


@pytest.mark.parametrize(
    ("rope", "planes"),
    [
        (Rope(dim=64, theta=1e7, length=262_144), 10),  # 2π·1e7^(i/32) > 262,144 from i = 22 on
        (LLAMA3, 29),  # from i = 35 on
        (Rope(dim=16, theta=1e4, length=WINDOW), 5),  # 2π·1e4^(2/8) is 62.8, with i = 3 it is 199
    ],
)
def test_cope_tapers_the_planes_that_outlast_the_window(rope: Rope, planes: int) -> None:
    found, named = Cope(factor=4), Cope(factor=4, n=planes)
    assert torch.equal(found.frequencies(rope).inv_freq, named.frequencies(rope).inv_freq)


def test_cope_says_how_many_planes_stand_still_and_saves_finite_divisors(tmp_path: Path) -> None:
    model, ids = build("llama"), tokens(LONG)
    with longctx.extend(model, "cope", factor=4) as patch:
        assert ", 1 plane does not turn, within" in str(patch.report())
        divisors = saved_rope(model, tmp_path)["long_factor"]
        assert divisors[:4] == [1.0] * 4
        assert divisors[5] == pytest.approx(2.0)
        assert divisors[7] <= 1 / STANDSTILL
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(plain, ids), logits(model, ids))


def test_the_factor_of_drop_is_on_the_logits() -> None:
    found = Drop(factor=8).frequencies(ROPE)
    assert found.inv_freq.tolist() == [0.0] * 64
    assert found.attention_scaling**2 == pytest.approx(1 + 0.103 * 2.0794415416798357, rel=1e-12)
    assert Drop().frequencies(ROPE).attention_scaling == 1.0
    assert Drop(factor=1).frequencies(ROPE).attention_scaling == 1.0
    assert Drop(factor=8, coefficient=0).frequencies(ROPE).attention_scaling == 1.0
    twice = Drop(target=8192, coefficient=0.4).frequencies(ROPE)
    assert twice.attention_scaling**2 == pytest.approx(1 + 0.4 * 0.6931471805599453, rel=1e-12)


@pytest.mark.parametrize("factor", [None, 1, 4])
def test_drop_is_attention_without_positions_and_scaled_logits(factor: float | None) -> None:
    """Frequencies zeroed by hand, and the factor on each layer's `scaling`, not on cos and sin."""
    model, plain, ids = build("llama"), build("llama"), tokens(LONG)
    inv_freq, _ = frequencies_of(rotary_of(plain), None)
    inv_freq.zero_()
    for layer in plain.model.layers:
        layer.self_attn.scaling *= 1 + 0.103 * math.log(factor or 1)
    with longctx.extend(model, Drop(factor=factor)) as patch:
        assert_same(logits(model, ids), logits(plain, ids))
        assert patch.window == WINDOW * (factor or 1)
        assert "8 planes do not turn" in str(patch.report())


def test_drop_knows_no_positions() -> None:
    """Tokens that come before may change places: only what follows sees them, all alike."""
    model, ids = build("llama", num_hidden_layers=1), tokens(LONG)
    mixed = torch.cat([ids[:, :50].flip(1), ids[:, 50:]], dim=1)
    before = logits(model, mixed)[:, 50:] - logits(model, ids)[:, 50:]
    with longctx.extend(model, "drop", factor=4):
        assert_same(logits(model, mixed)[:, 50:], logits(model, ids)[:, 50:])
    assert before.abs().max() > 1e-3


def test_after_recalibration_drop_is_put_on_again_with_a_factor(tmp_path: Path) -> None:
    model, ids = build("llama"), tokens(LONG)
    longctx.extend(model, "drop")
    with torch.no_grad():
        model.lm_head.weight *= 0.5  # stands for the training
    model.save_pretrained(tmp_path)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(trained, ids), logits(model, ids))
    patch = longctx.patch_of(model)
    assert patch is not None
    patch.remove()
    with longctx.extend(model, "drop", factor=4) as patch:
        assert patch.report().ok
        assert (logits(model, ids) - logits(trained, ids)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("p_rope", {"p": 0}, "p_rope: p=0 must be a finite number > 0"),
        ("p_rope", {"p": -0.5}, "p_rope: p=-0.5"),
        ("p_rope", {"p": 1.5}, r"p_rope: p=1.5 must be a share of the planes, 0 < p ≤ 1"),
        ("p_rope", {"p": math.nan}, "p_rope: p=nan"),
        ("p_rope", {"p": "x"}, "p_rope: p='x'"),
        ("p_rope", {"factor": 0.5}, "p_rope: factor=0.5"),
        ("cope", {"n": -1}, "cope: n=-1 must be a whole number of planes, 0 or ≥ 2"),
        ("cope", {"n": 1}, "cope: n=1 .* would keep its frequency"),
        ("cope", {"n": 2.5}, "cope: n=2.5"),
        ("cope", {"n": True}, "cope: n=True"),
        ("cope", {"n": "all"}, "cope: n='all'"),
        ("drop", {"coefficient": -0.1}, "drop: coefficient=-0.1 must be a finite number ≥ 0"),
        ("drop", {"coefficient": math.inf}, "drop: coefficient=inf"),
        ("drop", {"coefficient": math.nan}, "drop: coefficient=nan"),
        ("drop", {"coefficient": True}, "drop: coefficient=True"),
        ("drop", {"coefficient": "x"}, "drop: coefficient='x'"),
    ],
)
def test_impossible_fields_are_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make_method(name, fields)


def test_what_a_model_cannot_take_is_refused_with_the_next_step() -> None:
    with pytest.raises(MethodError, match=r"p=0.01 leaves none of the model's 64 planes turning"):
        PRope(p=0.01).frequencies(ROPE)
    with pytest.raises(MethodError, match=r"n=65 is more than the model's 64 planes; expected n"):
        Cope(factor=4, n=65).frequencies(ROPE)
    short = Rope(dim=16, theta=100.0, length=4096)  # its longest wavelength is 353 tokens
    with pytest.raises(MethodError, match=r"0 of the model's 8 planes .* pass n=, from 2 to 8"):
        Cope(factor=4).frequencies(short)
    with pytest.raises(MethodError, match="cope needs factor="):
        longctx.extend(build("llama"), "cope")


@pytest.mark.parametrize("name", ["p_rope", "cope", "drop", "abf"])
def test_a_target_below_the_window_is_refused_by_formulas_without_a_factor_too(name: str) -> None:
    model = build("llama")
    config = model.config.to_dict()
    with pytest.raises(MethodError, match=f"{name}: target=32 tokens is below the window"):
        longctx.extend(model, name, target=32)
    assert model.config.to_dict() == config
