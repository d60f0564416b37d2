"""NTK-by-parts: slow planes are interpolated, fast ones left alone, with a ramp between.

    θ'ᵢ = (1 − γᵢ) θᵢ/s + γᵢ θᵢ
    γ falls from 1 to 0 linearly in i between
        low  = ⌊d · ln(L / (2π · beta_fast)) / (2 ln b)⌋   and
        high = ⌈d · ln(L / (2π · beta_slow)) / (2 ln b)⌉

A plane that turns more than `beta_fast` times within the window keeps its frequency; one that turns
less than `beta_slow` times never saw its whole circle and is interpolated. The ramp is that of the
reference implementation and of transformers; the paper's, linear in the number of turns, differs
from it by up to 57% on the planes between.

Source: Peng et al. 2023, YaRN (arXiv:2309.00071), section 3.2 and its reference implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.errors import MethodError
from longctx.rope import Frequencies, Rope

from ._frequency import FrequencyMethod
from ._scale import check_number

__all__ = ["METHOD", "NtkByParts"]


@dataclass(frozen=True, slots=True)
class NtkByParts(FrequencyMethod):
    """YaRN's interpolation without its attention temperature."""

    beta_fast: float = 32.0
    """Turns within the original window above which a plane is left alone."""
    beta_slow: float = 1.0
    """Turns below which a plane is interpolated fully."""

    name: ClassVar[str] = "ntk_by_parts"

    def __post_init__(self) -> None:
        super(NtkByParts, self).__post_init__()
        check_number(self.name, "beta_fast", self.beta_fast)
        check_number(self.name, "beta_slow", self.beta_slow)
        if self.beta_fast <= self.beta_slow:
            raise MethodError(
                f"{self.name}: beta_fast={self.beta_fast:g} must be larger than "
                f"beta_slow={self.beta_slow:g} (both are turns within the original window)."
            )

    def frequencies(self, rope: Rope) -> Frequencies:
        """(1 − γ) θ/s + γ θ."""
        own, gamma = rope.inv_freq(), self._kept(rope)
        return Frequencies((1 - gamma) * own / self.scale(rope) + gamma * own)

    def native_rope(self, rope: Rope) -> dict[str, Any]:
        """`rope_type: yarn` with `attention_factor` 1; `apply_yarn_scaling` says it to vLLM."""
        return self._yarn(rope, 1.0) | {"apply_yarn_scaling": False}

    def _yarn(self, rope: Rope, attention_factor: float) -> dict[str, Any]:
        """`rope_type: yarn`, the temperature also as `mscale`, which some engines read alone."""
        factor = self.scale(rope)
        mscale = (attention_factor - 1) / (0.1 * math.log(factor)) if factor > 1 else None
        return rope.parameters(
            "yarn",
            factor=factor,
            original_max_position_embeddings=rope.length,
            attention_factor=attention_factor,
            beta_fast=float(self.beta_fast),
            beta_slow=float(self.beta_slow),
            **({} if mscale is None else {"mscale": mscale, "mscale_all_dim": 0.0}),
            **{key: rope.yarn[key] for key in ("truncate",) if key in rope.yarn},
        )

    def _kept(self, rope: Rope) -> Tensor:
        """γ: the share of its own frequency that each plane keeps, [d/2]."""

        def plane(turns: float) -> float:
            span = rope.length / (turns * 2 * math.pi)
            return rope.dim * math.log(span) / (2 * math.log(rope.theta))

        low, high = plane(self.beta_fast), plane(self.beta_slow)
        if rope.yarn.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dim - 1)
        index = torch.arange(rope.dim // 2, dtype=torch.float64)
        return 1 - ((index - low) / max(high - low, 1e-3)).clamp(0, 1)


METHOD = NtkByParts
