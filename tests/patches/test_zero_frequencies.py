"""Frequencies may be 0: p-RoPE (arXiv:2410.06205) as a method of someone else's."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import longctx
from longctx.model import rotary_of
from longctx.patches._frequency import FrequencyMethod
from longctx.rope import STANDSTILL, Frequencies, Rope, frequencies_of

from ..families import build, tokens
from ..shipping import Property, check, label, properties, shipped

FILE = f'''"""p-RoPE. Source: Barbero et al. 2024 (arXiv:2410.06205)."""
from {__name__} import StandingPlanes as METHOD
'''
LONG = 104


@dataclass(frozen=True, slots=True)
class StandingPlanes(FrequencyMethod):
    """The slowest (1 − p) of the planes do not turn."""

    p: float = 0.75
    """Share of the planes that turn."""

    name: ClassVar[str] = "standing_planes"
    needs_extent: ClassVar[bool] = False

    def frequencies(self, rope: Rope) -> Frequencies:
        """θ, then zeros."""
        own = rope.inv_freq()
        turning = torch.arange(len(own)) < int(self.p * len(own))
        return Frequencies(own * turning)

    def neutral(self, rope: Rope) -> StandingPlanes:
        """Every plane turns."""
        return StandingPlanes(factor=1.0, p=1.0)


@dataclass(frozen=True, slots=True)
class Proportional(StandingPlanes):
    """The same in the words that newer transformers has for it, with frequencies of exactly 0."""

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """`rope_type: proportional`."""
        return rope.parameters("proportional", partial_rotary_factor=self.p)


def logits(model: PreTrainedModel, first: int = 0) -> Tensor:
    places = torch.arange(first, first + LONG)[None]
    everything = torch.ones(1, LONG, dtype=torch.long)
    with torch.no_grad():
        return model(tokens(LONG), position_ids=places, attention_mask=everything).logits


@pytest.mark.parametrize("case", properties(), ids=label)
def test_it_passes_the_matrix(case: Property, tmp_path: Path) -> None:
    with shipped(tmp_path, "standing_planes", FILE):
        check(case, "standing_planes", tmp_path)


@pytest.mark.parametrize("p", [0.5, 0.0])
def test_the_checkpoint_holds_finite_numbers_and_plain_transformers_reads_them(
    p: float, tmp_path: Path
) -> None:
    model = build("llama")
    patch = longctx.extend(model, StandingPlanes(factor=4, p=p))
    assert f"{round(8 * (1 - p))} planes do not turn" in str(patch.report())
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    config = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in config.json"))
    divisors = config["rope_parameters"]["long_factor"]
    assert max(divisors) <= 1 / STANDSTILL < torch.finfo(torch.bfloat16).max
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    for first in (0, 10**6):
        assert torch.equal(logits(plain, first), logits(model, first))


@pytest.mark.parametrize("first", [0, 10**6])
def test_a_plane_that_stands_still_is_one_of_frequency_zero(first: int) -> None:
    model = build("llama")
    with longctx.extend(model, StandingPlanes(factor=4, p=0.5)):
        found = logits(model, first)
        inv_freq, _ = frequencies_of(rotary_of(model), None)
        assert 0 < inv_freq[4:].max() < 2 * STANDSTILL
        inv_freq[4:] = 0.0
        assert torch.equal(logits(model, first), found)


@pytest.mark.skipif("proportional" not in ROPE_INIT_FUNCTIONS, reason="older transformers")
@pytest.mark.parametrize("first", [0, 10**6])
def test_it_is_the_proportional_rope_of_transformers(first: int, tmp_path: Path) -> None:
    model = build("llama")
    with longctx.extend(model, StandingPlanes(factor=4, p=0.5)):
        found = logits(model, first)
    with longctx.extend(model, Proportional(factor=4, p=0.5)) as patch:
        assert patch.report().ok
        inv_freq, _ = frequencies_of(rotary_of(model), None)
        assert not inv_freq[4:].any()
        assert torch.equal(logits(model, first), found)
        model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain, first), found)


def test_the_longest_angle_is_below_what_float32_resolves() -> None:
    angle = 2.0**40 * STANDSTILL
    assert math.cos(angle) == 1.0
    assert math.sin(angle) < torch.finfo(torch.float32).eps / 1e9
